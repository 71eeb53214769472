"""XBusNet as its authors released it, which is not the network of their paper (`bushpc.models.xbusnet`).

Mallina and Shareef, github.com/rmallina14/XBusNet at ba770f6. Symbols and equation numbers are the paper's.

    image ─conv─→ * gamma(c) + beta(c) ─conv, GroupNorm, SiLU─→ F_g ──┐
                                                                      ├─ RB, RB, 1x1 conv ─→ logits
    image ─ResNet, TrEnc and SFA e_l inside─U-Net decoder, SFA─→ F_l ─┘

c = T(p_c) in predictions. In training c = w T(p_c) + (1 - w) V(x), w uniform in [0, 1] for each image, and x a picture
of another scan with the same p_l (`bushpc.conditions.released`). CLIP's image tower V has no other part: the
released settings `extract_layers` = 3, 7, 9, which its ancestor CLIPSeg counts from 0, are read by nothing.
"""

from __future__ import annotations

import typing as t

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.conditions import Condition, Highlight, NumericPrompt, SpreadsheetPrompt, Variant
from bushpc.conditions.variants import NO_PROMPTS, SHUFFLED_ATTRIBUTES, VARIANTS
from bushpc.config import CellGroups, WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.overlap import dice_loss
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.nn.clip import (
    CLIP_VIT_B16,
    ImageEncoder,
    TextEncoder,
    check_divides,
    check_image_tower,
    check_text_tower,
)
from bushpc.nn.conv import PreNormResidual
from bushpc.nn.encoder import feature_channels, feature_extractor
from bushpc.nn.text_unet import ENCODER_STRIDES, SFA, TransformerBlock, UpBlock
from bushpc.sample import Batch, Losses, Prediction

GROUPS = 8  # of every GroupNorm
LEAST_SFA_WIDTH = 256


@config_class
class XBusNetReleasedConfig(BackboneConfig):
    """The release's values are the defaults. `configs/model/xbusnet_released.yaml` lists what still differs."""

    image_size: int = setting(352, "Edge of the square input.", unit="pixels", ge=1)
    pretrained: bool = setting(
        True,
        "CLIP and the ResNet start from staged weights, CLIP's and ImageNet's: `bushpc weights pull "
        "model=xbusnet_released`.",
    )
    mix: bool = setting(
        True,
        "In training, mix the spatial sentence's embedding with CLIP's of a picture in which the lesion of another "
        "scan with the same attributes is highlighted. Predictions read the sentence alone.",
    )
    clip_image_size: int = setting(224, "Edge of the picture as CLIP's image tower reads it.", unit="pixels", ge=1)
    clip_patch_size: int = setting(16, "Patch size of CLIP ViT-B/16's image tower.", unit="pixels", ge=1)
    clip_width: int = setting(768, "Channels of CLIP ViT-B/16's image tower.", ge=1)
    clip_layers: int = setting(12, "Blocks of CLIP ViT-B/16's image tower.", ge=1)
    clip_heads: int = setting(12, "Attention heads of CLIP ViT-B/16's image tower.", ge=1)
    text_width: int = setting(512, "Channels of CLIP ViT-B/16's text tower.", ge=1)
    text_layers: int = setting(12, "Layers of CLIP ViT-B/16's text tower.", ge=1)
    text_heads: int = setting(8, "Attention heads of CLIP ViT-B/16's text tower.", ge=1)
    text_dim: int = setting(512, "Width of an embedding in the space of sentences and pictures.", ge=1)
    encoder: str = setting(
        "resnet50.tv_in1k",
        "The local branch's ResNet in timm, with features at strides 2 to 32. Its decoder has the encoder's channels.",
    )
    attention_heads: int = setting(8, "Heads of both transformer blocks.", ge=1)
    dropout: float = setting(0.1, "Of both transformer blocks, torch's default.", ge=0, lt=1)
    global_channels: int = setting(64, "Channels of F_g; a multiple of 8.", ge=1)
    local_channels: int = setting(32, "Channels of F_l; a multiple of 8.", ge=1)
    fusion_channels: int = setting(64, "Channels of the fusion's two residual blocks; a multiple of 8.", ge=1)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        check_text_tower(self)
        check_image_tower(self)
        check_divides("clip_patch_size", self.clip_patch_size, "clip_image_size", self.clip_image_size)
        check_divides("the encoder's stride", ENCODER_STRIDES[-1], "image_size", self.image_size)
        for name in ("global_channels", "local_channels", "fusion_channels"):
            check_divides("the number of groups", GROUPS, name, getattr(self, name))
        for channels in feature_channels(self.encoder, ENCODER_STRIDES)[3:]:
            check_divides("attention_heads", self.attention_heads, f"a channel count of {self.encoder}", channels)

    def check_run(self, cell: CellGroups) -> None:
        """A stream does not hold the other scans of its pictures. Raises: ConfigError."""
        if self.mix and cell.data.stream:
            raise ConfigError(
                "model.mix=true with data.stream: a stream cannot give the pictures of other scans that the release "
                "mixes into its sentences; read the shards from data.root, or set model.mix=false"
            )

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Both sentences, and in training the highlighted picture of another scan."""
        mean, std = (self.mean, self.std) if self.mean and self.std else self.usual
        return (NumericPrompt(), SpreadsheetPrompt(), *(Highlight(mean=mean, std=std),) * self.mix)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Prompts from the ground-truth mask first: the release has no others."""
        return VARIANTS["oracle"], NO_PROMPTS, SHUFFLED_ATTRIBUTES

    @property
    def why_no_mirror(self) -> str:
        """Sentences hold pixel positions."""
        return "reads sentences with positions in pixels, which a mirror image does not have"

    @property
    def backbone(self) -> str | None:
        """The local branch's encoder, whose normalisation all parts have."""
        return self.encoder

    @property
    def least_images(self) -> int:
        """2 where the encoder's deepest stage is a single pixel."""
        return 2 if self.image_size == ENCODER_STRIDES[-1] else 1

    def weight_files(self) -> list[WeightFile]:
        """CLIP's towers and the encoder."""
        return [CLIP_VIT_B16, WeightFile.of_timm(self.encoder)] if self.pretrained else []

    @property
    def blocks(self) -> tuple[type, ...]:
        """Transformer, decoder and residual blocks of both branches."""
        from timm.models.resnet import BasicBlock, Bottleneck

        return TransformerBlock, UpBlock, PreNormResidual, BasicBlock, Bottleneck


