"""`bushpc.models.smp` with a second head, which tells the scan's label from the encoder's deepest features."""

from __future__ import annotations

import math
import typing as t

import torch
from torch import nn

from bushpc.config import config_class, setting
from bushpc.losses.label import labelled_cross_entropy
from bushpc.models.smp import Smp, SmpConfig, build
from bushpc.sample import LABELS, Batch, Losses, Prediction


@config_class
class SmpLabelConfig(SmpConfig):
    """As model=smp, and the library's classification head: mean of the deepest features, dropout, one layer."""

    label_weight: float = setting(
        1.0, "Weight of the label's cross-entropy beside the mask's losses.", gt=0, lt=math.inf
    )
    label_dropout: float = setting(0.2, "Share of the pooled features that is dropped in training.", ge=0, lt=1)

    @property
    def needs(self) -> frozenset[str]:
        """Image, mask and label; no sentence."""
        return frozenset({"image_BCHW", "mask_BKHW", "label_B"})


class SmpLabel(Smp):
    """A network of segmentation-models-pytorch with two heads: one mask class, and one of LABELS per image.

    Scans without a label train the mask alone.
    """

    Config = SmpLabelConfig
    makes = frozenset({"prob_BKHW", "class_prob_BL"})

    config: SmpLabelConfig

    def built(self, state: dict[str, torch.Tensor] | None) -> nn.Module:
        """With the second head."""
        head = {"classes": len(LABELS), "pooling": "avg", "dropout": self.config.label_dropout}
        return build(self.config.shape, state, aux_params=head)

    def forward(self, batch: Batch) -> Losses:
        """The mask's losses and the label's cross-entropy, weighted; terms "dice", "bce" and "ce"."""
        logits_BKHW, label_logits_BL = self._both(batch)
        mask = self.mask_losses(logits_BKHW, batch)
        ce = labelled_cross_entropy(label_logits_BL, batch.label_B)
        return Losses(total=mask.total + self.config.label_weight * ce, terms={**mask.terms, "ce": ce.detach()})

    def predict(self, batch: Batch) -> Prediction:
        """Mask and label in one pass. Neither `Batch.mask_BKHW` nor `Batch.label_B` is read."""
        logits_BKHW, label_logits_BL = self._both(batch)
        return Prediction(prob_BKHW=logits_BKHW.float().sigmoid(), class_prob_BL=label_logits_BL.float().softmax(dim=1))

    def _both(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return t.cast("tuple[torch.Tensor, torch.Tensor]", self.net(self.normalize(batch.image_BCHW, self.net)))
