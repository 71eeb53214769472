"""The classic U-Net (Ronneberger, Fischer and Brox, MICCAI 2015) as breast-ultrasound papers train it, from scratch.

    image ─two 3 x 3─┬─pool─two 3 x 3─┬─ … ─deepest─ … ─up, 3 x 3, joined─two 3 x 3─up, 3 x 3, joined─two 3 x 3─1 x 1─→
                     └──────skip──────┴──────────────────────────────────────────────┘

With 64 channels it has the 34,513,345 parameters of hybrid attention's Table 2. That count leaves one reading: padded
3 x 3 convolutions with bias, no normalisation, RGB in, and a 3 x 3 convolution behind each upsampling.
"""

from __future__ import annotations

import itertools
import typing as t

import torch
from torch import nn

from bushpc.config import config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.one_mask import OneMask, OneMaskConfig, require_multiple

LEVELS = 5
STRIDE = 2 ** (LEVELS - 1)


@config_class
class ClassicUNetConfig(OneMaskConfig):
    """Five levels, the channels doubled at each."""

    image_size: int = setting(256, "Edge of the square input; a multiple of 16.", unit="pixels", ge=STRIDE)
    pretrained: bool = setting(False, "There are no weights of this network; true is rejected.")
    width: int = setting(64, "Channels of the first level; the others have 2, 4, 8 and 16 times as many.", ge=1)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.pretrained:
            raise ConfigError(
                "model.pretrained=true: the classic U-Net trains from scratch; set it to false, or take model=unet, "
                "whose encoder has ImageNet weights"
            )
        require_multiple(self.image_size, STRIDE, "the stride of the deepest level")

    @property
    def backbone(self) -> None:
        """Nothing states how its input is normalised."""
        return None

    @property
    def title(self) -> str:
        """As papers say."""
        return "Classic U-Net"

    @property
    def size_stride(self) -> int:
        """Any multiple of it can be read."""
        return STRIDE

    @property
    def blocks(self) -> tuple[type, ...]:
        """The pairs of convolutions."""
        return (TwoConvolutions,)


class ClassicUNet(OneMask):
    """The classic U-Net; one mask class."""

    Config = ClassicUNetConfig

    config: ClassicUNetConfig

    def __init__(self, config: ClassicUNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = ClassicNet(config.width)

    def cam_layer(self) -> nn.Module:
        """The last convolutions; only a 1 x 1 convolution follows."""
        return self.net.get_submodule("joins")[-1]  # type: ignore[index]


class TwoConvolutions(nn.Sequential):
    """Two 3 x 3 convolutions with bias, each followed by a ReLU."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__(_conv(given, made), nn.ReLU(inplace=True), _conv(made, made), nn.ReLU(inplace=True))


class ClassicNet(nn.Module):
    """RGB to the logits of one mask. width: channels of the first level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width << level for level in range(LEVELS)]
        self.levels = nn.ModuleList(TwoConvolutions(*pair) for pair in itertools.pairwise([3, *widths]))
        steps = [(deep, shallow) for shallow, deep in reversed(list(itertools.pairwise(widths)))]
        self.ups = nn.ModuleList(nn.Sequential(nn.Upsample(scale_factor=2), _conv(*step), nn.ReLU()) for step in steps)
        self.joins = nn.ModuleList(TwoConvolutions(2 * shallow, shallow) for _, shallow in steps)
        self.head = nn.Conv2d(width, 1, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He's, as in the publication: without normalisation the scale is lost
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(t.cast(torch.Tensor, module.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W to B x 1 x H x W."""
        skips: list[torch.Tensor] = []
        for level in self.levels:
            x = level(nn.functional.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], dim=1))
        logits: torch.Tensor = self.head(x)
        return logits


def _conv(given: int, made: int) -> nn.Conv2d:
    return nn.Conv2d(given, made, kernel_size=3, padding=1)