class XBusNetReleased(Model):
    """Dual-prompt, dual-branch segmentation network; one mask class."""

    Config = XBusNetReleasedConfig
    makes = frozenset({"prob_BKHW", "conditions"})

    config: XBusNetReleasedConfig

    def __init__(self, config: XBusNetReleasedConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        files = config.weight_files()
        clip_state, encoder_state = (
            [weights.load_staged(XBusNetReleased, file, weights_dir) for file in files] if files else (None, None)
        )
        with weights.fits(XBusNetReleased, CLIP_VIT_B16):
            self.text = TextEncoder(config, clip_state)
            # Only training reads it, so exports go without.
            size = config.clip_image_size
            self.picture = ImageEncoder(config, size, config.text_dim, clip_state) if config.mix else None
        self.normalize = config.normalize()
        self.gfe = GlobalBranch(config)
        self.lfe = LocalBranch(config)
        if encoder_state is not None:
            with weights.fits(XBusNetReleased, files[1]):
                features = {name: tensor for name, tensor in encoder_state.items() if not name.startswith("fc.")}
                self.lfe.encoder.load_state_dict(features)
        width = config.fusion_channels
        self.fusion = nn.Sequential(  # (17), with norms and SiLU before the convolutions
            PreNormResidual(config.global_channels + config.local_channels, width, GROUPS),
            PreNormResidual(width, width, GROUPS),
            nn.Conv2d(width, 1, kernel_size=1),
        )

    def outside_state(self) -> dict[str, nn.Module]:
        """CLIP's text tower; `TextEncoder` says why it is not in checkpoints."""
        return {"text": self.text.tower}

    def backbone(self) -> nn.Module | None:
        """timm's network."""
        return self.lfe.encoder

    def cam_layer(self) -> nn.Module:
        """The first block of (17), where both branches meet, as in `bushpc.models.xbusnet`."""
        return self.fusion[0]

    def forward(self, batch: Batch) -> Losses:
        """Soft Dice as the release has it, 2 (I + 1) / (S + 1); term "dice". -1 for an empty mask found empty."""
        c_BE = self._sentences(batch)
        if self.training and self.picture is not None:
            c_BE = self._mixed(c_BE, batch.conditions["highlights"])
        prob_BKHW = self._logits(batch, c_BE).float().sigmoid()
        dice = dice_loss(prob_BKHW, batch.mask_BKHW.float(), smooth=1.0, above=2.0)
        return Losses(total=dice, terms={"dice": dice.detach()})

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities. `Batch.mask_BKHW` is not read."""
        prob_BKHW = self._logits(batch, self._sentences(batch)).float().sigmoid()
        return Prediction(
            prob_BKHW=prob_BKHW, conditions={"spatial_prompts": list(batch.conditions["spatial_prompts"])}
        )

    def _sentences(self, batch: Batch) -> torch.Tensor:
        return self.text.plain(batch.conditions["spatial_prompts"], batch.image_BCHW.device)

    def _mixed(self, text_BE: torch.Tensor, pictures: list[t.Any]) -> torch.Tensor:
        """c of training. A batch without any picture has zeros for V(x); otherwise V of a grey picture stands in."""
        visual_BE = torch.zeros_like(text_BE)
        if any(picture is not None for picture in pictures):
            assert self.picture is not None
            visual_BE = self.picture(self._pictures(pictures).to(text_BE.device))
        w_B1 = torch.rand(len(text_BE), 1).to(text_BE.device)
        return text_BE * w_B1 + visual_BE * (1 - w_B1)

    def _pictures(self, pictures: list[t.Any]) -> torch.Tensor:
        """B x 3 x S' x S' for CLIP's tower."""
        size = self.config.image_size
        grey = torch.zeros(3, size, size)  # the mean colour
        x_BCSS = torch.stack([grey if x is None else torch.from_numpy(x).permute(2, 0, 1) for x in pictures])
        return F.interpolate(x_BCSS, (self.config.clip_image_size,) * 2, mode="bilinear", align_corners=False)

    def _logits(self, batch: Batch, c_BE: torch.Tensor) -> torch.Tensor:
        """B x 1 x H x W."""
        x_BCHW = self.normalize(batch.image_BCHW, self.lfe.encoder)
        e_l = self.text.plain(batch.conditions["attribute_prompts"], x_BCHW.device)
        logits_BKHW: torch.Tensor = self.fusion(torch.cat([self.gfe(x_BCHW, c_BE), self.lfe(x_BCHW, e_l)], dim=1))
        return logits_BKHW


class GlobalBranch(nn.Module):
    """F_g: one convolution of the image, scaled and shifted by c; CLIP's image tokens play no part."""

    def __init__(self, config: XBusNetReleasedConfig) -> None:
        super().__init__()
        channels = config.global_channels
        self.project = nn.Conv2d(3, channels, kernel_size=3, padding=1)
        self.W_mul = nn.Linear(config.text_dim, channels)
        self.W_add = nn.Linear(config.text_dim, channels)
        self.refine = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.GroupNorm(GROUPS, channels), nn.SiLU()
        )

    def forward(self, x_BCHW: torch.Tensor, c_BE: torch.Tensor) -> torch.Tensor:
        """F_g, B x C_g x H x W; as (7), but of pixels and with c itself."""
        c_BE = c_BE.to(x_BCHW.dtype)
        gamma, beta = self.W_mul(c_BE)[:, :, None, None], self.W_add(c_BE)[:, :, None, None]
        F_g: torch.Tensor = self.refine(gamma * self.project(x_BCHW) + beta)
        return F_g


