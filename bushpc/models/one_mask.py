"""What all networks have in common that turn an image into the logits of one mask: the losses and the prediction."""

from __future__ import annotations

import math

import torch
from torch import nn

from bushpc.config import config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.overlap import overlap_losses, require_loss
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.sample import Batch, Losses, Prediction


@config_class
class OneMaskConfig(BackboneConfig):
    """The two usual losses of a mask, weighted."""

    dice_weight: float = setting(1.0, "Weight of the soft Dice loss.", ge=0, lt=math.inf)
    bce_weight: float = setting(1.0, "Weight of the cross-entropy loss.", ge=0, lt=math.inf)

    def __post_init__(self) -> None:
        """Refuse settings without a loss. Raises: ConfigError."""
        super().__post_init__()
        require_loss(self)


def require_multiple(image_size: int, stride: int, of_what: str) -> None:
    """Refuse an image whose edge the network cannot divide. of_what: what the stride is. Raises: ConfigError."""
    if image_size % stride:
        below = image_size // stride * stride
        raise ConfigError(
            f"model.image_size={image_size} is not a multiple of {stride}, {of_what}: the nearest are "
            + " and ".join(str(size) for size in (below, below + stride) if size)
        )


class OneMask(Model):
    """A network, `net`, from normalised images to logits; one mask class."""

    makes = frozenset({"prob_BKHW"})

    config: OneMaskConfig
    net: nn.Module

    def __init__(self, config: OneMaskConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = config.normalize()

    def forward(self, batch: Batch) -> Losses:
        """Soft Dice and cross-entropy of the logits, weighted; terms "dice" and "bce"."""
        return self.mask_losses(self.logits(batch), batch)

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities in one pass. `Batch.mask_BKHW` is not read."""
        return Prediction(prob_BKHW=self.logits(batch).float().sigmoid())

    def mask_losses(self, logits_BKHW: torch.Tensor, batch: Batch) -> Losses:
        """The losses of one mask's logits."""
        return overlap_losses(
            logits_BKHW, batch.mask_BKHW, dice_weight=self.config.dice_weight, bce_weight=self.config.bce_weight
        )

    def logits(self, batch: Batch) -> torch.Tensor:
        """B x 1 x H x W, before the sigmoid."""
        logits_BKHW: torch.Tensor = self.net(self.normalize(batch.image_BCHW, self.net))
        return logits_BKHW
