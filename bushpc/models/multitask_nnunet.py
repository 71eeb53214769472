"""Mask and label from one network like nnU-Net's, with deep supervision and a head on its deepest levels.

Aumente-Maestro, Díez and Remeseiro, "A multi-task framework for breast cancer segmentation and classification in
ultrasound imaging" (Computer Methods and Programs in Biomedicine 2025), with nnU-Net as backbone.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from bushpc.config import config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.label import focal_loss
from bushpc.losses.overlap import soft_dice_loss
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.models.one_mask import require_multiple
from bushpc.sample import LABELS, Batch, Losses, Prediction

LEVELS = 5
STRIDE = 1 << LEVELS  # of the bottleneck to the image
MASKS = 4  # made in training, at the image's size, from the decoder's last four levels


@config_class
class MultitaskNnUNetConfig(BackboneConfig):
    """The values of the authors' released configuration are the defaults."""

    image_size: int = setting(128, "Edge of the square input; a multiple of 32, 64 or more.", unit="pixels", ge=1)
    pretrained: bool = setting(False, "The network is trained from scratch.")
    widths: tuple[int, ...] = setting((32, 64, 128, 256, 320), "Channels of the five levels; the bottleneck's: last.")
    classifier_widths: tuple[int, ...] = setting((512, 256), "Channels of the head's convolution and hidden layer.")
    alpha: float = setting(0.35, "Weight of the masks' losses; 1 - alpha is that of the label's.", ge=0, le=1)
    focal_gamma: float = setting(2.0, "Exponent of the label's focal loss.", ge=1, lt=math.inf)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.pretrained:
            raise ConfigError("model.pretrained=true: the network is trained from scratch; set model.pretrained=false")
        if len(self.widths) != LEVELS or min(self.widths) < 2:
            raise ConfigError(f"model.widths={list(self.widths)}: {LEVELS} numbers above 1 are needed")
        if len(self.classifier_widths) != 2 or min(self.classifier_widths) < 1:
            raise ConfigError(f"model.classifier_widths={list(self.classifier_widths)}: two numbers above 0 are needed")
        require_multiple(self.image_size, STRIDE, "the bottleneck's stride")
        if self.image_size == STRIDE:
            raise ConfigError(
                f"model.image_size={self.image_size}: InstanceNorm has nothing to normalise over in a bottleneck of "
                f"one pixel; it must be {2 * STRIDE} or more"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Image, mask and label; no sentence."""
        return frozenset({"image_BCHW", "mask_BKHW", "label_B"})

    @property
    def backbone(self) -> None:
        """There is none."""
        return None

    @property
    def size_stride(self) -> int:
        """The bottleneck's."""
        return STRIDE

    @property
    def blocks(self) -> tuple[type, ...]:
        """Levels."""
        return (Level,)


class MultitaskNnUNet(Model):
    """One mask class, and one of LABELS per image. Scans without a label train the mask alone."""

    Config = MultitaskNnUNetConfig
    makes = frozenset({"prob_BKHW", "class_prob_BL"})

    config: MultitaskNnUNetConfig

    def __init__(self, config: MultitaskNnUNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = config.normalize()
        self.net = MultitaskNet(config)

    def cam_layer(self) -> nn.Module:
        """The last decoder level."""
        return self.net.decoder[-1]

    def forward(self, batch: Batch) -> Losses:
        """alpha · Dice of four masks at weights 1, 1/2, 1/3, 1/4, + (1 - alpha) · focal loss; terms "dice", "focal"."""
        logits, label_logits_BL = self.net(self.normalize(batch.image_BCHW, self.net))
        dice = [soft_dice_loss(logits_BKHW, batch.mask_BKHW) for logits_BKHW in logits]
        focal = focal_loss(label_logits_BL, batch.label_B, self.config.focal_gamma)
        masks = torch.stack([loss / (i + 1) for i, loss in enumerate(dice)]).sum()
        alpha = self.config.alpha
        return Losses(
            total=alpha * masks + (1 - alpha) * focal, terms={"dice": dice[0].detach(), "focal": focal.detach()}
        )

    def predict(self, batch: Batch) -> Prediction:
        """Mask and label in one pass. Neither `Batch.mask_BKHW` nor `Batch.label_B` is read."""
        logits, label_logits_BL = self.net(self.normalize(batch.image_BCHW, self.net))
        return Prediction(prob_BKHW=logits[0].float().sigmoid(), class_prob_BL=label_logits_BL.float().softmax(dim=1))


class MultitaskNet(nn.Module):
    """RGB to the logits of masks, B x 1 x H x W each, the finest first, and of the label, B x L.

    In training four masks, from decoder levels at 1, 1/2, 1/4 and 1/8 of the image's edge; else the first alone.
    """

    def __init__(self, config: MultitaskNnUNetConfig) -> None:
        super().__init__()
        widths, deepest = config.widths, config.widths[-1]
        made = [widths[0] // 2, *widths[:-1]]  # by the decoder, the finest first
        self.encoder = nn.ModuleList(Level(given, width, width) for given, width in itertools.pairwise((3, *widths)))
        self.bottleneck = Level(deepest, deepest, deepest)
        self.up = nn.ModuleList(nn.ConvTranspose2d(width, width, 2, stride=2) for width in reversed(widths))
        self.decoder = nn.ModuleList(
            Level(2 * width, max(widths[0], out), out)
            for width, out in zip(reversed(widths), reversed(made), strict=True)
        )
        self.masks = nn.ModuleList(MaskHead(made[i], 1 << i) for i in range(MASKS))
        self.from_encoder, self.from_decoder = norm_conv(deepest, deepest), norm_conv(widths[-2], deepest)
        features, hidden = config.classifier_widths
        self.classifier = nn.Sequential(
            *(norm_conv(3 * deepest, features), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, len(LABELS))),
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, image_BCHW: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        x, skips = image_BCHW, []
        for level in self.encoder:
            skips.append(level(x))
            x = self.pool(skips[-1])
        x, label_parts = self.bottleneck(x), [self.from_encoder(skips[-1])]
        maps: list[torch.Tensor] = []
        for up, level in zip(self.up, self.decoder, strict=True):
            x = up(x)
            if not maps:
                label_parts.append(x)
            x = level(torch.cat([skips.pop(), x], dim=1))
            maps.append(x)
        label_logits_BL = self.classifier(torch.cat([*label_parts, self.from_decoder(maps[0])], dim=1))
        finest = maps[::-1][: MASKS if self.training else 1]
        return [head(each) for head, each in zip(self.masks, finest, strict=False)], label_logits_BL


class Level(nn.Sequential):
    """Two convolutions; the size stays."""

    def __init__(self, given: int, between: int, made: int) -> None:
        super().__init__(norm_conv(given, between), norm_conv(between, made))


class MaskHead(nn.Sequential):
    """Logits at the image's size from a map that is `scale` times smaller."""

    def __init__(self, width: int, scale: int) -> None:
        enlarge = [nn.ConvTranspose2d(width, width, scale, stride=scale)] if scale > 1 else []
        super().__init__(*enlarge, nn.Conv2d(width, 1, 1))


def norm_conv(given: int, made: int) -> nn.Sequential:
    """3 x 3 convolution, InstanceNorm, leaky ReLU; the size stays."""
    conv = nn.Conv2d(given, made, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="leaky_relu")
    return nn.Sequential(conv, nn.InstanceNorm2d(made), nn.LeakyReLU(inplace=True))
