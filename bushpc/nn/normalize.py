"""Normalization of images in [0, 1] to the input that a pretrained backbone expects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# timm's IMAGENET_DEFAULT_MEAN and _STD, without importing timm.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(image - mean) / std per channel, in the dtype of the backbone's parameters.

    mean, std: three numbers each, for images in [0, 1]. They belong to the code, not to the checkpoint, and stay in
    float32.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, image_BCHW: torch.Tensor, backbone: nn.Module) -> torch.Tensor:
        """Normalize B x 3 x H x W, float32 in [0, 1], for `backbone`; the shape stays the same.

        DeepSpeed converts parameters to bfloat16 but passes the batch on unchanged. Under autocast, parameters stay
        float32, and so does the image until the first convolution.
        """
        return ((image_BCHW - self.mean) / self.std).to(next(backbone.parameters()).dtype)
