"""XBusNet: a global CLIP branch and a local U-Net branch, each steered by its own sentence.

Mallina and Shareef, "XBusNet: Text-Guided Breast Ultrasound Segmentation via Multimodal Vision-Language
Learning". Equation numbers are the paper's, and so are the symbols: p_c and e_c are the sentence on lesion
size and place and its embedding (condition `spatial_prompts`), p_l and e_l those on shape, margin and BI-RADS
(condition `attribute_prompts`).

    image ─CLIP ViT, frozen─→ A ──(7) e_c──→ F_g ──SFA e_c──┐
                                                            ├─ RB, RB, 1x1 conv ─→ logits
    image ─ResNet + TrEnc, U-Net decoder, SFA e_l─→ F_l ────┘

Shape suffixes besides those of `bushpc.sample`: N patch tokens, D width of CLIP's image tower, R reduced
width r, E width d of a sentence embedding.
"""

from __future__ import annotations

import math
import typing as t

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.conditions import AttributePrompt, Condition, SpatialPrompt, Variant
from bushpc.conditions.variants import NO_PROMPTS, SHUFFLED_ATTRIBUTES, SPATIAL
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.overlap import overlap_losses, require_loss
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.nn.clip import (
    CLIP_MEAN,
    CLIP_STD,
    CLIP_VIT_B16,
    TextEncoder,
    check_divides,
    check_image_tower,
    check_text_tower,
    image_part,
)
from bushpc.nn.conv import conv_bn_relu
from bushpc.nn.encoder import feature_channels, feature_extractor
from bushpc.nn.normalize import Normalize
from bushpc.nn.text_unet import ENCODER_STRIDES, SFA, TransformerBlock, UpBlock
from bushpc.sample import Batch, Losses, Prediction

ENCODER_REVISIONS = {"resnet50.a1_in1k": "5d9e13b8fdab4d9718bcf2c8f5c3af01878367e8"}


