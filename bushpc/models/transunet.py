"""TransUNet: a ResNet, a ViT on its last feature map, and a decoder that reads the ResNet's earlier maps.

Chen et al., "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation" (2021), with the hybrid
encoder R50-ViT-B/16. Both halves of the encoder are timm's, under timm's names.

    image ─stem─┬─stage 1─┬─stage 2─┬─stage 3─ 1 x 1 convolution, positions ─ViT─ conv
                │         │         └────────────────────────── up, 2 convs ──┘
                │         └──────────────────────────────────── up, 2 convs
                └────────────────────────────────────────────── up, 2 convs, up, 2 convs, conv → logits
"""

from __future__ import annotations

import functools
import itertools
import typing as t

import torch
from torch import nn

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.one_mask import OneMask, OneMaskConfig, require_multiple
from bushpc.nn.conv import ConvPair, conv_bn_relu
from bushpc.nn.pretrained import HALF

R50_VIT_B16 = "vit_base_r50_s16_224.orig_in21k"  # timm's copy of the weights that the authors start from
STRIDE = 16  # of the ViT's grid to the image
STEM = 64  # channels
GROUPS = 32  # of the ResNet's GroupNorms, which are in timm's weights


@config_class
class TransUNetConfig(OneMaskConfig):
    """The paper's values are the defaults. Losses are Dice and cross-entropy at equal weight, as the authors'."""

    usual = HALF  # of the ViT

    image_size: int = setting(
        224, "Edge of the square input; a multiple of 16. Positions are learned for it.", unit="pixels", ge=1
    )
    pretrained: bool = setting(
        True,
        "ResNet and ViT start from staged ImageNet-21k weights: `bushpc weights pull model=transunet`.",
    )
    layers: tuple[int, ...] = setting((3, 4, 9), "Blocks of the ResNet's three stages: ResNet-50's without its last.")
    resnet_channels: tuple[int, ...] = setting(
        (256, 512, 1024), "Channels of the three stages, at 1/4, 1/8 and 1/16; multiples of 128."
    )
    width: int = setting(768, "Width of the ViT's tokens: ViT-B's.", ge=1)
    depth: int = setting(12, "Blocks of the ViT.", ge=1)
    heads: int = setting(12, "Heads of each.", ge=1)
    dropout: float = setting(
        0.1, "Share dropped of embeddings and of what a block adds; the authors' configuration.", ge=0, lt=1
    )
    decoder_channels: tuple[int, ...] = setting(
        (512, 256, 128, 64, 16),
        "Channels of the convolution behind the ViT and of the four stages, deepest first. The paper does not give "
        "them; these are the authors'.",
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        require_multiple(self.image_size, STRIDE, "the stride of the ViT's grid")
        if len(self.layers) != 3 or min(self.layers) < 1:
            raise ConfigError(f"model.layers={list(self.layers)}: three numbers above 0 are needed, one per stage")
        least = 4 * GROUPS
        if len(self.resnet_channels) != 3 or any(c < least or c % least for c in self.resnet_channels):
            raise ConfigError(f"model.resnet_channels={list(self.resnet_channels)}: three multiples of {least}")
        if self.width % self.heads:
            raise ConfigError(f"model.heads={self.heads} must divide model.width={self.width}")
        if len(self.decoder_channels) != 5 or min(self.decoder_channels) < 1:
            raise ConfigError(
                f"model.decoder_channels={list(self.decoder_channels)}: five numbers above 0 are needed, of the "
                "convolution behind the ViT and of four stages"
            )
        if self.pretrained and self.encoder != TransUNetConfig(pretrained=False).encoder:
            raise ConfigError(
                "model.pretrained=true: the weights are those of R50-ViT-B/16; leave model.layers, "
                "model.resnet_channels, model.width, model.depth and model.heads at their defaults, or set "
                "model.pretrained=false"
            )

    @property
    def encoder(self) -> tuple[t.Any, ...]:
        """What the shapes of the encoder's tensors follow from, besides the image."""
        return self.layers, self.resnet_channels, self.width, self.depth, self.heads

    @property
    def backbone(self) -> str:
        """As timm names it."""
        return R50_VIT_B16

    @property
    def least_images(self) -> int:
        """2 where the ViT has one token, whose convolution is normalised over the batch."""
        return 2 if self.image_size == STRIDE else 1

    def weight_files(self) -> list[WeightFile]:
        """timm's copy of Google's weights."""
        return [WeightFile.of_timm(R50_VIT_B16)] if self.pretrained else []

    @property
    def blocks(self) -> tuple[type, ...]:
        """Blocks of ResNet and ViT, and the decoder's stages."""
        from timm.models.resnetv2 import Bottleneck
        from timm.models.vision_transformer import Block

        return Bottleneck, Block, UpStage


class TransUNet(OneMask):
    """TransUNet; one mask class."""

    Config = TransUNetConfig

    config: TransUNetConfig
    net: TransUNetNet

    def __init__(self, config: TransUNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = TransUNetNet(config)
        for file in config.weight_files():
            self._load_encoder(weights.load_staged(TransUNet, file, weights_dir), file)

    def backbone(self) -> nn.Module:
        """ResNet and ViT."""
        return self.net.encoder

    def cam_layer(self) -> nn.Module:
        """The last decoder stage."""
        return self.net.stages[-1]

    def _load_encoder(self, state: dict[str, torch.Tensor], file: WeightFile) -> None:
        """timm's tensors without the class token and its position, which a segmentation does not need."""
        from timm.models.vision_transformer import checkpoint_filter_fn

        encoder = self.net.encoder
        state = {name: value for name, value in state.items() if not name.startswith(("head.", "cls_token"))}
        with weights.fits(TransUNet, file):
            state["pos_embed"] = state["pos_embed"][:, 1:]
            encoder.load_state_dict(checkpoint_filter_fn(state, t.cast(t.Any, encoder)))


class TransUNetNet(nn.Module):
    """RGB to one mask's logits, B x 3 x H x W to B x 1 x H x W."""

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config)
        first, *widths = config.decoder_channels
        self.from_tokens = nn.Sequential(*conv_bn_relu(config.width, first, bias=False))
        skips = [config.resnet_channels[1], config.resnet_channels[0], STEM, 0]
        self.stages = nn.ModuleList(
            UpStage(before + skip, width)
            for (before, width), skip in zip(itertools.pairwise([first, *widths]), skips, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        encoder = self.encoder
        resnet = encoder.patch_embed.backbone
        half_BCHW = resnet.stem.norm(resnet.stem.conv(image_BCHW))
        quarter_BCHW = resnet.stages[0](resnet.stem.pool(half_BCHW))
        eighth_BCHW = resnet.stages[1](quarter_BCHW)
        z_BDhw = encoder.patch_embed.proj(resnet.stages[2](eighth_BCHW))
        size = z_BDhw.shape[2:]
        z_BND = encoder.pos_drop(z_BDhw.flatten(2).transpose(1, 2) + encoder.pos_embed)
        z_BND = encoder.norm(encoder.blocks(z_BND))
        x = self.from_tokens(z_BND.transpose(1, 2).unflatten(2, size))
        for stage, skip in zip(self.stages, (eighth_BCHW, quarter_BCHW, half_BCHW, None), strict=True):
            x = stage(x, skip)
        return t.cast(torch.Tensor, self.head(x))


class UpStage(nn.Module):
    """One step of the cascaded upsampler: twice the size, the skip connection, two 3 x 3 convolutions."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.UpsamplingBilinear2d(scale_factor=2)
        self.convs = ConvPair(channels, out_channels, out_channels, bias=False)

    def forward(self, x: torch.Tensor, skip_BCHW: torch.Tensor | None) -> torch.Tensor:
        """B x c x h x w and the skip, 2h x 2w; together they have `channels`."""
        x = self.up(x)
        return t.cast(torch.Tensor, self.convs(x if skip_BCHW is None else torch.cat([x, skip_BCHW], dim=1)))


def build_encoder(config: TransUNetConfig) -> t.Any:
    """timm's hybrid ViT with the sizes of the settings, without class token and classifier."""
    from timm.layers.hybrid_embed import HybridEmbed
    from timm.layers.std_conv import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer

    resnet = ResNetV2(
        layers=list(config.layers),
        channels=config.resnet_channels,
        stem_chs=STEM,
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=functools.partial(StdConv2dSame, eps=1e-8),  # as timm has them in this network
    )
    return VisionTransformer(
        img_size=config.image_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=0,
        class_token=False,
        global_pool="",
        pos_drop_rate=config.dropout,
        proj_drop_rate=config.dropout,
        embed_layer=functools.partial(HybridEmbed, backbone=resnet),
        patch_size=1,
    )
