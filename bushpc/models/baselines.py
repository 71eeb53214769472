"""Baselines that read no text, from well-kept libraries, under the same contract as the papers' models."""

from __future__ import annotations

import math

import torch
from torch import nn

from bushpc import weights
from bushpc.config import ModelConfig, WeightFile, config_class, setting
from bushpc.errors import ConfigError, unknown_name
from bushpc.losses.overlap import overlap_losses
from bushpc.models.base import Model
from bushpc.nn.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from bushpc.sample import Batch, Losses, Prediction

ENCODER_STRIDE = 32  # of the U-Net's deepest stage to the image
# Encoders of the shipped configs, listed here because importing the library takes seconds.
SHIPPED = ("resnet18", "resnet34")


@config_class
class UNetConfig(ModelConfig):
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
    encoder: str = setting(
        "resnet34", "An encoder of segmentation-models-pytorch; resnet34 is the library's own default."
    )
    decoder_channels: tuple[int, ...] = setting(
        (256, 128, 64, 32, 16), "Channels of the five decoder stages, deepest first; the library's default."
    )
    dice_weight: float = setting(
        1.0,
        "Weight of the soft Dice loss. The paper does not say what its U-Net was trained with; this is usual.",
        ge=0,
        lt=math.inf,
    )
    bce_weight: float = setting(1.0, "Weight of the cross-entropy loss; see dice_weight.", ge=0, lt=math.inf)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.encoder not in SHIPPED:
            from segmentation_models_pytorch.encoders import encoders

            if self.encoder not in encoders:
                raise ConfigError(unknown_name("encoder", self.encoder, encoders))
        if self.image_size % ENCODER_STRIDE:
            raise ConfigError(
                f"image_size={self.image_size} is not a multiple of {ENCODER_STRIDE}, the encoder's stride; the "
                f"nearest is {max(1, round(self.image_size / ENCODER_STRIDE)) * ENCODER_STRIDE}."
            )
        if len(self.decoder_channels) != 5:
            raise ConfigError(f"decoder_channels={list(self.decoder_channels)}; five are needed, deepest first.")
        if self.dice_weight + self.bce_weight == 0:
            raise ConfigError("model.dice_weight=0 and model.bce_weight=0 leave no loss: set one of them above 0")

    @property
    def least_images(self) -> int:
        """2 where the encoder's deepest stage is a single pixel."""
        return 2 if self.image_size == ENCODER_STRIDE else 1

    def weight_files(self) -> list[WeightFile]:
        """The encoder's ImageNet weights. Raises: ConfigError when the library has none."""
        if not self.pretrained:
            return []
        from segmentation_models_pytorch.encoders import encoders

        settings = encoders[self.encoder]["pretrained_settings"]
        if "imagenet" not in settings:
            raise ConfigError(f"encoder '{self.encoder}' has no ImageNet weights; set pretrained=false.")
        imagenet = settings["imagenet"]
        return [
            WeightFile(
                name=f"smp_{self.encoder}_imagenet.safetensors",
                hub_repo=imagenet["repo_id"],
                hub_file="model.safetensors",
                revision=imagenet["revision"],
            )
        ]

    @property
    def blocks(self) -> tuple[type, ...]:
        """The encoder's residual blocks and the decoder's."""
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
        from torchvision.models.resnet import BasicBlock, Bottleneck

        return BasicBlock, Bottleneck, UnetDecoderBlock


class UNet(Model):
    """segmentation-models-pytorch's U-Net; one mask class."""

    Config = UNetConfig
    makes = frozenset({"prob_BKHW"})

    config: UNetConfig

    def __init__(self, config: UNetConfig, weights_dir: str | None = None) -> None:
        import segmentation_models_pytorch as smp  # takes seconds to import

        super().__init__(config, weights_dir)
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.net = smp.Unet(
            config.encoder,
            encoder_weights=None,
            decoder_channels=tuple(config.decoder_channels),
            classes=1,
        )
        for file in config.weight_files():
            self.net.encoder.load_state_dict(weights.load_staged(UNet, file, weights_dir))

    def cam_layer(self) -> nn.Module:
        """The decoder's last block, at the image's size."""
        return self.net.decoder.blocks[-1]

    def forward(self, batch: Batch) -> Losses:
        """Soft Dice and cross-entropy of the logits, weighted; terms "dice" and "bce"."""
        return overlap_losses(
            self._logits(batch),
            batch.mask_BKHW,
            dice_weight=self.config.dice_weight,
            bce_weight=self.config.bce_weight,
        )

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities in one pass. `Batch.mask_BKHW` is not read."""
        return Prediction(prob_BKHW=self._logits(batch).float().sigmoid())

    def _logits(self, batch: Batch) -> torch.Tensor:
        logits_BKHW: torch.Tensor = self.net(self.normalize(batch.image_BCHW, self.net))
        return logits_BKHW