@config_class
class XBusNetConfig(BackboneConfig):
    """The paper's values are the defaults. `configs/model/xbusnet.yaml` lists what it leaves open.

    "Released" is the authors' published code and settings, used where the paper gives no value; as a whole their
    network is another one, `bushpc.models.xbusnet_released`.
    """

    image_size: int = setting(352, "Edge of the square input (2.2).", unit="pixels", ge=1)
    pretrained: bool = setting(
        True,
        "CLIP and the ResNet start from staged weights, CLIP's and ImageNet's (2.5): `bushpc weights pull "
        "model=xbusnet`.",
    )
    lfe: bool = setting(True, "Table 4: the local branch. Off: no parameters.")
    gfe: bool = setting(True, "Table 4: the global branch. Off: no parameters.")
    sfa: bool = setting(
        True,
        "Table 4: semantic feature adjustment. Without it the local branch reads no sentence; the global one still "
        "does, because conditioning (7) belongs to the GFE.",
    )
    freeze_vision: bool = setting(
        True, "CLIP's image tower is not trained (2.5, 2.7). Its text tower never is, whatever this says."
    )
    clip_patch_size: int = setting(16, "Patch size of CLIP ViT-B/16's image tower (2.6).", unit="pixels", ge=1)
    clip_width: int = setting(768, "Channels of CLIP ViT-B/16's image tower.", ge=1)
    clip_layers: int = setting(12, "Blocks of CLIP ViT-B/16's image tower.", ge=1)
    clip_heads: int = setting(12, "Attention heads of CLIP ViT-B/16's image tower.", ge=1)
    text_width: int = setting(512, "Channels of CLIP ViT-B/16's text tower.", ge=1)
    text_layers: int = setting(12, "Layers of CLIP ViT-B/16's text tower.", ge=1)
    text_heads: int = setting(8, "Attention heads of CLIP ViT-B/16's text tower.", ge=1)
    text_dim: int = setting(512, "d of (9), the width of a sentence's embedding.", ge=1)
    layers: tuple[int, ...] = setting(
        (3, 7, 9),
        "L of (6): which of the image tower's blocks give tokens, counted from 1. The paper does not list it; the "
        "release has 3, 7, 9, which nothing reads there.",
    )
    reduce_dim: int = setting(64, "r of (6). The paper does not give it; released: 64.", ge=1)
    global_channels: int = setting(64, "Channels of F_g (8).", ge=1)
    local_channels: int = setting(32, "Channels of F_l (12).", ge=1)
    encoder: str = setting(
        "resnet50.a1_in1k",
        "The local branch's encoder in timm, with features at strides 2 to 32: ResNet50 (2.8) with timm's weights. "
        "Released: torchvision's; both are trained on ImageNet-1k.",
    )
    attention_heads: int = setting(
        8,
        "Heads of the transformer blocks (10), at both of their places. The paper does not give them; released: 8. "
        "Ours are pre-norm, without dropout.",
        ge=1,
    )
    decoder_channels: tuple[int, ...] = setting(
        (1024, 512, 256, 64), "Channels of dec4, dec3, dec2, dec1. The paper does not give them; released: these."
    )
    fusion_channels: int = setting(
        64, "Channels of the two residual blocks (17). The paper does not give them; released: 64.", ge=1
    )
    fusion_stride: int = setting(
        1,
        "H / h of (12) and (16). 1: the branches meet at the image's own size, where the final up projection ends "
        "(2.8); 2 fuses at half of it.",
        ge=1,
        le=2,
    )
    dice_weight: float = setting(
        1.0,
        "Weight of the soft Dice loss, 1 - (2 I + 1) / (S + 1). The paper names no segmentation loss; released: "
        "1 - 2 (I + 1) / (S + 1).",
        ge=0,
        lt=math.inf,
    )
    bce_weight: float = setting(0.0, "Weight of the cross-entropy loss. Released: none.", ge=0, lt=math.inf)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if not (self.lfe or self.gfe):
            raise ConfigError("lfe=false and gfe=false leave no branch; switch at least one of them on.")
        if self.reads_text:
            check_text_tower(self)
        if self.gfe:
            self._check_global_branch()
        if self.lfe:
            self._check_local_branch()
        require_loss(self)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The global branch reads the spatial prompts; the attribute prompts are read through SFA in the local one."""
        attributes = self.lfe and self.sfa
        return (*(SpatialPrompt(),) * self.gfe, *(AttributePrompt(),) * attributes)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Of each sentence that is read."""
        spatial = SPATIAL if self.gfe else (NO_PROMPTS,)
        return (*spatial, *(SHUFFLED_ATTRIBUTES,) * self.reads("attribute_prompts"))

    @property
    def backbone(self) -> str | None:
        """The local branch's encoder; CLIP has its own normalisation."""
        return self.encoder if self.lfe else None

    @property
    def least_images(self) -> int:
        """2 where the encoder's deepest stage is a single pixel."""
        return 2 if self.image_size == ENCODER_STRIDES[-1] else 1

    def weight_files(self) -> list[WeightFile]:
        """CLIP's towers if a sentence or the global branch is used, the encoder if the local branch is."""
        if not self.pretrained:
            return []
        return [CLIP_VIT_B16] * self.reads_text + [_encoder_file(self.encoder)] * self.lfe

    @property
    def blocks(self) -> tuple[type, ...]:
        """Transformer, decoder and residual blocks of both branches."""
        from open_clip.transformer import ResidualAttentionBlock
        from timm.models.resnet import BasicBlock, Bottleneck

        return TransformerBlock, UpBlock, ResidualBlock, BasicBlock, Bottleneck, ResidualAttentionBlock

    @property
    def reads_text(self) -> bool:
        """Whether any part that is switched on reads a sentence."""
        return self.gfe or self.sfa

    def _check_global_branch(self) -> None:
        check_divides("clip_patch_size", self.clip_patch_size, "image_size", self.image_size)
        check_image_tower(self)
        if not self.layers or not all(1 <= j <= self.clip_layers for j in self.layers):
            raise ConfigError(f"layers={list(self.layers)}; name at least one block from 1 to {self.clip_layers}.")
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"layers={list(self.layers)}; name each block once, in rising order.")

    def _check_local_branch(self) -> None:
        check_divides("the encoder's stride", ENCODER_STRIDES[-1], "image_size", self.image_size)
        if len(self.decoder_channels) != 4:
            raise ConfigError(
                f"decoder_channels={list(self.decoder_channels)}; four are needed: dec4, dec3, dec2, dec1."
            )
        channels = feature_channels(self.encoder, ENCODER_STRIDES)
        heads = self.attention_heads
        if channels[3] % heads or channels[4] % heads:
            raise ConfigError(
                f"attention_heads={heads} must divide the channels of enc4 and enc5, which are {channels[3]} and "
                f"{channels[4]} in encoder '{self.encoder}'."
            )