class LocalBranch(nn.Module):
    """F_l: encoder and U-Net decoder. The bottleneck sees what TrEnc and SFA make of enc4."""

    def __init__(self, config: XBusNetReleasedConfig) -> None:
        super().__init__()
        self.encoder, (enc1, enc2, enc3, enc4, enc5) = feature_extractor(config.encoder, ENCODER_STRIDES)
        heads, dropout = config.attention_heads, config.dropout
        self.transformer4 = TransformerBlock(enc4, heads, pre_norm=False, dropout=dropout)
        self.transformer5 = TransformerBlock(enc5, heads, pre_norm=False, dropout=dropout)
        self.up4 = UpBlock(enc5, enc4, enc4, bias=True)
        self.up3 = UpBlock(enc4, enc3, enc3, bias=True)
        self.up2 = UpBlock(enc3, enc2, enc2, bias=True)
        self.up1 = UpBlock(enc2, enc1, enc1, bias=True)
        self.project = nn.ConvTranspose2d(enc1, config.local_channels, kernel_size=2, stride=2)
        sites = {"enc4": enc4, "dec4": enc4, "dec3": enc3, "dec2": enc2}
        self.sfa = nn.ModuleDict({site: self._sfa(channels, config.text_dim) for site, channels in sites.items()})

    def forward(self, x_BCHW: torch.Tensor, e_l: torch.Tensor) -> torch.Tensor:
        """F_l, B x C_l x H x W, from normalised images and embeddings (B x E)."""
        enc1, enc2, enc3, enc4, enc5 = self._encoded(x_BCHW, e_l)
        dec4 = self.sfa["dec4"](self.up4(self.transformer5(enc5), enc4), e_l)
        dec3 = self.sfa["dec3"](self.up3(dec4, enc3), e_l)
        dec2 = self.sfa["dec2"](self.up2(dec3, enc2), e_l)
        F_l: torch.Tensor = self.project(self.up1(dec2, enc1))
        return F_l

    def _encoded(self, x_BCHW: torch.Tensor, e_l: torch.Tensor) -> list[torch.Tensor]:
        """enc1 to enc5; enc4 is adjusted before enc5 is made of it."""
        stages: t.Any = self.encoder
        features: list[torch.Tensor] = []
        for name, stage in stages.items():
            x_BCHW = stage(x_BCHW)
            if name in stages.return_layers:
                if len(features) == 3:
                    x_BCHW = self.sfa["enc4"](self.transformer4(x_BCHW), e_l)
                features.append(x_BCHW)
        return features

    @staticmethod
    def _sfa(channels: int, text_dim: int) -> SFA:
        return SFA(channels, text_dim, width=max(LEAST_SFA_WIDTH, channels), neutral=False)
