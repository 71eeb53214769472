"""U-KAN: a convolutional U-Net whose two deepest levels are Kolmogorov-Arnold networks on tokens.

Li et al., "U-KAN Makes Strong Backbone for Medical Image Segmentation and Generation" (AAAI 2025), with the KAN layer
of Liu et al., "KAN: Kolmogorov-Arnold Networks" (2024): a SiLU and a spline on every edge.

    image ─convs, pool─┬─convs, pool─┬─convs, pool─┬─patches, Tok-KAN─┬─patches, Tok-KAN
                       │             │             │                  └ + convs, up ┘
                       │             │             └ + convs, up ─ Tok-KAN ─ ┘
                       └ + convs, up └ + convs, up ──┘
                       convs, up, 1 x 1 → logits

Shape suffixes besides those of `bushpc.sample`: h, w a feature map's own height and width; I, O inputs and outputs of a
layer; G the splines of an edge.
"""

from __future__ import annotations

import itertools
import math
import typing as t

import torch
from torch import nn
from torch.nn import functional as F

from bushpc.config import config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.one_mask import OneMask, OneMaskConfig, require_multiple
from bushpc.nn.conv import ConvPair

LEVELS = 5
STRIDE = 1 << LEVELS  # of the deepest tokens to the image
DEGREE = 3  # of the splines
RANGE = 1.0  # splines lie between -RANGE and RANGE; beyond, an edge fades to its SiLU


@config_class
class UKanConfig(OneMaskConfig):
    """The paper's values are the defaults."""

    image_size: int = setting(256, "Edge of the square input; a multiple of 32.", unit="pixels", ge=1)
    pretrained: bool = setting(False, "The network is trained from scratch.")
    widths: tuple[int, ...] = setting(
        (16, 32, 128, 160, 256),
        "Channels of three convolutional levels and of two levels of tokens, each at half the resolution of the one "
        "before.",
    )
    intervals: int = setting(
        5, f"Intervals of the splines' grid between {-RANGE:g} and {RANGE:g}; KAN's default.", ge=1
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.pretrained:
            raise ConfigError("model.pretrained=true: U-KAN is trained from scratch; set model.pretrained=false")
        if len(self.widths) != LEVELS or min(self.widths) < 1:
            raise ConfigError(f"model.widths={list(self.widths)}: {LEVELS} numbers above 0 are needed")
        require_multiple(self.image_size, STRIDE, "the stride of the deepest tokens")

    @property
    def title(self) -> str:
        """As its authors write it."""
        return "U-KAN"

    @property
    def backbone(self) -> None:
        """There is none."""
        return None

    @property
    def size_stride(self) -> int:
        """Of the deepest tokens."""
        return STRIDE

    @property
    def least_images(self) -> int:
        """2 where the deepest level is one token, which BatchNorm normalises over the batch."""
        return 2 if self.image_size == STRIDE else 1

    @property
    def blocks(self) -> tuple[type, ...]:
        """Pairs of convolutions, and the blocks of tokens."""
        return ConvPair, TokKan


class UKan(OneMask):
    """U-KAN; one mask class."""

    Config = UKanConfig

    config: UKanConfig
    net: UKanNet

    def __init__(self, config: UKanConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = UKanNet(config.widths, config.intervals)

    def cam_layer(self) -> nn.Module:
        """The last convolutions, at half the image's size."""
        return self.net.up[-1]


class UKanNet(nn.Module):
    """RGB to one mask's logits, B x 3 x H x W to B x 1 x H x W."""

    def __init__(self, widths: tuple[int, ...], intervals: int) -> None:
        super().__init__()
        *convolved, shallow, deep = widths
        self.down = nn.ModuleList(ConvPair(given, made, made) for given, made in itertools.pairwise((3, *convolved)))
        self.patches = nn.ModuleList([Patches(convolved[-1], shallow), Patches(shallow, deep)])
        self.tokens = nn.ModuleList([TokKan(shallow, intervals), TokKan(deep, intervals)])
        self.up = nn.ModuleList(
            ConvPair(given, given, made) for given, made in itertools.pairwise((*reversed(widths), widths[0]))
        )
        self.tokens_up = nn.ModuleList([TokKan(shallow, intervals), TokKan(convolved[-1], intervals)])
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x, skips = image_BCHW, []
        for convs in self.down:
            x = F.max_pool2d(convs(x), 2)
            skips.append(x)
        for patches, tokens in zip(self.patches, self.tokens, strict=True):
            x = tokens(patches(x))
            skips.append(x)
        skips.pop()
        for level, convs in enumerate(self.up):
            x = F.interpolate(convs(x), scale_factor=2, mode="bilinear")
            if skips:
                x = x + skips.pop()
            if level < len(self.tokens_up):
                x = self.tokens_up[level](x)
        return t.cast(torch.Tensor, self.head(x))


class Patches(nn.Module):
    """Tokens from overlapping patches, at half the size."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(given, made, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return over_channels(self.norm, self.proj(x))


class TokKan(nn.Module):
    """The tokenized KAN block: three times a KAN layer and a depthwise convolution, a shortcut, LayerNorm.

    The authors' code also normalises what enters the layers, which the paper's equation does not have.
    """

    def __init__(self, width: int, intervals: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kan = nn.ModuleList(KanLinear(width, width, intervals) for _ in range(3))
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
            )
            for _ in range(3)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B x width x h x w; shape unchanged."""
        y = over_channels(self.norm, x)
        for kan, mix in zip(self.kan, self.mix, strict=True):
            y = mix(over_channels(kan, y))
        return over_channels(self.norm_out, x + y)


class KanLinear(nn.Module):
    """A KAN layer: output o is the sum over inputs i of w_oi SiLU(x_i) + s_oi sum_g c_oig B_g(x_i)."""

    def __init__(self, given: int, made: int, intervals: int) -> None:
        super().__init__()
        self.intervals = intervals
        self.w_OI = nn.Parameter(torch.empty(made, given))
        self.s_OI = nn.Parameter(torch.empty(made, given))
        self.c_OIG = nn.Parameter((torch.rand(made, given, intervals + DEGREE) - 0.5) * 0.1 / intervals)
        for weight in (self.w_OI, self.s_OI):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """... x I to ... x O."""
        splines = cubic_splines(x, self.intervals).flatten(-2)
        coefficients = (self.s_OI[..., None] * self.c_OIG).flatten(1)
        return F.linear(F.silu(x), self.w_OI) + F.linear(splines.to(x.dtype), coefficients)


def cubic_splines(x: torch.Tensor, intervals: int) -> torch.Tensor:
    """B_g(x): the cubic B-splines of a uniform grid on [-RANGE, RANGE] at x, ... to ... x (intervals + 3), float32.

    On a uniform grid all are one bump, moved: with the distance d from its centre in intervals,
    (max(2 - d, 0)^3 - 4 max(1 - d, 0)^3) / 6. Equal to de Boor's recursion, in one step.
    """
    step = 2 * RANGE / intervals
    first = -RANGE - (DEGREE - 1) / 2 * step
    centres_G = first + step * torch.arange(intervals + DEGREE, device=x.device, dtype=torch.float32)
    distance = (x.float()[..., None] - centres_G).abs() / step
    return ((2 - distance).clamp(min=0) ** 3 - 4 * (1 - distance).clamp(min=0) ** 3) / 6


def over_channels(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer that reads the last dimension, on a map: B x C x h x w to B x C' x h x w."""
    return t.cast(torch.Tensor, layer(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
