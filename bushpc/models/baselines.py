"""Baselines that read no text, from well-kept libraries, under the same contract as the papers' models."""

from __future__ import annotations

import typing as t

from bushpc.config import config_class, setting
from bushpc.models.smp import WIDTHS, Smp, SmpConfig


@config_class
class UNetConfig(SmpConfig):
    """segmentation-models-pytorch's U-Net at XBusNet's image size and budget.

    It stands in for the "UNet" row of XBusNet's Table 1, whose encoder and weights the paper does not give.
    """

    image_size: int = setting(
        352,
        "Edge of the square input, as for XBusNet (2.2: the same pre-processing for all models).",
        unit="pixels",
        ge=1,
    )
    pretrained: bool = setting(
        True,
        "The encoder starts from staged ImageNet weights, as XBusNet's does: `bushpc weights pull model=unet`.",
    )
    architecture: t.Literal["Unet"] = setting("Unet", "model=smp has the library's other networks.", since=3)
    encoder: str = setting(
        "resnet34",
        "An encoder of segmentation-models-pytorch, or `tu-` and a network of timm, see model=smp; resnet34 is the "
        "library's own default.",
    )
    encoder_depth: int | None = setting(
        None, "How many of the encoder's stages are used; null is all 5. Each halves the resolution.", ge=1, since=3
    )
    decoder_channels: tuple[int, ...] | None = setting(
        WIDTHS, "Channels of the decoder's stages, deepest first; the library's default."
    )
    patch_size: int | None = setting(None, "Of ViTs, which a U-Net cannot take.", unit="pixels", ge=1, since=3)
    dice_weight: float = setting(
        1.0,
        "Weight of the soft Dice loss. The paper does not say what its U-Net was trained with; this is usual.",
        ge=0,
        lt=float("inf"),
    )
    bce_weight: float = setting(1.0, "Weight of the cross-entropy loss; see dice_weight.", ge=0, lt=float("inf"))

    @property
    def title(self) -> str:
        """As its class."""
        return "UNet"


class UNet(Smp):
    """segmentation-models-pytorch's U-Net; one mask class."""

    Config = UNetConfig