class XBusNet(Model):
    """Dual-prompt, dual-branch segmentation network; one mask class.

    First pass and second: where p_c of a sample is a function of the first prediction (`FirstPass`), "" gives a
    probability map, the function turns it into a sentence, and that gives the prediction (section 2.7).
    With gfe=false nothing reads p_c, and `Prediction.conditions` is None.
    """

    Config = XBusNetConfig
    makes = frozenset({"prob_BKHW", "conditions"})

    config: XBusNetConfig

    def __init__(self, config: XBusNetConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        clip_state = None
        if config.pretrained and config.reads_text:
            clip_state = weights.load_staged(XBusNet, CLIP_VIT_B16, weights_dir)
        if config.reads_text:
            with weights.fits(XBusNet, CLIP_VIT_B16):
                self.text = TextEncoder(config, clip_state)
        if config.gfe:
            self.gfe = GlobalFeatureExtractor(config, clip_state)
        if config.lfe:
            encoder_state = None
            if config.pretrained:
                encoder_state = weights.load_staged(XBusNet, _encoder_file(config.encoder), weights_dir)
            self.lfe = LocalFeatureExtractor(config, encoder_state)
        fused = config.gfe * config.global_channels + config.lfe * config.local_channels
        self.fusion = nn.Sequential(  # (17)
            ResidualBlock(fused, config.fusion_channels),
            ResidualBlock(config.fusion_channels, config.fusion_channels),
            nn.Conv2d(config.fusion_channels, 1, kernel_size=1),
        )

    def outside_state(self) -> dict[str, nn.Module]:
        """CLIP's text tower; `TextEncoder` says why it is not in checkpoints."""
        return {"text": self.text.tower} if self.config.reads_text else {}

    def backbone(self) -> nn.Module | None:
        """timm's network."""
        return self.lfe.encoder if self.config.lfe else None

    def cam_layer(self) -> nn.Module:
        """The first block of (17), where both branches meet. Maps of later blocks would only repeat the mask.

        Only a 1 x 1 convolution follows the second block, so its map would be the logits.
        """
        return self.fusion[0]

    def forward(self, batch: Batch) -> Losses:
        """Soft Dice and cross-entropy of the logits, weighted; terms "dice" and "bce"."""
        logits_BKHW = self._fuse(self._prompt_free(batch), batch.conditions.get("spatial_prompts", []))
        return overlap_losses(
            logits_BKHW,
            batch.mask_BKHW,
            dice_weight=self.config.dice_weight,
            bce_weight=self.config.bce_weight,
        )

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities, and the sentences p_c that gave them. `Batch.mask_BKHW` is not read."""
        features, given = self._prompt_free(batch), batch.conditions.get("spatial_prompts", [])
        prompts = [SpatialPrompt.absent if callable(prompt) else prompt for prompt in given]
        prob_BKHW = self._fuse(features, prompts).float().sigmoid()
        if not self.config.gfe:
            return Prediction(prob_BKHW=prob_BKHW)
        if any(map(callable, given)):
            maps = prob_BKHW[:, 0].cpu().numpy()
            prompts = [
                prompt(prob_HW) if callable(prompt) else prompt for prompt, prob_HW in zip(given, maps, strict=True)
            ]
            prob_BKHW = self._fuse(features, prompts).float().sigmoid()
        return Prediction(prob_BKHW=prob_BKHW, conditions={"spatial_prompts": prompts})

    def _prompt_free(self, batch: Batch) -> _PromptFree:
        """Everything that does not depend on p_c, so that the second pass need not repeat it."""
        image_BCHW = batch.image_BCHW
        A_BNR = self.gfe.tokens(image_BCHW) if self.config.gfe else None
        F_l = None
        if self.config.lfe:
            e_l = self.text(batch.conditions["attribute_prompts"], image_BCHW.device) if self.config.sfa else None
            F_l = self.lfe(image_BCHW, e_l)
        return _PromptFree(A_BNR, F_l, image_BCHW.device)

    def _fuse(self, features: _PromptFree, spatial_prompts: list[str]) -> torch.Tensor:
        """(3), (16) and (17): logits B x 1 x H x W."""
        maps = []
        if features.A_BNR is not None:
            e_c = self.text(spatial_prompts, features.device)
            maps.append(self.gfe(features.A_BNR, e_c))
        if features.F_l is not None:
            maps.append(features.F_l)
        logits_BKhw = self.fusion(torch.cat(maps, dim=1))
        return F.interpolate(logits_BKhw, scale_factor=self.config.fusion_stride, mode="bilinear", align_corners=False)


class _PromptFree(t.NamedTuple):
    A_BNR: torch.Tensor | None
    F_l: torch.Tensor | None
    device: torch.device


def clip_image_tower(config: XBusNetConfig, clip_state: dict[str, torch.Tensor] | None) -> nn.Module:
    """CLIP's image tower up to the last block that is asked for; what lies above it is left out.

    Its output: Z^(j) for j in L, without the class token, a list of B x N x D. Positions: CLIP's grid is 14 x 14 (224
    pixels). Staged weights are interpolated bicubically to this model's grid once, when they are loaded; a tower
    trained from scratch has its own grid from the start.
    """
    from open_clip.transformer import QuickGELU, VisionTransformer

    indices = [j - 1 for j in config.layers]

    class ClipImageTower(VisionTransformer):  # in here, as open_clip takes seconds to import
        def forward(self, image_BCHW: torch.Tensor) -> list[torch.Tensor]:
            Z: list[torch.Tensor] = self.forward_intermediates(
                image_BCHW, indices=indices, intermediates_only=True, output_fmt="NLC"
            )["image_intermediates"]
            return Z

    tower = ClipImageTower(
        image_size=config.image_size,
        patch_size=config.clip_patch_size,
        width=config.clip_width,
        layers=config.clip_layers,
        heads=config.clip_heads,
        mlp_ratio=4.0,
        output_dim=config.text_dim,
        act_layer=QuickGELU,  # OpenAI's weights load into a GELU tower without complaint and mean less there
    )
    if clip_state is not None:
        with weights.fits(XBusNet, CLIP_VIT_B16):
            tower.load_state_dict(image_part(clip_state, tower))
    # Parameters above the last block read would get no gradient, and DDP stops at those.
    tower.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    if config.freeze_vision:
        tower.requires_grad_(False)
    return tower


class GlobalFeatureExtractor(nn.Module):
    """GFE, section 2.7: CLIP's image tokens, conditioned on e_c, as a map of `global_channels` channels."""

    UPSCALE = 4  # of the transposed convolution; the rest of the way up is bilinear

    def __init__(self, config: XBusNetConfig, clip_state: dict[str, torch.Tensor] | None) -> None:
        super().__init__()
        r, d = config.reduce_dim, config.text_dim
        self.frozen = config.freeze_vision
        self.grid = config.image_size // config.clip_patch_size
        self.size = config.image_size // config.fusion_stride
        self.normalize = Normalize(CLIP_MEAN, CLIP_STD)
        self.clip = clip_image_tower(config, clip_state)
        self.W = nn.ModuleList(nn.Linear(config.clip_width, r) for _ in config.layers)
        self.W_c = nn.Linear(d, r)
        self.W_mul = nn.Linear(r, r)
        self.W_add = nn.Linear(r, r)
        # With e = 0 for "" the biases are what is left of (7); 1 and 0 let the tokens through unchanged.
        nn.init.ones_(self.W_mul.bias)
        nn.init.zeros_(self.W_add.bias)
        self.project = nn.ConvTranspose2d(r, config.global_channels, kernel_size=self.UPSCALE, stride=self.UPSCALE)
        self.sfa = SFA(config.global_channels, d) if config.sfa else None

    def train(self, mode: bool = True) -> GlobalFeatureExtractor:
        """As for any module, but a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.clip.eval()
        return self

    def tokens(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """A of (6), B x N x R: independent of the sentence."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            Z = self.clip(self.normalize(image_BCHW, self.clip))
        return torch.stack([W_j(Z_j) for W_j, Z_j in zip(self.W, Z, strict=True)]).sum(dim=0)

    def forward(self, A_BNR: torch.Tensor, e_c: torch.Tensor) -> torch.Tensor:
        """F_g after SFA, B x C_g x h x w, from the tokens and the embeddings (B x E)."""
        c = self.W_c(e_c.to(A_BNR.dtype))[:, None]  # (7)
        A_BNR = self.W_mul(c) * A_BNR + self.W_add(c)
        grid_BRhw = A_BNR.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        F_g: torch.Tensor = self.project(grid_BRhw)  # (8)
        F_g = F.interpolate(F_g, size=(self.size, self.size), mode="bilinear", align_corners=False)
        if self.sfa is not None:
            F_g = self.sfa(F_g, e_c)
        return F_g


