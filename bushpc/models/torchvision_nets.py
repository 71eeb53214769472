"""torchvision's networks for segmentation: FCN (Long et al. 2015) and DeepLabV3 (Chen et al. 2017) on ResNets.

FCN's publication has a VGG16; torchvision's has a dilated ResNet, and no skips. Their second, auxiliary head is left
out.
"""

from __future__ import annotations

import functools
import typing as t

import torch
from torch import nn

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.models.one_mask import OneMask, OneMaskConfig
from bushpc.nn.probe import Found, probe


@config_class
class TorchvisionConfig(OneMaskConfig):
    """A head of torchvision on its dilated ResNet. The image may have any size."""

    pretrained: bool = setting(
        True,
        "The ResNet starts from torchvision's ImageNet weights, as timm keeps them: `bushpc weights pull "
        "model=fcn` or `model=deeplabv3`.",
    )
    network: t.Literal["fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"] = setting(
        "fcn_resnet50", "The network, by the library's name."
    )

    def __post_init__(self) -> None:
        """Refuse images that the network cannot take. Raises: ConfigError."""
        super().__post_init__()
        _find(self.network, self.image_size)

    @property
    def title(self) -> str:
        """The network's name."""
        return self.network

    @property
    def backbone(self) -> str:
        """The ResNet, by timm's name of torchvision's weights."""
        return f"{self.network.partition('_')[2]}.tv_in1k"

    @property
    def size_stride(self) -> int:
        """The mask is enlarged to the image's size, whatever that is."""
        return 1

    @property
    def least_images(self) -> int:
        """2 where a BatchNorm has one value per channel of a single image, as in DeepLabV3's pooled features."""
        return _find(self.network, self.image_size).least_images

    @property
    def blocks(self) -> tuple[type, ...]:
        """The ResNet's."""
        from torchvision.models.resnet import Bottleneck

        return (Bottleneck,)

    def weight_files(self) -> list[WeightFile]:
        """The ResNet's."""
        return [WeightFile.of_timm(self.backbone)] if self.pretrained else []


class Torchvision(OneMask):
    """A network of torchvision; one mask class."""

    Config = TorchvisionConfig

    config: TorchvisionConfig

    def __init__(self, config: TorchvisionConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = build(config.network)
        for file in config.weight_files():
            weights.start_features(self.backbone(), type(self), file, weights_dir)

    def backbone(self) -> nn.Module:
        """The ResNet."""
        return self.net.get_submodule("net.backbone")

    def cam_layer(self) -> nn.Module:
        """What the head reads before its last layer."""
        head = self.net.get_submodule("net.classifier")
        return list(head.children())[-2]


class MaskOnly(nn.Module):
    """torchvision's networks return a dict; this returns its mask."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Logits B x 1 x H x W."""
        logits: torch.Tensor = self.net(image_BCHW)["out"]
        return logits


def build(network: str) -> nn.Module:
    """The library's network: RGB in, one mask's logits out."""
    from torchvision.models import segmentation  # takes seconds to import

    return MaskOnly(getattr(segmentation, network)(weights=None, weights_backbone=None, num_classes=1, aux_loss=False))


@functools.lru_cache(maxsize=64)
def _find(network: str, image_size: int) -> Found:
    return probe(functools.partial(build, network), f"model.network={network}", image_size)
