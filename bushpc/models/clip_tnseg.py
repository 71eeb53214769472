"""CLIP-TNseg (Sun et al. 2024): CLIPSeg for the coarse, a U-Net of residual blocks for the fine, and both joined.

    sentence ─CLIP's text tower, frozen─────────┐
    image ─┬─CLIP's ViT, frozen─CLIPSeg's decoder─→ 64 channels ─┐
           └─residual U-Net──────────────────────→ 32 channels ──┴─RB, RB, 1 x 1─→ logits

ViT and decoder are transformers' CLIPSeg, whose last layer makes 64 channels instead of one. Sizes are those of the
authors' release. Its sentences describe a nodule; here they are the attribute sentences that XBusNet reads, embedded as
XBusNet's (`bushpc.nn.clip.TextEncoder`).
"""

from __future__ import annotations

import math
import typing as t

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.conditions import AttributePrompt, Condition, Variant
from bushpc.conditions.variants import NO_PROMPTS, SHUFFLED_ATTRIBUTES
from bushpc.config import ModelConfig, WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.overlap import overlap_losses, require_loss
from bushpc.models.base import Model
from bushpc.nn.clip import CLIP_MEAN, CLIP_STD, CLIP_VIT_B16, TextEncoder, check_image_tower, check_text_tower
from bushpc.nn.conv import PreNormResidual
from bushpc.nn.normalize import Normalize
from bushpc.sample import Batch, Losses, Prediction

LEVELS = (1, 1, 2, 2, 4, 4)  # channels of the U-Net's levels, in widths of the first
STRIDE = 2 ** (len(LEVELS) - 1)
BLOCKS = 2  # residual blocks of a level on the way down; one more on the way up
POSITIONS = "embeddings.position_embedding.weight"


@config_class
class ClipTnsegConfig(ModelConfig):
    """The release's values are the defaults."""

    image_size: int = setting(352, "Edge of the square input, as in the release.", unit="pixels", ge=STRIDE)
    pretrained: bool = setting(
        True, "CLIP starts from staged weights: `bushpc weights pull model=clip_tnseg`, the same file as XBusNet's."
    )
    freeze_vision: bool = setting(True, "CLIP's image tower is not trained. Its text tower never is.")
    clip_patch_size: int = setting(16, "Patch size of CLIP ViT-B/16's image tower.", unit="pixels", ge=1)
    clip_width: int = setting(768, "Channels of CLIP ViT-B/16's image tower.", ge=1)
    clip_layers: int = setting(12, "Blocks of CLIP ViT-B/16's image tower.", ge=1)
    clip_heads: int = setting(12, "Attention heads of CLIP ViT-B/16's image tower.", ge=1)
    text_width: int = setting(512, "Channels of CLIP ViT-B/16's text tower.", ge=1)
    text_layers: int = setting(12, "Layers of CLIP ViT-B/16's text tower.", ge=1)
    text_heads: int = setting(8, "Attention heads of CLIP ViT-B/16's text tower.", ge=1)
    text_dim: int = setting(512, "Width of a sentence's embedding.", ge=1)
    layers: tuple[int, ...] = setting((3, 7, 9), "Blocks of the image tower that the decoder reads, counted from 0.")
    reduce_dim: int = setting(64, "Channels of CLIPSeg's decoder, and of what it makes.", ge=1)
    decoder_heads: int = setting(4, "Attention heads of CLIPSeg's decoder.", ge=1)
    decoder_width: int = setting(2048, "Hidden width of CLIPSeg's decoder.", ge=1)
    fine_channels: int = setting(32, "Channels of the U-Net's first level, and of what it makes.", ge=1)
    groups: int = setting(32, "Groups of the residual blocks' GroupNorms; must divide all their channels.", ge=1)
    dice_weight: float = setting(1.0, "Weight of the soft Dice loss, the release's only one.", ge=0, lt=math.inf)
    bce_weight: float = setting(0.0, "Weight of the cross-entropy loss.", ge=0, lt=math.inf)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        check_text_tower(self)
        check_image_tower(self)
        divisors = (
            ("image_size", STRIDE, "the U-Net's stride"),
            ("image_size", self.clip_patch_size, "model.clip_patch_size"),
            ("reduce_dim", self.decoder_heads, "model.decoder_heads"),
            ("reduce_dim", self.groups, "model.groups"),
            ("fine_channels", self.groups, "model.groups"),
        )
        for name, divisor, what in divisors:
            value = getattr(self, name)
            if value % divisor:
                nearest = max(1, round(value / divisor)) * divisor
                raise ConfigError(
                    f"model.{name}={value} is not a multiple of {divisor}, {what}; the nearest is {nearest}"
                )
        if list(self.layers) != sorted(set(self.layers)) or not all(0 <= j < self.clip_layers for j in self.layers):
            raise ConfigError(
                f"model.layers={list(self.layers)}: name blocks from 0 to {self.clip_layers - 1}, each once, in rising "
                "order"
            )
        require_loss(self)

    @property
    def title(self) -> str:
        """As the publication has it."""
        return "CLIP-TNseg"

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The attribute sentence."""
        return (AttributePrompt(),)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Its own sentence, or another patient's."""
        return (NO_PROMPTS, SHUFFLED_ATTRIBUTES)

    @property
    def blocks(self) -> tuple[type, ...]:
        """The residual blocks, and CLIP's."""
        from transformers.models.clipseg.modeling_clipseg import CLIPSegEncoderLayer

        return PreNormResidual, CLIPSegEncoderLayer

    def weight_files(self) -> list[WeightFile]:
        """CLIP's towers."""
        return [CLIP_VIT_B16] if self.pretrained else []


