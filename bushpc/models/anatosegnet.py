"""AnatoSegNet: a U-Net on a ResNet, with attention that follows the layers of the breast at its two deepest stages.

"AnatoSegNet: Anatomy Based CNN-Transformer Network for Enhanced Breast Ultrasound Image Segmentation" (ISBI 2025), with
the released network (MIT) as the source of its layers. The encoder is timm's, under timm's names.

Shape suffixes besides those of `bushpc.sample`: h, w a feature map's own height and width; N = h w its positions; n
heads, D the width of one.
"""

from __future__ import annotations

import itertools
import math
import typing as t

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError, unknown_name
from bushpc.models.one_mask import OneMask, OneMaskConfig, require_multiple
from bushpc.nn.conv import ConvPair
from bushpc.nn.encoder import feature_channels

STRIDES = [2, 4, 8, 16, 32]
# Networks of the shipped configs, listed here because importing timm takes seconds.
SHIPPED = ("resnet50.tv_in1k", "test_resnet")


@config_class
class AnatoSegNetConfig(OneMaskConfig):
    """The released network's values are the defaults."""

    image_size: int = setting(256, "Edge of the square input; a multiple of 32.", unit="pixels", ge=1)
    pretrained: bool = setting(
        True, "The encoder starts from staged ImageNet weights: `bushpc weights pull model=anatosegnet`."
    )
    encoder: str = setting("resnet50.tv_in1k", "A ResNet of timm; ResNet-50 with torchvision's weights.")
    heads: int = setting(8, "Heads of the attention.", ge=1)
    gamma: float = setting(
        1.0, "How much less a position counts per position between them, counted row by row.", ge=0, lt=math.inf
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        require_multiple(self.image_size, STRIDES[-1], "the encoder's stride")
        if self.encoder not in SHIPPED:
            import timm

            known = timm.list_models(module="resnet")
            if self.encoder.partition(".")[0] not in known:
                raise ConfigError(unknown_name("model.encoder", self.encoder, known))
        *_, fourth, fifth = feature_channels(self.encoder, STRIDES)
        if fourth % self.heads or fifth % self.heads:
            raise ConfigError(
                f"model.heads={self.heads} must divide the channels of the encoder's last stages, {fourth} and {fifth}"
            )

    @property
    def backbone(self) -> str:
        """The encoder."""
        return self.encoder

    @property
    def size_stride(self) -> int:
        """The encoder's."""
        return STRIDES[-1]

    @property
    def least_images(self) -> int:
        """2 where the deepest stage is a single pixel."""
        return 2 if self.image_size == STRIDES[-1] else 1

    def weight_files(self) -> list[WeightFile]:
        """timm's ImageNet weights of the encoder. Raises: ConfigError when there are none."""
        return [WeightFile.of_timm(self.encoder)] if self.pretrained else []

    @property
    def blocks(self) -> tuple[type, ...]:
        """The ResNet's blocks and the decoder's stages."""
        from timm.models.resnet import BasicBlock, Bottleneck

        return BasicBlock, Bottleneck, UpStage


class AnatoSegNet(OneMask):
    """AnatoSegNet; one mask class."""

    Config = AnatoSegNetConfig

    config: AnatoSegNetConfig
    net: AnatoSegNetNet

    def __init__(self, config: AnatoSegNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = AnatoSegNetNet(config)
        for file in config.weight_files():
            weights.start_features(self.net.encoder, AnatoSegNet, file, weights_dir)

    def backbone(self) -> nn.Module:
        """The ResNet."""
        return self.net.encoder

    def cam_layer(self) -> nn.Module:
        """The last decoder stage, at half the image's size."""
        return self.net.stages[-1]


class AnatoSegNetNet(nn.Module):
    """RGB to one mask's logits, B x 3 x H x W to B x 1 x H x W."""

    def __init__(self, config: AnatoSegNetConfig) -> None:
        import timm

        super().__init__()
        channels = feature_channels(config.encoder, STRIDES)
        self.encoder: t.Any = timm.create_model(config.encoder, pretrained=False, num_classes=0, global_pool="")
        self.attention = nn.ModuleList(AnatomicalAttention(c, config.heads, config.gamma) for c in channels[-2:])
        self.stages = nn.ModuleList(UpStage(below, skip) for below, skip in itertools.pairwise(reversed(channels)))
        self.full_size = nn.ConvTranspose2d(channels[0], channels[0], 2, stride=2)
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        encoder = self.encoder
        half = encoder.act1(encoder.bn1(encoder.conv1(image_BCHW)))
        quarter = encoder.layer1(encoder.maxpool(half))
        eighth = encoder.layer2(quarter)
        sixteenth = self.attention[0](encoder.layer3(eighth))
        x = self.attention[1](encoder.layer4(sixteenth))
        for stage, skip in zip(self.stages, (sixteenth, eighth, quarter, half), strict=True):
            x = stage(x, skip)
        return t.cast(torch.Tensor, self.head(self.full_size(x)))


class AnatomicalAttention(nn.Module):
    """Attention whose scores add those of the map's differences to the right and downwards; shape unchanged.

    Tissue lies in horizontal layers, so positions of one row, close to each other when counted row by row, count more:
    the scores get beta - gamma |i - j|. beta is the same for all positions, which a softmax does not see. q and k are
    linear, so those of a difference are differences of q and k, and the three products are one, of wider vectors.
    """

    def __init__(self, channels: int, heads: int, gamma: float) -> None:
        super().__init__()
        self.heads, self.gamma = heads, gamma
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[2:]
        q, k, v = self.qkv(x.permute(0, 2, 3, 1)).chunk(3, dim=-1)  # B x h x w x C each
        q, k = (torch.stack([part, *_differences(part)], dim=-1) for part in (q, k))
        position_N = torch.arange(size.numel(), device=x.device)
        bias_NN = -self.gamma * (position_N[:, None] - position_N[None]).abs().to(q.dtype)
        width = x.shape[1] // self.heads
        read_BnND = F.scaled_dot_product_attention(
            self._by_head(q), self._by_head(k), self._by_head(v[..., None]), attn_mask=bias_NN, scale=width**-0.5
        )
        return t.cast(torch.Tensor, self.proj(read_BnND.transpose(1, 2).flatten(2))).transpose(1, 2).unflatten(2, size)

    def _by_head(self, parts: torch.Tensor) -> torch.Tensor:
        """B x h x w x C x p → B x n x N x p D."""
        return parts.flatten(1, 2).unflatten(2, (self.heads, -1)).flatten(3).transpose(1, 2)


class UpStage(nn.Module):
    """Twice the size, the skip connection, two 3 x 3 convolutions."""

    def __init__(self, below: int, skip: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(below, skip, 2, stride=2)
        self.convs = ConvPair(2 * skip, skip, skip)

    def forward(self, x: torch.Tensor, skip_BCHW: torch.Tensor) -> torch.Tensor:
        """B x below x h x w, and the skip, B x skip x 2h x 2w, to the skip's shape."""
        return t.cast(torch.Tensor, self.convs(torch.cat([skip_BCHW, self.up(x)], dim=1)))


def _differences(x_BhwC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """To the right neighbour and to the one below; 0 at the last column and row."""
    right = torch.diff(x_BhwC, dim=2, append=x_BhwC[:, :, -1:])
    below = torch.diff(x_BhwC, dim=1, append=x_BhwC[:, -1:])
    return right, below