class LocalFeatureExtractor(nn.Module):
    """LFE, section 2.8: encoder, transformer blocks at its two deepest stages, U-Net decoder."""

    def __init__(self, config: XBusNetConfig, encoder_state: dict[str, torch.Tensor] | None) -> None:
        super().__init__()
        self.normalize = config.normalize()
        self.encoder, channels = feature_extractor(config.encoder, ENCODER_STRIDES)
        if encoder_state is not None:
            features = {k: v for k, v in encoder_state.items() if not k.startswith("fc.")}
            with weights.fits(XBusNet, _encoder_file(config.encoder)):
                self.encoder.load_state_dict(features)
        enc1, enc2, enc3, enc4, enc5 = channels
        dec4, dec3, dec2, dec1 = config.decoder_channels
        self.transformer4 = TransformerBlock(enc4, config.attention_heads)
        self.transformer5 = TransformerBlock(enc5, config.attention_heads)
        self.up4 = UpBlock(enc5, enc4, dec4)
        self.up3 = UpBlock(dec4, enc3, dec3)
        self.up2 = UpBlock(dec3, enc2, dec2)
        self.up1 = UpBlock(dec2, enc1, dec1)
        if config.fusion_stride == 1:
            self.project: nn.Module = nn.ConvTranspose2d(dec1, config.local_channels, kernel_size=2, stride=2)
        else:
            self.project = nn.Conv2d(dec1, config.local_channels, kernel_size=3, padding=1)
        sites = {"enc4": enc4, "dec4": dec4, "dec3": dec3, "dec2": dec2}
        self.sfa = (
            nn.ModuleDict({site: SFA(channels, config.text_dim) for site, channels in sites.items()})
            if config.sfa
            else None
        )

    def forward(self, image_BCHW: torch.Tensor, e_l: torch.Tensor | None) -> torch.Tensor:
        """F_l (12), B x C_l x h x w, from images and embeddings (B x E; None with `sfa` switched off)."""
        enc1, enc2, enc3, enc4, enc5 = self.encoder(self.normalize(image_BCHW, self.encoder))
        enc4 = self._adjust("enc4", self.transformer4(enc4), e_l)  # (10), (11)
        center = self.transformer5(enc5)  # (10)
        dec4 = self._adjust("dec4", self.up4(center, enc4), e_l)  # (11)
        dec3 = self._adjust("dec3", self.up3(dec4, enc3), e_l)  # (11)
        dec2 = self._adjust("dec2", self.up2(dec3, enc2), e_l)  # (11)
        F_l: torch.Tensor = self.project(self.up1(dec2, enc1))  # (12)
        return F_l

    def _adjust(self, site: str, feature: torch.Tensor, e_l: torch.Tensor | None) -> torch.Tensor:
        if self.sfa is not None:
            feature = self.sfa[site](feature, e_l)
        return feature


class ResidualBlock(nn.Module):
    """RB of (17): two 3 x 3 convolutions and a skip, which is a 1 x 1 convolution if the width changes."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn_relu(channels, out_channels, bias=False),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, kernel_size=1)

    def forward(self, F_BChw: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(F_BChw) + self.skip(F_BChw))


def _encoder_file(name: str) -> WeightFile:
    """timm's own weights of `name`. Raises: ConfigError when there are none."""
    return WeightFile.of_timm(name, ENCODER_REVISIONS.get(name, "main"))
