"""EfficientNet that tells labels apart: the classifier by which synthetic images are judged.

Pan et al., "Clinical Prior-Guided Tumor Generation for Breast Ultrasound with Cross Domain Adaptation", section 3.4, on
Tan and Le's EfficientNet-B0 (ICML 2019), from timm. It makes no mask.
"""

from __future__ import annotations

import typing as t

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import nn

from bushpc import weights
from bushpc.config import ModelConfig, config_class
from bushpc.errors import ConfigError, unknown_name
from bushpc.losses.label import labelled_cross_entropy
from bushpc.models.base import Model, WeightFile
from bushpc.nn.normalize import Normalize
from bushpc.sample import LABELS, Batch, Losses, Prediction

STRIDE = 32  # of the last features to the image


@config_class
class EfficientNetConfig(ModelConfig):
    """The classifier's settings.

    network: its name in timm, one of the EfficientNets.
    """

    network: str

    def __post_init__(self) -> None:
        """Refuse what cannot be built. Raises: ConfigError."""
        super().__post_init__()
        known = timm.list_models("*efficientnet*", module="efficientnet")
        if self.network.partition(".")[0] not in known:
            raise ConfigError(unknown_name("model.network", self.network, known))
        if self.image_size < STRIDE:
            raise ConfigError(f"model.image_size={self.image_size}: allowed is {STRIDE}, the network's stride, or more")


class EfficientNet(Model):
    """One label an image, of LABELS. Where no scan of a label trains, as without normal scans, it learns to give none.

    A dataset's mask classes do not matter to it.
    """

    Config = EfficientNetConfig
    makes = frozenset({"class_prob_BL"})
    blocks = (DepthwiseSeparableConv, InvertedResidual)

    config: EfficientNetConfig

    def __init__(self, config: EfficientNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.net: nn.Module = timm.create_model(config.network, pretrained=False, num_classes=len(LABELS))
        for file in self.weight_files(config):
            staged = weights.load_staged(EfficientNet, file, weights_dir)
            own = {name: value for name, value in self.net.state_dict().items() if name.startswith("classifier.")}
            self.net.load_state_dict(staged | own)  # ImageNet's thousand labels are none of ours

    @classmethod
    def needs(cls, config: ModelConfig) -> frozenset[str]:
        """Image and label; no mask, no sentence."""
        return frozenset({"image_BCHW", "label_B"})

    @classmethod
    def check_data(cls, config: ModelConfig, mask_classes: t.Sequence[str], channels: t.Sequence[str]) -> None:
        """Refuse images that have not three channels. Raises: ConfigError."""
        if len(channels) != 3:
            raise ConfigError(
                f"{cls.__name__} reads images of three channels; this dataset has {', '.join(channels)}. Choose "
                "another dataset or model"
            )

    @classmethod
    def weight_files(cls, config: ModelConfig) -> list[WeightFile]:
        """timm's ImageNet weights of the network. Raises: ConfigError when there are none."""
        assert isinstance(config, EfficientNetConfig)
        return [WeightFile.of_timm(config.network)] if config.pretrained else []

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