class ClipTnseg(Model):
    """Text-guided segmentation in two branches; one mask class."""

    Config = ClipTnsegConfig
    makes = frozenset({"prob_BKHW"})

    config: ClipTnsegConfig

    def __init__(self, config: ClipTnsegConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        state = weights.load_staged(type(self), CLIP_VIT_B16, weights_dir) if config.pretrained else None
        with weights.fits(type(self), CLIP_VIT_B16):
            self.text = TextEncoder(config, state)
        self.normalize = Normalize(CLIP_MEAN, CLIP_STD)
        self.vision, self.coarse = build_clipseg(config)
        if state is not None:
            _load(self.vision, state)
        self.vision.requires_grad_(not config.freeze_vision)
        self.fine = ResidualUNet(config.fine_channels, config.groups)
        joined, r = config.reduce_dim + config.fine_channels, config.reduce_dim
        self.head = nn.Sequential(
            PreNormResidual(joined, r, config.groups),
            PreNormResidual(r, r, config.groups),
            nn.Conv2d(r, 1, kernel_size=1),
        )

    def outside_state(self) -> dict[str, nn.Module]:
        """CLIP's text tower; `TextEncoder` says why it is not in checkpoints."""
        return {"text": self.text.tower}

    def backbone(self) -> nn.Module:
        """CLIP's image tower."""
        return t.cast(nn.Module, self.vision)

    def cam_layer(self) -> nn.Module:
        """The first block behind both branches."""
        return self.head[0]

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
        image_BCHW = self.normalize(batch.image_BCHW, self)
        e_BE = self.text(batch.conditions["attribute_prompts"], image_BCHW.device)
        x_BND = self.vision.pre_layrnorm(self.vision.embeddings(image_BCHW, interpolate_pos_encoding=False))
        read = []
        for index, block in enumerate(self.vision.encoder.layers):
            x_BND = block(x_BND, attention_mask=None)
            if index in self.config.layers:
                read.append(x_BND)
        coarse_BCHW = self.coarse(tuple(read), e_BE.to(x_BND.dtype)).logits
        logits_BKHW: torch.Tensor = self.head(torch.cat([coarse_BCHW, self.fine(image_BCHW)], dim=1))
        return logits_BKHW


def build_clipseg(config: ClipTnsegConfig) -> tuple[t.Any, t.Any]:
    """transformers' image tower, up to the last block that is read, and decoder."""
    from transformers import CLIPSegConfig
    from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder, CLIPSegVisionModel

    settings: t.Any = CLIPSegConfig(
        vision_config={
            "hidden_size": config.clip_width,
            "intermediate_size": 4 * config.clip_width,
            "num_hidden_layers": max(config.layers) + 1,
            "num_attention_heads": config.clip_heads,
            "image_size": config.image_size,
            "patch_size": config.clip_patch_size,
        },
        projection_dim=config.text_dim,
        extract_layers=list(config.layers),
        reduce_dim=config.reduce_dim,
        decoder_num_attention_heads=config.decoder_heads,
        decoder_intermediate_size=config.decoder_width,
        conditional_layer=0,
        use_complex_transposed_convolution=False,
    )
    vision = CLIPSegVisionModel(settings.vision_config)
    decoder: t.Any = CLIPSegDecoder(settings)
    del vision.post_layernorm  # nothing reads what it makes
    patch = config.clip_patch_size
    decoder.transposed_convolution = nn.ConvTranspose2d(config.reduce_dim, config.reduce_dim, patch, stride=patch)
    return vision, decoder


def _load(vision: nn.Module, clip: t.Mapping[str, torch.Tensor]) -> None:
    """Blocks above the last one that is read are left out. Raises: WeightsError."""
    own = vision.state_dict()
    with weights.fits(ClipTnseg, CLIP_VIT_B16):
        given = vision_state(clip)
        given[POSITIONS] = on_grid(given[POSITIONS], len(own[POSITIONS]))
        vision.load_state_dict({name: given[name] for name in own if name in given})


def on_grid(positions_ND: torch.Tensor, count: int) -> torch.Tensor:
    """CLIP's positions for a square grid of `count` - 1 patches, bicubic; the class token's goes first."""
    token_1D, grid_ND = positions_ND[:1], positions_ND[1:]
    old, new = math.isqrt(len(grid_ND)), math.isqrt(count - 1)
    if old == new:
        return positions_ND
    grid_1Dhw = grid_ND.T.reshape(1, -1, old, old)
    resized_1Dhw = F.interpolate(grid_1Dhw, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([token_1D, resized_1Dhw.flatten(2)[0].T])


def vision_state(clip: t.Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The image tower of open_clip's state by the names of transformers; positions as there, on CLIP's grid."""
    renamed = {
        "visual.class_embedding": "embeddings.class_embedding",
        "visual.conv1.weight": "embeddings.patch_embedding.weight",
        "visual.positional_embedding": POSITIONS,
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    made = {new: clip[old] for old, new in renamed.items()}
    for name, value in clip.items():
        if name.startswith("visual.ln_pre."):
            made[f"pre_layrnorm.{name.rpartition('.')[2]}"] = value
        if not name.startswith("visual.transformer.resblocks."):
            continue
        number, _, inside = name.removeprefix("visual.transformer.resblocks.").partition(".")
        module, _, kind = inside.rpartition(".")
        layer = f"encoder.layers.{number}"
        if kind.startswith("in_proj_"):
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                made[f"{layer}.self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"] = chunk
        else:
            made[f"{layer}.{parts[module]}.{kind}"] = value
    return made


class ResidualUNet(nn.Module):
    """The fine branch: every output on the way down is joined on the way up."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        widths = [channels * times for times in LEVELS]
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        now, skips = channels, [channels]
        for level, width in enumerate(widths):
            for _ in range(BLOCKS):
                self.down.append(PreNormResidual(now, width, groups))
                now = width
                skips.append(now)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(now, now, 3, padding=1, stride=2))
                skips.append(now)
        self.middle = nn.Sequential(PreNormResidual(now, now, groups), PreNormResidual(now, now, groups))
        for level, width in reversed(list(enumerate(widths))):
            for block in range(BLOCKS + 1):
                layers: list[nn.Module] = [PreNormResidual(now + skips.pop(), width, groups)]
                now = width
                if level and block == BLOCKS:
                    layers += [nn.Upsample(scale_factor=2), nn.Conv2d(now, now, 3, padding=1)]
                self.up.append(nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W to B x channels x H x W."""
        x = self.first(x)
        skips = [x]
        for module in self.down:
            x = module(x)
            skips.append(x)
        x = self.middle(x)
        for module in self.up:
            x = module(torch.cat([x, skips.pop()], dim=1))
        return x
