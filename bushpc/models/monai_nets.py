"""MONAI's networks for segmentation, in two dimensions and from scratch."""

from __future__ import annotations

import functools
import typing as t
from collections.abc import Mapping

import torch
from torch import nn

from bushpc.config import config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.one_mask import OneMask, OneMaskConfig
from bushpc.nn.probe import Found, probe

# Sizes of the shipped configs, in the library's terms. MONAI has no defaults for AttentionUnet's; BasicUNetPlusPlus has
# its authors' Keras code's, whose network has 9,041,601 parameters (the library's own default has a quarter).
WIDTHS: Mapping[str, tuple[int, ...]] = {
    "AttentionUnet": (32, 64, 128, 256, 512),
    "BasicUNet": (32, 32, 64, 128, 256, 32),
    "BasicUNetPlusPlus": (32, 64, 128, 256, 512, 32),
    "SwinUNETR": (24,),
}


class Shape(t.NamedTuple):
    """What a network is built from, as in `MonaiConfig`."""

    network: str
    widths: tuple[int, ...]
    image_size: int


@config_class
class MonaiConfig(OneMaskConfig):
    """MONAI's AttentionUnet (Oktay et al. 2018), BasicUNet (Falk et al. 2019), BasicUNetPlusPlus or SwinUNETR.

    The last two are Zhou et al. 2018 (UNet++, of whose four outputs the mean is taken, its accurate mode) and
    Hatamizadeh et al. 2022. All are trained from scratch.
    """

    image_size: int = setting(256, "Edge of the square input; a multiple of the network's stride.", unit="pixels", ge=1)
    pretrained: bool = setting(False, "MONAI has no weights of these networks in two dimensions.")
    network: t.Literal["AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "SwinUNETR"] = setting(
        "BasicUNet", "The network, by the library's name."
    )
    widths: tuple[int, ...] | None = setting(
        None,
        "AttentionUnet: channels of its levels, at half the resolution each. BasicUNet, BasicUNetPlusPlus: of five "
        "levels, and of the last one on the way up. SwinUNETR: one number, a multiple of 12. null: (32, 64, 128, 256, "
        "512), the library's six, (32, 64, 128, 256, 512, 32), and 24.",
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.pretrained:
            raise ConfigError("model.pretrained=true: MONAI has no weights of these networks in 2D; set it to false")
        given = self.shape.widths
        fits = {"AttentionUnet": len(given) >= 2, "SwinUNETR": len(given) == 1}.get(self.network, len(given) == 6)
        if not fits or min(given) < 1 or (self.network == "SwinUNETR" and given[0] % 12):
            raise ConfigError(
                f"model.widths={list(given)}: AttentionUnet takes two numbers or more, BasicUNet and "
                "BasicUNetPlusPlus six, SwinUNETR one multiple of 12, all above 0; for example "
                f"model.widths={list(WIDTHS[self.network])}"
            )
        if self.image_size % self.stride:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of {self.stride}, the stride of {self.network}; "
                f"the nearest is {max(1, round(self.image_size / self.stride)) * self.stride}"
            )
        _find(self.shape)

    @property
    def backbone(self) -> None:
        """Nothing states how their input is normalised."""
        return None

    @property
    def title(self) -> str:
        """The network's name."""
        return self.network

    @property
    def stride(self) -> int:
        """Of the deepest level to the image."""
        return {"AttentionUnet": 1 << len(self.shape.widths) - 1, "SwinUNETR": 32}.get(self.network, 16)

    @property
    def shape(self) -> Shape:
        """What the network is built from."""
        return Shape(self.network, self.widths or WIDTHS[self.network], self.image_size)

    @property
    def least_images(self) -> int:
        """2 where a BatchNorm has one value per channel of a single image."""
        return _find(self.shape).least_images

    @property
    def blocks(self) -> tuple[type, ...]:
        """Whatever the network repeats."""
        return _find(self.shape).blocks


class Monai(OneMask):
    """A network of MONAI; one mask class."""

    Config = MonaiConfig

    config: MonaiConfig

    def __init__(self, config: MonaiConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = build(config.shape)

    def cam_layer(self) -> nn.Module:
        """What the last convolution reads."""
        layers = {"AttentionUnet": "model.1", "BasicUNet": "upcat_1", "BasicUNetPlusPlus": "upcat_0_4"}
        layers["SwinUNETR"] = "decoder1"
        return self.net.get_submodule(layers[self.config.network])


def build(shape: Shape) -> nn.Module:
    """The library's network: RGB in, one mask's logits out."""
    from monai.networks import nets as library  # takes seconds to import

    nets: t.Any = library  # its modules are filled by `from … import *`, which a type checker does not follow
    common = {"spatial_dims": 2, "in_channels": 3, "out_channels": 1}
    if shape.network == "AttentionUnet":
        strides = [2] * (len(shape.widths) - 1)
        return t.cast(nn.Module, nets.AttentionUnet(**common, channels=shape.widths, strides=strides))
    if shape.network == "BasicUNet":
        return t.cast(nn.Module, nets.BasicUNet(**common, features=shape.widths))
    if shape.network == "BasicUNetPlusPlus":

        class MeanOutput(nets.BasicUNetPlusPlus):  # type: ignore[misc]
            """Without deep supervision the library makes three heads that get no gradient, at which DDP stops."""

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.stack(super().forward(x)).mean(dim=0)

        return t.cast(nn.Module, MeanOutput(**common, features=shape.widths, deep_supervision=True))
    return t.cast(nn.Module, nets.SwinUNETR(**common, feature_size=shape.widths[0]))


@functools.lru_cache(maxsize=256)
def _find(shape: Shape) -> Found:
    return probe(functools.partial(build, shape), f"model.network={shape.network}", shape.image_size)
