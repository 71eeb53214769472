"""Convolutions that several networks repeat; the size stays."""

from __future__ import annotations

import torch
from torch import nn


def conv_bn_relu(
    given: int, made: int, kernel: int = 3, *, dilation: int = 1, bias: bool = True
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    """B x given x h x w to B x made x h x w, as three modules for an nn.Sequential. kernel: odd."""
    conv = nn.Conv2d(given, made, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias)
    return conv, nn.BatchNorm2d(made), nn.ReLU(inplace=True)


class PreNormResidual(nn.Module):
    """GroupNorm, SiLU and a 3 x 3 convolution, twice, and a skip: B x given x h x w to B x made x h x w."""

    def __init__(self, given: int, made: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(groups, given),
            nn.SiLU(),
            nn.Conv2d(given, made, 3, padding=1),
            nn.GroupNorm(groups, made),
            nn.SiLU(),
            nn.Conv2d(made, made, 3, padding=1),
        )
        self.skip = nn.Identity() if given == made else nn.Conv2d(given, made, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x) + self.skip(x)
        return out


class ConvPair(nn.Sequential):
    """Two of them, given to between to made channels."""

    def __init__(self, given: int, between: int, made: int, *, bias: bool = True) -> None:
        super().__init__(*conv_bn_relu(given, between, bias=bias), *conv_bn_relu(between, made, bias=bias))
