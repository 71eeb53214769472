"""Mask R-CNN (He et al. 2017), torchvision's on a ResNet with a feature pyramid: lesions are found one by one.

In training each connected part of a mask is an object. A pixel's probability is the highest over the objects found
there, of an object the lower one of its score and its mask: so a threshold holds for both.
"""

from __future__ import annotations

import contextlib
import typing as t
from collections.abc import Iterator

import torch
from torch import nn

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from bushpc.sample import Batch, Losses, Prediction

LESION = 1  # its class; 0 is the background


@config_class
class MaskRcnnConfig(BackboneConfig):
    """torchvision's values, but for the classes and the image, which keeps its size."""

    image_size: int = setting(256, "Edge of the square input.", unit="pixels", ge=32)
    pretrained: bool = setting(
        True,
        "The ResNet starts from torchvision's ImageNet weights, as timm keeps them: `bushpc weights pull "
        "model=mask_rcnn`.",
    )
    network: t.Literal["resnet18", "resnet34", "resnet50", "resnet101"] = setting("resnet50", "The ResNet.")

    @property
    def title(self) -> str:
        """As the publication has it."""
        return "Mask R-CNN"

    @property
    def backbone(self) -> str:
        """The ResNet, by timm's name of torchvision's weights."""
        return f"{self.network}.tv_in1k"

    @property
    def least_images(self) -> int:
        """2 where the deepest features are a single pixel."""
        return 2 if self.image_size <= 32 else 1

    def weight_files(self) -> list[WeightFile]:
        """The ResNet's."""
        return [WeightFile.of_timm(self.backbone)] if self.pretrained else []


class MaskRcnn(Model):
    """Objects with masks; one mask class."""

    Config = MaskRcnnConfig
    makes = frozenset({"prob_BKHW"})

    config: MaskRcnnConfig

    def __init__(self, config: MaskRcnnConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = build(config)
        for file in config.weight_files():
            weights.start_features(self.backbone(), type(self), file, weights_dir)

    def backbone(self) -> nn.Module:
        """The ResNet."""
        return self.net.get_submodule("backbone.body")

    def cam_layer(self) -> nn.Module:
        """The ResNet's deepest stage."""
        return self.net.get_submodule("backbone.body.layer4")

    def forward(self, batch: Batch) -> Losses:
        """The sum of the library's losses: of proposals ("objectness", "rpn_box_reg"), classes, boxes and masks."""
        targets = [_objects(mask_KHW[0]) for mask_KHW in batch.mask_BKHW]
        with _as_in_training(self.net), torch.autocast(batch.image_BCHW.device.type, enabled=False):
            terms: dict[str, torch.Tensor] = self.net(list(batch.image_BCHW.float()), targets)
        named = {name.removeprefix("loss_"): value for name, value in terms.items()}
        return Losses(
            total=torch.stack(list(named.values())).sum(),
            terms={name: value.detach() for name, value in named.items()},
        )

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities. `Batch.mask_BKHW` is not read."""
        with torch.autocast(batch.image_BCHW.device.type, enabled=False):
            found = self.net(list(batch.image_BCHW.float()))
        empty_1HW = batch.image_BCHW.new_zeros((1, *batch.image_BCHW.shape[-2:]), dtype=torch.float32)
        maps = []
        for objects in found:
            prob_N1HW = torch.minimum(objects["masks"], objects["scores"][:, None, None, None])
            maps.append(torch.cat([empty_1HW[None], prob_N1HW]).amax(dim=0))
        return Prediction(prob_BKHW=torch.stack(maps))


def build(config: MaskRcnnConfig) -> nn.Module:
    """The library's network: images in a list in, losses or objects out."""
    from torchvision.models.detection import MaskRCNN  # takes seconds to import
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(
        backbone_name=config.network, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    size = config.image_size
    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    return MaskRCNN(backbone, num_classes=2, min_size=size, max_size=size, image_mean=mean, image_std=std)


@contextlib.contextmanager
def _as_in_training(net: nn.Module) -> Iterator[None]:
    """The library gives losses in training alone. Held-out samples leave the running statistics as they are."""
    if net.training:
        yield
        return
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    try:
        yield
    finally:
        net.eval()


def _objects(mask_HW: torch.Tensor) -> dict[str, torch.Tensor]:
    """The connected parts of a mask as the library wants them; none of an empty mask."""
    from scipy import ndimage

    parts_HW, count = ndimage.label(mask_HW.cpu().numpy() > 0)  # type: ignore[misc]
    found = ndimage.find_objects(parts_HW)
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in found]
    device = mask_HW.device
    masks = torch.stack([torch.from_numpy(parts_HW == i + 1) for i in range(count)]) if count else mask_HW[None][:0]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4),
        "labels": torch.full((count,), LESION, dtype=torch.int64, device=device),
        "masks": masks.to(device=device, dtype=torch.uint8),
    }
