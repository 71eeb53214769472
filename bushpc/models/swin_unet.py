"""Swin-Unet: a U-Net of Swin transformer blocks, with convolutions for the patches and the logits alone.

Cao et al., "Swin-Unet: Unet-like Pure Transformer for Medical Image Segmentation" (2021). The encoder is timm's Swin
transformer, under timm's names, with two blocks per stage; the decoder's stages are timm's blocks, too.

    image ─4 x 4 patches─┬─stage─merge─┬─stage─merge─┬─stage─merge─ stage, norm
                         │             │             └──────── expand, join, stage
                         │             └────────────────────── expand, join, stage
                         └──────────────────────────────────── expand, join, stage, norm, expand x 4, 1 x 1 → logits

Shape suffixes besides those of `bushpc.sample`: h, w a feature map's own height and width.
"""

from __future__ import annotations

import typing as t

import torch
from torch import nn

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.one_mask import OneMask, OneMaskConfig, require_multiple

SWIN_T = "swin_tiny_patch4_window7_224.ms_in1k"  # timm's copy of the weights that the authors start from
PATCH, STAGES = 4, 4
STRIDE = PATCH << STAGES - 1  # of the deepest stage to the image


@config_class
class SwinUnetConfig(OneMaskConfig):
    """The paper's values are the defaults. Losses are Dice and cross-entropy at equal weight."""

    image_size: int = setting(224, "Edge of the square input; a multiple of 32.", unit="pixels", ge=1)
    pretrained: bool = setting(
        True,
        "Encoder and decoder start from staged ImageNet weights of Swin-T, the decoder's stages from the "
        "encoder's of the same width: `bushpc weights pull model=swin_unet`.",
    )
    width: int = setting(96, "C: channels of the first stage; each stage doubles them.", ge=1)
    depths: tuple[int, ...] = setting((2, 2, 2, 2), "Blocks of the four stages; the decoder mirrors the first three.")
    heads: tuple[int, ...] = setting((3, 6, 12, 24), "Heads of their attention.")
    window: int = setting(
        7,
        "Edge of the attention's windows, in patches. Where it does not divide a map, timm pads the map; 8 divides all "
        "maps of 256 and 512 pixels.",
        ge=1,
    )
    drop_path: float = setting(
        0.2, "Stochastic depth of the encoder's and the decoder's last blocks; the authors' configuration.", ge=0, lt=1
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        require_multiple(self.image_size, STRIDE, "the stride of the deepest stage")
        for name, given in (("depths", self.depths), ("heads", self.heads)):
            if len(given) != STAGES or min(given) < 1:
                raise ConfigError(f"model.{name}={list(given)}: {STAGES} numbers above 0 are needed, one per stage")
        for heads, channels in zip(self.heads, self.stage_widths, strict=True):
            if channels % heads:
                raise ConfigError(
                    f"model.heads={list(self.heads)}: {heads} must divide the {channels} channels of its stage; "
                    f"channels follow from model.width={self.width}"
                )
        if self.pretrained and self.encoder != SwinUnetConfig(pretrained=False).encoder:
            raise ConfigError(
                "model.pretrained=true: the weights are those of Swin-T; leave model.width, model.depths and "
                "model.heads at their defaults, or set model.pretrained=false"
            )

    @property
    def encoder(self) -> tuple[t.Any, ...]:
        """What the shapes of the encoder's tensors follow from, besides image and window."""
        return self.width, self.depths, self.heads

    @property
    def stage_widths(self) -> list[int]:
        """Of the four stages."""
        return [self.width << i for i in range(STAGES)]

    @property
    def backbone(self) -> None:
        """Swin-T expects what is usual."""
        return None

    def weight_files(self) -> list[WeightFile]:
        """timm's copy of Microsoft's weights."""
        return [WeightFile.of_timm(SWIN_T)] if self.pretrained else []

    @property
    def blocks(self) -> tuple[type, ...]:
        """Swin transformer blocks."""
        from timm.models.swin_transformer import SwinTransformerBlock

        return (SwinTransformerBlock,)


class SwinUnet(OneMask):
    """Swin-Unet; one mask class."""

    Config = SwinUnetConfig

    config: SwinUnetConfig
    net: SwinUnetNet

    def __init__(self, config: SwinUnetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.net = SwinUnetNet(config)
        for file in config.weight_files():
            self._load(weights.load_staged(SwinUnet, file, weights_dir), file)

    def backbone(self) -> nn.Module:
        """The encoder."""
        return self.net.encoder

    def cam_layer(self) -> nn.Module:
        """What the last convolution reads."""
        return self.net.full_size

    def _load(self, state: dict[str, torch.Tensor], file: WeightFile) -> None:
        """Swin-T's tensors: its third stage has six blocks, of which the first are taken, as the authors do."""
        from timm.models.swin_transformer import checkpoint_filter_fn

        encoder = self.net.encoder
        # The classifier stays: by its name timm tells the age of a file.
        known = {name: state[name] for name in (*encoder.state_dict(), "head.fc.weight") if name in state}
        with weights.fits(SwinUnet, file):
            fitted = checkpoint_filter_fn(known, encoder)
            encoder.load_state_dict({name: fitted[name] for name in encoder.state_dict()})
        for stage, twin in zip(self.net.decoder, reversed(encoder.layers[:-1]), strict=True):
            stage.get_submodule("blocks").load_state_dict(twin.blocks.state_dict())


class SwinUnetNet(nn.Module):
    """RGB to one mask's logits, B x 3 x H x W to B x 1 x H x W."""

    def __init__(self, config: SwinUnetConfig) -> None:
        from timm.models.swin_transformer import SwinTransformer

        super().__init__()
        self.encoder: t.Any = SwinTransformer(
            img_size=config.image_size,
            patch_size=PATCH,
            num_classes=0,
            embed_dim=config.width,
            depths=config.depths,
            num_heads=config.heads,
            window_size=config.window,
            drop_path_rate=config.drop_path,
        )
        self.decoder = nn.ModuleList(DecoderStage(config, level) for level in reversed(range(STAGES - 1)))
        self.norm = nn.LayerNorm(config.width)
        self.full_size = nn.Sequential(PatchExpanding(config.width, config.width, PATCH), ChannelsFirst())
        self.head = nn.Conv2d(config.width, 1, 1, bias=False)
        self.apply(_small_start)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        encoder = self.encoder
        x, skips = encoder.patch_embed(image_BCHW), []
        for stage in encoder.layers:
            x = stage.downsample(x)
            skips.append(x)
            x = stage.blocks(x)
        x, skips = encoder.norm(x), skips[:-1]
        for stage in self.decoder:
            x = stage(x, skips.pop())
        return t.cast(torch.Tensor, self.head(self.full_size(self.norm(x))))


class DecoderStage(nn.Module):
    """Patch expanding, the skip connection, and as many blocks as the encoder has at this level."""

    def __init__(self, config: SwinUnetConfig, level: int) -> None:
        from timm.layers.drop import calculate_drop_path_rates
        from timm.models.swin_transformer import SwinTransformerStage

        super().__init__()
        channels, edge = config.stage_widths[level], config.image_size // PATCH >> level
        self.expand = PatchExpanding(2 * channels, channels, 2)
        self.join = nn.Linear(2 * channels, channels)
        self.blocks = SwinTransformerStage(
            dim=channels,
            out_dim=channels,
            input_resolution=(edge, edge),
            depth=config.depths[level],
            downsample=False,
            num_heads=config.heads[level],
            window_size=config.window,
            drop_path=calculate_drop_path_rates(config.drop_path, list(config.depths), stagewise=True)[level],
        ).blocks

    def forward(self, x_BhwC: torch.Tensor, skip_BHWC: torch.Tensor) -> torch.Tensor:
        """B x h x w x 2 c, and the skip, B x 2h x 2w x c, to the skip's shape."""
        joined = self.join(torch.cat([self.expand(x_BhwC), skip_BHWC], dim=-1))
        return t.cast(torch.Tensor, self.blocks(joined))


class PatchExpanding(nn.Module):
    """The inverse of patch merging: each position's linear map becomes a square of positions."""

    def __init__(self, channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(channels, scale**2 * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x_BhwC: torch.Tensor) -> torch.Tensor:
        """B x h x w x channels to B x (scale h) x (scale w) x out_channels."""
        squares = self.linear(x_BhwC).unflatten(-1, (self.scale, self.scale, -1))
        return t.cast(torch.Tensor, self.norm(squares.transpose(2, 3).flatten(3, 4).flatten(1, 2)))


class ChannelsFirst(nn.Module):
    """B x h x w x C to B x C x h x w."""

    def forward(self, x_BhwC: torch.Tensor) -> torch.Tensor:
        return x_BhwC.permute(0, 3, 1, 2)


def _small_start(module: nn.Module) -> None:
    """Linear maps start as Swin's do, whose cut at 2 is a hundred deviations away."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
