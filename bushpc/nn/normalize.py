"""The step from a batch's image in [0, 1] to what a pretrained backbone expects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Normalize(nn.Module):
    """(image - mean) / std per channel, in the type that the model's parameters have.

    mean, std: three numbers each, in units of an image in [0, 1]. They are part of the code, not of the
    checkpoint. Like every buffer they follow `model.to(torch.bfloat16)`, which is how a model that
    DeepSpeed has turned into bfloat16 gets bfloat16 images from a float32 batch.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W, float32 in [0, 1], to the same shape, normalised."""
        return ((image_BCHW - self.mean) / self.std).to(self.mean.dtype)
