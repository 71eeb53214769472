"""AAU-net: a U-Net whose convolutions are hybrid adaptive attention modules (HAAM).

Chen, Dai, Zhang and Yap, "AAU-net: An Adaptive Attention U-net for Breast Lesions Segmentation in Ultrasound Images"
(IEEE TMI 2023). alpha and alpha' = 1 - alpha are the paper's.

    x ─┬─ 3 x 3, dilation 3 ─┐ alpha of each channel
       ├─ 5 x 5 ─────────────┴─ alpha', 1 x 1 ─┐ alpha of each position
       └─ 3 x 3, 1 x 1 ────────────────────────┴─ alpha', 3 x 3 → HAAM(x)
"""

from __future__ import annotations

import itertools
import typing as t

import torch
from torch import nn

from bushpc.config import config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.one_mask import OneMask, OneMaskConfig, require_multiple
from bushpc.nn.conv import conv_bn_relu


@config_class
class AauNetConfig(OneMaskConfig):
    """The paper trains with cross-entropy alone; see dice_weight."""

    image_size: int = setting(
        256, "Edge of the square input; a multiple of the deepest level's stride.", unit="pixels", ge=1
    )
    pretrained: bool = setting(False, "The network is trained from scratch.")
    widths: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512),
        "Channels of the levels, each at half the resolution of the one before. Ours: the authors released the module "
        "alone.",
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.pretrained:
            raise ConfigError("model.pretrained=true: AAU-net is trained from scratch; set model.pretrained=false")
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ConfigError(f"model.widths={list(self.widths)}: two numbers or more are needed, all above 0")
        require_multiple(self.image_size, self.size_stride, f"the stride of the deepest of {len(self.widths)} levels")

    @property
    def title(self) -> str:
        """As its authors write it."""
        return "AAU-net"

    @property
    def backbone(self) -> None:
        """There is none."""
        return None

    @property
    def size_stride(self) -> int:
        """Of the deepest level."""
        return 1 << len(self.widths) - 1

    @property
    def least_images(self) -> int:
        """Channel attention normalises pooled features over the images of a batch."""
        return 2

    @property
    def blocks(self) -> tuple[type, ...]:
        """The modules."""
        return (HAAM,)


class AauNet(OneMask):
    """AAU-net; one mask class."""

    Config = AauNetConfig

    config: AauNetConfig
    net: AauNetNet

    def __init__(self, config: AauNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = AauNetNet(config.widths)

    def cam_layer(self) -> nn.Module:
        """The last module."""
        return self.net.decoder[-1]


class AauNetNet(nn.Module):
    """RGB to one mask's logits, B x 3 x H x W to B x 1 x H x W."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(HAAM(before, width) for before, width in itertools.pairwise((3, *widths)))
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), *conv_bn_relu(below, width))
            for below, width in itertools.pairwise(reversed(widths))
        )
        self.decoder = nn.ModuleList(HAAM(2 * width, width) for width in reversed(widths[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x, skips = image_BCHW, []
        for level, module in enumerate(self.encoder):
            x = module(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, module in zip(self.up, self.decoder, strict=True):
            x = module(torch.cat([skips.pop(), up(x)], dim=1))
        return t.cast(torch.Tensor, self.head(x))


class HAAM(nn.Module):
    """Hybrid adaptive attention: the channels choose between two receptive fields, then the positions a third."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.dilated = nn.Sequential(*conv_bn_relu(channels, width, 3, dilation=3))
        self.large = nn.Sequential(*conv_bn_relu(channels, width, 5))
        self.channel_gate = nn.Sequential(
            *(nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)),
            *(nn.Linear(width, width), nn.Sigmoid()),
        )
        self.of_channels = nn.Sequential(*conv_bn_relu(2 * width, width, 1))
        self.small = nn.Sequential(*conv_bn_relu(channels, width, 3), *conv_bn_relu(width, width, 1))
        self.space_gate = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 1, 1), nn.Sigmoid())
        self.of_space = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B x channels x h x w to B x width x h x w."""
        dilated, large = self.dilated(x), self.large(x)
        pooled_BC = torch.cat([dilated, large], dim=1).mean(dim=(2, 3))
        alpha_BC11 = self.channel_gate(pooled_BC)[:, :, None, None]
        chosen = self.of_channels(torch.cat([alpha_BC11 * dilated, (1 - alpha_BC11) * large], dim=1))
        small = self.small(x)
        alpha_B1hw = self.space_gate(chosen + small)
        return t.cast(torch.Tensor, self.of_space(torch.cat([alpha_B1hw * chosen, (1 - alpha_B1hw) * small], dim=1)))
