"""EDCNN (Islam et al. 2024): Xception and MobileNet together tell the label, a U-Net segments.

    image ─┬─Xception──mean┐
           ├─MobileNet─mean┴─dropout─linear─→ benign | malignant | normal
           └─U-Net─→ mask

The publication joins the two networks' features and trains a U-Net beside them. What stands between the features and
the label, and which U-Net it is, it leaves open: here dropout and one layer, and the classic U-Net. The two parts
share no weights; their losses are added.
"""

from __future__ import annotations

import typing as t

import torch
from torch import nn

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError, unknown_name
from bushpc.losses.label import labelled_cross_entropy
from bushpc.models.classic_unet import STRIDE, ClassicNet
from bushpc.models.one_mask import OneMask, OneMaskConfig, require_multiple
from bushpc.sample import LABELS, Batch, Losses, Prediction

# Networks of the shipped configs, listed here because importing timm takes seconds.
SHIPPED = ("legacy_xception", "mobilenetv1_100", "test_efficientnet", "test_resnet")


@config_class
class EdcnnConfig(OneMaskConfig):
    """Both networks by timm's names, and the U-Net's width."""

    image_size: int = setting(256, "Edge of the square input; a multiple of 16.", unit="pixels", ge=STRIDE)
    pretrained: bool = setting(
        False,
        "Start the two networks from staged ImageNet weights. timm has none of legacy_xception on the hub: set "
        "model.xception=xception41 too, or import Keras' weights.",
    )
    xception: str = setting("legacy_xception", "The first network; the default is Chollet's.")
    mobilenet: str = setting("mobilenetv1_100", "The second network; the default is Howard et al.'s.")
    dropout: float = setting(0.2, "Share of the joined features that is dropped in training.", ge=0, lt=1)
    width: int = setting(64, "Channels of the U-Net's first level.", ge=1)

    def __post_init__(self) -> None:
        """Refuse what cannot be built. Raises: ConfigError."""
        super().__post_init__()
        for name in ("xception", "mobilenet"):
            network = getattr(self, name)
            if network not in SHIPPED:
                import timm

                if not timm.is_model(network.partition(".")[0]):
                    raise ConfigError(unknown_name(f"model.{name}", network, timm.list_models()))
        require_multiple(self.image_size, STRIDE, "the stride of the U-Net's deepest level")

    @property
    def title(self) -> str:
        """As the publication has it."""
        return "EDCNN"

    @property
    def backbone(self) -> str:
        """Xception, whose normalisation is MobileNet's too."""
        return self.xception

    @property
    def needs(self) -> frozenset[str]:
        """Image, mask and label; no sentence."""
        return frozenset({"image_BCHW", "mask_BKHW", "label_B"})

    @property
    def least_images(self) -> int:
        """2 where the deepest features are a single pixel."""
        return 2 if self.image_size <= 32 else 1

    def weight_files(self) -> list[WeightFile]:
        """Of both networks. Raises: ConfigError where timm has none."""
        return [WeightFile.of_timm(name) for name in (self.xception, self.mobilenet)] if self.pretrained else []


class Edcnn(OneMask):
    """One mask class, and one of LABELS per image."""

    Config = EdcnnConfig
    makes = frozenset({"prob_BKHW", "class_prob_BL"})

    config: EdcnnConfig

    def __init__(self, config: EdcnnConfig, weights_dir: str | None = None) -> None:
        import timm  # takes seconds to import

        super().__init__(config, weights_dir)
        names = (config.xception, config.mobilenet)
        self.net = ClassicNet(config.width)
        self.networks = nn.ModuleList(timm.create_model(name, pretrained=False, num_classes=0) for name in names)
        for network, file in zip(self.networks, config.weight_files(), strict=False):
            weights.start_features(network, type(self), file, weights_dir)
        joined = sum(_channels(network) for network in self.networks)
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(joined, len(LABELS)))

    def backbone(self) -> nn.Module:
        """Both networks."""
        return self.networks

    def cam_layer(self) -> nn.Module:
        """The U-Net's last convolutions; only a 1 x 1 convolution follows."""
        return self.net.get_submodule("joins.3")

    def forward(self, batch: Batch) -> Losses:
        """The mask's losses and the label's cross-entropy; terms "dice", "bce" and "ce"."""
        mask = self.mask_losses(self.logits(batch), batch)
        ce = labelled_cross_entropy(self._label_logits(batch), batch.label_B)
        return Losses(total=mask.total + ce, terms={**mask.terms, "ce": ce.detach()})

    def predict(self, batch: Batch) -> Prediction:
        """Mask and label. Neither `Batch.mask_BKHW` nor `Batch.label_B` is read."""
        prob_BKHW = self.logits(batch).float().sigmoid()
        return Prediction(prob_BKHW=prob_BKHW, class_prob_BL=self._label_logits(batch).float().softmax(dim=1))

    def _label_logits(self, batch: Batch) -> torch.Tensor:
        image_BCHW = self.normalize(batch.image_BCHW, self.networks)
        features_BC = torch.cat([network(image_BCHW) for network in self.networks], dim=1)
        return t.cast(torch.Tensor, self.classifier(features_BC))


def _channels(network: t.Any) -> int:
    """Of the features that a network of timm makes; some have a last convolution behind `num_features`."""
    return int(getattr(network, "head_hidden_size", network.num_features))
