"""Baselines that read no text, from well-kept libraries, under the same contract as the papers' models."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from bushpc import weights
from bushpc.config import ModelConfig, config_class
from bushpc.errors import ConfigError, unknown_name
from bushpc.losses.overlap import overlap_losses
from bushpc.models.base import Model, WeightFile
from bushpc.nn.normalize import Normalize
from bushpc.sample import Batch, Losses, Prediction

ENCODER_STRIDE = 32  # of the U-Net's deepest stage to the image


@config_class
class UNetConfig(ModelConfig):
    """The U-Net's settings.

    encoder: name of an encoder of segmentation-models-pytorch.
    decoder_channels: channels of the five decoder stages, deepest first.
    dice_weight, bce_weight: weights of the two loss terms.
    """

    encoder: str
    decoder_channels: tuple[int, ...]
    dice_weight: float
    bce_weight: float

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.encoder not in smp_encoders:
            raise ConfigError(unknown_name("encoder", self.encoder, smp_encoders))
        if self.image_size % ENCODER_STRIDE:
            raise ConfigError(
                f"image_size={self.image_size} is not a multiple of {ENCODER_STRIDE}, the encoder's stride; the "
                f"nearest that is: {max(1, round(self.image_size / ENCODER_STRIDE)) * ENCODER_STRIDE}."
            )
        if len(self.decoder_channels) != 5:
            raise ConfigError(f"decoder_channels={list(self.decoder_channels)}; five are needed, deepest first.")
        if self.dice_weight < 0 or self.bce_weight < 0 or self.dice_weight + self.bce_weight == 0:
            raise ConfigError(
                f"dice_weight={self.dice_weight}, bce_weight={self.bce_weight}; neither may be negative, "
                "and one of them must be above 0."
            )


class UNet(Model):
    """segmentation-models-pytorch's U-Net; one mask class."""

    Config = UNetConfig
    makes = frozenset({"prob_BKHW"})
    blocks = (BasicBlock, Bottleneck, UnetDecoderBlock)

    config: UNetConfig

    def __init__(self, config: UNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.net = smp.Unet(
            config.encoder,
            encoder_weights=None,
            decoder_channels=tuple(config.decoder_channels),
            classes=1,
        )
        for file in self.weight_files(config):
            self.net.encoder.load_state_dict(weights.load_staged(UNet, file, weights_dir))

    @classmethod
    def needs(cls, config: ModelConfig) -> frozenset[str]:
        """Image and mask; no sentence."""
        return frozenset({"image_BCHW", "mask_BKHW"})

    @classmethod
    def weight_files(cls, config: ModelConfig) -> list[WeightFile]:
        """The encoder's ImageNet weights. Raises: ConfigError when the library has none."""
        assert isinstance(config, UNetConfig)
        if not config.pretrained:
            return []
        settings = smp_encoders[config.encoder]["pretrained_settings"]
        if "imagenet" not in settings:
            raise ConfigError(f"encoder '{config.encoder}' has no ImageNet weights; set pretrained=false.")
        imagenet = settings["imagenet"]
        return [
            WeightFile(
                name=f"smp_{config.encoder}_imagenet.safetensors",
                hub_repo=imagenet["repo_id"],
                hub_file="model.safetensors",
                revision=imagenet["revision"],
            )
        ]

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
