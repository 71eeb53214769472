"""Overlap losses of the segmentation models: soft Dice, Jaccard and binary cross-entropy, always in float32.

logits (model) + mask (Batch) → Losses
"""

from __future__ import annotations

import typing as t

import torch
from torch.nn import functional as F

from bushpc.errors import ConfigError
from bushpc.sample import Losses


class Weights(t.Protocol):
    """Settings of the two losses' weights."""

    @property
    def dice_weight(self) -> float: ...

    @property
    def bce_weight(self) -> float: ...


def require_loss(config: Weights) -> None:
    """Raises: ConfigError where both weights are 0."""
    if config.dice_weight + config.bce_weight == 0:
        raise ConfigError("model.dice_weight=0 and model.bce_weight=0 leave no loss: set one of them above 0")


def soft_dice_loss(logits_BKHW: torch.Tensor, mask_BKHW: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - (2 Σ p m + smooth) / (Σ p + Σ m + smooth), per sample and mask class, then averaged over both.

    logits_BKHW: before the sigmoid, any floating type. mask_BKHW: 0 or 1, same shape.
    Returns a float32 scalar in [0, 1). It is computed per sample, so small lesions weigh as much as large ones.
    `smooth` makes it push probabilities down where the mask is empty.
    """
    # Sums over 10^5 pixels lose all precision in bfloat16, hence float() even under autocast.
    return dice_loss(logits_BKHW.float().sigmoid(), mask_BKHW.float(), smooth)


def dice_loss(
    prob_BKHW: torch.Tensor, mask_BKHW: torch.Tensor, smooth: float = 1.0, above: float | None = None
) -> torch.Tensor:
    """`soft_dice_loss` of probabilities: float32 in [0, 1].

    above: what the numerator gets instead of `smooth`. With 2 smooth the Dice is 2 (I + smooth) / (S + smooth), as some
    codes have it: its loss is not below -1, which it reaches where mask and prediction are empty.
    """
    intersection_BK = (prob_BKHW * mask_BKHW).sum(dim=(2, 3))
    size_BK = prob_BKHW.sum(dim=(2, 3)) + mask_BKHW.sum(dim=(2, 3))
    return (1 - (2 * intersection_BK + (smooth if above is None else above)) / (size_BK + smooth)).mean()


def jaccard_loss(logits_BKHW: torch.Tensor, mask_BKHW: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - (Σ p m + smooth) / (Σ (p + m - p m) + smooth), per sample and mask class, then averaged over both.

    This is (17) of the hybrid attention paper, plus `smooth`; without it, an empty mask gives 1 for any p.
    Shapes, types and range as in `soft_dice_loss`.
    """
    prob_BKHW = logits_BKHW.float().sigmoid()
    mask_BKHW = mask_BKHW.float()
    intersection_BK = (prob_BKHW * mask_BKHW).sum(dim=(2, 3))
    union_BK = prob_BKHW.sum(dim=(2, 3)) + mask_BKHW.sum(dim=(2, 3)) - intersection_BK
    return (1 - (intersection_BK + smooth) / (union_BK + smooth)).mean()


def bce_loss(logits_BKHW: torch.Tensor, mask_BKHW: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, averaged over all pixels of the batch: a float32 scalar."""
    return F.binary_cross_entropy_with_logits(logits_BKHW.float(), mask_BKHW.float())


def overlap_losses(
    logits_BKHW: torch.Tensor,
    mask_BKHW: torch.Tensor,
    *,
    dice_weight: float,
    bce_weight: float,
) -> Losses:
    """`dice_weight` · soft Dice + `bce_weight` · cross-entropy, with the terms named "dice" and "bce".

    `terms` also contains a term with weight 0, because both curves are more informative than one.
    """
    dice, bce = soft_dice_loss(logits_BKHW, mask_BKHW), bce_loss(logits_BKHW, mask_BKHW)
    return Losses(
        total=dice_weight * dice + bce_weight * bce,
        terms={"dice": dice.detach(), "bce": bce.detach()},
    )
