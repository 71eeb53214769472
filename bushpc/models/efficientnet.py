"""EfficientNet classifier of the scan's label, used to judge synthetic images.

Pan et al., "Clinical Prior-Guided Tumor Generation for Breast Ultrasound with Cross Domain Adaptation", section 3.4, on
Tan and Le's EfficientNet-B0 (ICML 2019), from timm. It makes no mask.
"""

from __future__ import annotations

import typing as t

import torch
from torch import nn

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError, unknown_name
from bushpc.losses.label import labelled_cross_entropy
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.sample import LABELS, Batch, Losses, Prediction

# Networks of the shipped configs, listed here because importing timm takes seconds.
SHIPPED = ("efficientnet_b0", "test_efficientnet")


STRIDE = 32  # of the deepest stage to the image


@config_class
class EfficientNetConfig(BackboneConfig):
    """EfficientNet-B0. The paper (Pan et al., 3.4) names the network and nothing else."""

    image_size: int = setting(
        224,
        "Edge of the square input: what the network's ImageNet weights were trained at. 32 is the network's stride.",
        unit="pixels",
        ge=STRIDE,
    )
    pretrained: bool = setting(
        True,
        "Start from staged ImageNet weights, all but the last layer: `bushpc weights pull model=efficientnet`.",
    )
    network: str = setting(
        "efficientnet_b0", "An EfficientNet of timm, without the dropout that ImageNet's training used."
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.network not in SHIPPED:
            import timm

            known = timm.list_models("*efficientnet*", module="efficientnet")
            if self.network.partition(".")[0] not in known:
                raise ConfigError(unknown_name("model.network", self.network, known))

    @property
    def backbone(self) -> str:
        """timm's network."""
        return self.network

    @property
    def needs(self) -> frozenset[str]:
        """Image and label; no mask, no sentence."""
        return frozenset({"image_BCHW", "label_B"})

    def check_data(self, mask_classes: t.Sequence[str], channels: t.Sequence[str]) -> None:
        """Refuse images that have not three channels. Raises: ConfigError."""
        if len(channels) != 3:
            raise ConfigError(
                f"{self.title} reads images of three channels; this dataset has {', '.join(channels)}. Choose "
                "another dataset or model"
            )

    @property
    def least_images(self) -> int:
        """2 where the deepest stage is a single pixel."""
        return 2 if self.image_size <= STRIDE else 1

    def weight_files(self) -> list[WeightFile]:
        """timm's ImageNet weights of the network. Raises: ConfigError when there are none."""
        return [WeightFile.of_timm(self.network)] if self.pretrained else []

    @property
    def blocks(self) -> tuple[type, ...]:
        """timm's blocks."""
        from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual

        return DepthwiseSeparableConv, InvertedResidual


class EfficientNet(Model):
    """Predicts one of LABELS per image. It learns not to predict a label without training scans, such as normal.

    A dataset's mask classes do not matter to it.
    """

    Config = EfficientNetConfig
    makes = frozenset({"class_prob_BL"})

    config: EfficientNetConfig

    def __init__(self, config: EfficientNetConfig, weights_dir: str | None = None) -> None:
        import timm  # takes seconds to import

        super().__init__(config, weights_dir)
        self.normalize = config.normalize()
        self.net: nn.Module = timm.create_model(config.network, pretrained=False, num_classes=len(LABELS))
        for file in config.weight_files():
            staged = weights.load_staged(EfficientNet, file, weights_dir)
            own = {name: value for name, value in self.net.state_dict().items() if name.startswith("classifier.")}
            with weights.fits(EfficientNet, file):
                self.net.load_state_dict(staged | own)  # ImageNet's classifier has other labels

    def backbone(self) -> nn.Module:
        """All of timm's network, its classifier included."""
        return self.net

    def cam_layer(self) -> nn.Module:
        """The last features, whose mean the label follows from."""
        return t.cast(nn.Module, self.net.bn2)

    def forward(self, batch: Batch) -> Losses:
        """Cross-entropy over the scans that have a label; term "ce"."""
        ce = labelled_cross_entropy(self._logits(batch), batch.label_B)
        return Losses(total=ce, terms={"ce": ce.detach()})

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities of the labels in one pass. `Batch.label_B` is not read."""
        return Prediction(class_prob_BL=self._logits(batch).float().softmax(dim=1))

    def _logits(self, batch: Batch) -> torch.Tensor:
        logits_BL: torch.Tensor = self.net(self.normalize(batch.image_BCHW, self.net))
        return logits_BL
