"""The convolution that most decoders repeat: with BatchNorm and ReLU, the size stays."""

from __future__ import annotations

from torch import nn


def conv_bn_relu(
    given: int, made: int, kernel: int = 3, *, dilation: int = 1, bias: bool = True
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    """B x given x h x w to B x made x h x w, as three modules for an nn.Sequential. kernel: odd."""
    conv = nn.Conv2d(given, made, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias)
    return conv, nn.BatchNorm2d(made), nn.ReLU(inplace=True)


class ConvPair(nn.Sequential):
    """Two of them, given to between to made channels."""

    def __init__(self, given: int, between: int, made: int, *, bias: bool = True) -> None:
        super().__init__(*conv_bn_relu(given, between, bias=bias), *conv_bn_relu(between, made, bias=bias))
