"""Prompt-free SAM multi-task: SAM's image encoder, a decoder for the mask, and a classifier that the mask guides.

Johnny, Atabonfack, Alagbe and Gueye, "Prompt-Free SAM-Based Multi-Task Framework for Breast Ultrasound Lesion
Segmentation and Classification". Equation numbers are the paper's; SD-H, UNet-H and MGC-A are the rows of its Table 3.

    image ─SAM ViT─→ neck F ──SD-H, or UNet-H with skips from earlier blocks──→ logits ──sigmoid──→ mask
                     │                                                                               │
                     └──mean F, and with MGC-A the mean of A ⊙ F, A from a mask by the curriculum ←──┘
                                          └─ MLP ─→ benign | malignant | normal

Shape suffixes besides those of `bushpc.sample`: h, w the encoder's grid; L labels; N tokens, M heads, D width of one.
"""

from __future__ import annotations

import itertools
import typing as t
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.config import ModelConfig, WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.label import labelled_cross_entropy
from bushpc.losses.overlap import bce_loss, soft_dice_loss
from bushpc.models.base import Model
from bushpc.nn.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from bushpc.nn.uncompiled import not_compiled
from bushpc.sample import LABELS, Batch, Losses, Prediction

if t.TYPE_CHECKING:  # timm takes seconds to import, and the login node does without
    from timm.models.vision_transformer_sam import VisionTransformerSAM

SAM_VIT_B = WeightFile(
    name="sam_vit_b_sa1b.safetensors",
    hub_repo="timm/samvit_base_patch16.sa1b",
    hub_file="model.safetensors",
    revision="main",  # `weights pull` resolves it to a commit and records that commit with the file's hash
    licence="apache-2.0",
)
EPSILON = 1e-6  # of (6)
GROUPS = 4  # of GroupNorm: unlike BatchNorm it does not depend on how a batch is shared out over ranks
# A of MGC-A at the start: sigmoid(-4) = 0.02 where the mask is 0, sigmoid(4) = 0.98 where it is 1 all around.
GAIN, REST = 8.0, -4.0


@config_class
class SamMultitaskConfig(ModelConfig):
    """The paper's values are the defaults. `configs/model/sam_multitask.yaml` lists what it leaves open."""

    image_size: int = setting(1024, 'Edge of the square input ("Our proposed Architecture").', unit="pixels", ge=1)
    pretrained: bool = setting(
        True,
        "SAM's encoder starts from staged weights, trained on SA-1B: `bushpc weights pull model=sam_multitask`.",
    )
    encoder: t.Literal["frozen", "full", "lora"] = setting(
        "frozen",
        "`frozen` (its features can be computed once, see loader.features), `full` (every parameter trains) or `lora` "
        "(low-rank adapters of the query, key and value maps train). The paper does not say whether its encoder "
        "trains; as it decodes SAM's embeddings, frozen is the default here.",
    )
    lora_rank: int = setting(8, "Rank of the adapters, for encoder=lora. Not in the paper.", ge=1)
    lora_alpha: float = setting(16.0, "What the adapters add is scaled by alpha / rank. Not in the paper.")
    patch_size: int = setting(16, "Edge of a patch of SAM's ViT-B/16.", unit="pixels", ge=2)
    width: int = setting(768, "Channels of SAM's ViT.", ge=1)
    depth: int = setting(12, "Blocks of SAM's ViT.", ge=1)
    heads: int = setting(12, "Attention heads of SAM's ViT.", ge=1)
    window: int = setting(14, "Edge of an attention window.", unit="tokens", ge=1)
    global_blocks: tuple[int, ...] = setting(
        (2, 5, 8, 11), "Blocks that attend over the whole image instead of a window, counted from 0."
    )
    neck: int = setting(256, "Channels of SAM's embedding.", ge=1)
    decoder: t.Literal["unet", "sd"] = setting("unet", "`unet` (UNet-H) or `sd` (SD-H) of Table 3.")
    decoder_channels: tuple[int, ...] = setting(
        (64, 32, 16, 8),
        "Channels of the decoder's stages, deepest first; each doubles the resolution, from 1/8 of the image's edge to "
        "all of it. The paper does not give them: 64 and 32 are those of SAM's own mask decoder, halved further. SD-H "
        "has the first two alone, and is enlarged the rest of the way at once.",
    )
    skip_blocks: tuple[int, ...] = setting(
        (2, 5, 8),
        "Blocks whose outputs are UNet-H's skips, counted from 0, rising; the last one goes to the first stage. The "
        'paper has "symmetric skip connections from each encoder layer", but a plain ViT has one resolution: these '
        "three, which attend over the whole image, are reduced to the stages' channels and enlarged to those at 1/2 "
        "(block 2), 1/4 (block 5) and 1/8 (block 8); block 11 is what the neck itself reads.",
    )
    mask_guided: bool = setting(
        True,
        "MGC-A of Table 3: the classifier weights the embedding by the mask; off: it reads the embedding's mean.",
    )
    classifier_width: int = setting(
        256, 'Hidden width of the classifier. The paper does not give it ("lightweight").', ge=1
    )
    segmentation_share: float = setting(0.6, "lambda of (8).", ge=0, le=1)
    curriculum: tuple[int, ...] = setting(
        (20, 20, 20),
        "Epochs in which MGC-A is shown the ground truth, either mask with equal probability, and the predicted mask "
        '("Experimental Setup"), which it is shown for as long as training lasts after that.',
        unit="epochs",
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        if self.patch_size & (self.patch_size - 1):
            raise ConfigError(f"model.patch_size={self.patch_size}: the decoders double, so a power of 2 is needed")
        for name, by in (("image_size", "patch_size"), ("width", "heads")):
            value, divisor = getattr(self, name), getattr(self, by)
            if value % divisor:
                nearest = max(1, round(value / divisor)) * divisor
                raise ConfigError(
                    f"model.{name}={value} is not a multiple of model.{by}={divisor}; the nearest is {nearest}"
                )
        self._check_blocks("global_blocks", self.global_blocks)
        self._check_blocks("skip_blocks", self.skip_blocks)
        self._check_decoder()
        if len(self.curriculum) != 3 or min(self.curriculum) < 0:
            raise ConfigError(
                f"model.curriculum={list(self.curriculum)}: three numbers of epochs are needed, 0 or more each: with "
                "the ground truth, with either mask, with the predicted mask"
            )
        shape = (self.patch_size, self.width, self.depth, self.heads, self.window, self.global_blocks, self.neck)
        sam = (16, 768, 12, 12, 14, (2, 5, 8, 11), 256)
        if self.pretrained and shape != sam:
            raise ConfigError(
                "pretrained=true loads SAM's ViT-B, and (patch_size, width, depth, heads, window, global_blocks, neck) "
                f"are {shape}, not {sam}. Use those, or pretrained=false."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Image, mask and label; no sentence."""
        return frozenset({"image_BCHW", "mask_BKHW", "label_B"})

    def weight_files(self) -> list[WeightFile]:
        """SAM's ViT-B as timm keeps it."""
        return [SAM_VIT_B] if self.pretrained else []

    @property
    def feature_settings(self) -> dict[str, t.Any]:
        """Those of the encoder, if it is frozen; nothing else changes what `features` are."""
        if self.encoder != "frozen":
            return {}
        names = ("image_size", "patch_size", "width", "depth", "heads", "window", "global_blocks", "neck")
        return {**{name: getattr(self, name) for name in names}, "outputs": _outputs(self)}

    @property
    def blocks(self) -> tuple[type, ...]:
        """The ViT's blocks, and those of the decoder."""
        from timm.models.vision_transformer_sam import Block

        return Block, ConvNormAct, UNetStage

    @property
    def stages(self) -> int:
        """Doublings from the encoder's grid to the image."""
        return self.patch_size.bit_length() - 1

    def _check_blocks(self, name: str, blocks: tuple[int, ...]) -> None:
        if list(blocks) != sorted(set(blocks)) or not all(0 <= block < self.depth for block in blocks):
            raise ConfigError(
                f"model.{name}={list(blocks)}: name blocks from 0 to {self.depth - 1}, each once, in rising order"
            )

    def _check_decoder(self) -> None:
        channels = self.decoder_channels
        if not channels or any(count < 1 or count % GROUPS for count in channels):
            raise ConfigError(f"model.decoder_channels={list(channels)}: multiples of {GROUPS} are needed")
        if len(channels) != self.stages:
            raise ConfigError(
                f"model.decoder_channels={list(channels)}: {self.stages} numbers are needed, one for each doubling "
                f"from patches of {self.patch_size} pixels to the image"
            )
        if len(self.skip_blocks) > self.stages:
            raise ConfigError(f"model.skip_blocks={list(self.skip_blocks)}: there are {self.stages} stages")


class SamMultitask(Model):
    """Segmentation and classification from one encoder; one mask class, three labels.

    `features` are the neck's embedding "neck", and for `unet` the outputs of the skip blocks, "block2" …
    """

    Config = SamMultitaskConfig
    makes = frozenset({"prob_BKHW", "class_prob_BL"})

    config: SamMultitaskConfig

    def __init__(self, config: SamMultitaskConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)  # SAM's own, in units of [0, 1]
        if config.encoder == "frozen":
            self.frozen = FrozenEncoder(config, weights_dir)
        else:
            self.encoder = build_encoder(config, weights_dir)
        if config.encoder == "lora":
            from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

            rank, alpha = config.lora_rank, t.cast(int, config.lora_alpha)  # peft only divides by the rank
            lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["qkv"])
            inject_adapter_in_model(lora, self.encoder)  # which freezes everything else
        self.decoder = UNetDecoder(config) if config.decoder == "unet" else SimpleDecoder(config)
        self.classifier = Classifier(config)

    def backbone(self) -> nn.Module:
        """timm's network."""
        return self.frozen.net if self.config.encoder == "frozen" else self.encoder

    def outside_state(self) -> dict[str, nn.Module]:
        """The encoder, if it is frozen; `FrozenEncoder` says why no checkpoint holds it."""
        return {"encoder": self.frozen.net} if self.config.encoder == "frozen" else {}

    def cam_layer(self) -> nn.Module:
        """The decoder's last stage; behind it there is only a 1 x 1 convolution."""
        return self.decoder.stages[-1]

    def features(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the decoder and the classifier read: name → B x channels x h x w."""
        if self.config.encoder == "frozen":
            return self.frozen(image_BCHW, self.normalize)
        return encode(self.encoder, self.normalize(image_BCHW, self.encoder), self.config)

    def forward(self, batch: Batch) -> Losses:
        """(8): lambda (BCE + Dice) + (1 - lambda) cross-entropy; terms "bce", "dice" and "ce".

        The Dice term of a scan without a lesion is 1 - epsilon / (sum of p + epsilon) by (6): 1 to six digits and
        without a gradient as soon as any pixel is predicted, so that BCE alone teaches an empty mask.
        The classification's gradient goes on through the predicted mask: the paper wants "end-to-end dependency on
        the segmentation branch", and its classification to "guide the segmentation network".
        """
        features = batch.features or self.features(batch.image_BCHW)
        logits_BKHW = self.decoder(features)
        guide_BKHW = logits_BKHW.float().sigmoid()
        if self.config.mask_guided and self.training:  # held-out samples are judged as new ones are
            given_B = shows_ground_truth(batch.epochs, self.config.curriculum).to(guide_BKHW.device)
            guide_BKHW = torch.where(given_B[:, None, None, None], batch.mask_BKHW, guide_BKHW)
        bce = bce_loss(logits_BKHW, batch.mask_BKHW)
        dice = soft_dice_loss(logits_BKHW, batch.mask_BKHW, smooth=EPSILON)
        ce = labelled_cross_entropy(self.classifier(features["neck"], guide_BKHW), batch.label_B)
        share = self.config.segmentation_share
        return Losses(
            total=share * (bce + dice) + (1 - share) * ce,
            terms={"bce": bce.detach(), "dice": dice.detach(), "ce": ce.detach()},
        )

    def predict(self, batch: Batch) -> Prediction:
        """Mask and label in one pass; the classifier is guided by the predicted mask. `Batch.mask_BKHW` is not read."""
        features = batch.features or self.features(batch.image_BCHW)
        prob_BKHW = self.decoder(features).float().sigmoid()
        class_logits_BL = self.classifier(features["neck"], prob_BKHW)
        return Prediction(prob_BKHW=prob_BKHW, class_prob_BL=class_logits_BL.float().softmax(dim=1))


# --- curriculum -------------------------------------------------------------------------------------------------


def shows_ground_truth(epochs: list[int], curriculum: tuple[int, ...]) -> torch.Tensor:
    """Which of B samples, by their epochs, show the classifier the ground-truth mask: B booleans, on the CPU.

    In the middle phase each draws from torch's generator, which training seeds by step and rank.
    """
    truth, either, _ = curriculum
    chance_B = torch.tensor([1.0 if e < truth else 0.5 if e < truth + either else 0.0 for e in epochs])
    return torch.rand(len(epochs)) < chance_B


# --- encoder ----------------------------------------------------------------------------------------------------


class FoldedAttention(nn.Module):
    """timm's attention of SAM with its decomposed relative positions, without ever holding an N x N map.

    timm adds the positions as a bias of N x N to each head, 400 MB of it per image and global block at 1024 x 1024 in
    bf16, and leaves the memory-saving kernels out, as it gives them three dimensions. But the bias is a scalar product
    too, (q · R_h)[kh] + (q · R_w)[kw] of a key at (kh, kw): with q' = [s q, q R_h, q R_w] and k' = [k, e_kh, e_kw], e
    unit vectors, q' · k' is s q · k plus the bias, exactly. It costs three times the products, and no memory.

    `build_encoder` makes timm's modules into these: the same parameters under the same names.
    """

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    head_dim: int
    scale: float
    rel_pos_h: torch.Tensor
    rel_pos_w: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: B x h x w x channels, and so is what comes back."""
        from timm.models.vision_transformer_sam import get_rel_pos

        B, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(B, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q_BMND, k_BMND, v_BMND = qkv.unbind(0)
        q_BMhwD = q_BMND.unflatten(2, (h, w))
        rel_h = torch.einsum("bmhwd,hkd->bmhwk", q_BMhwD, get_rel_pos(h, h, self.rel_pos_h).to(q_BMND.dtype))
        rel_w = torch.einsum("bmhwd,wkd->bmhwk", q_BMhwD, get_rel_pos(w, w, self.rel_pos_w).to(q_BMND.dtype))
        place_N = torch.arange(h * w, device=x.device)
        unit_NP = torch.cat([F.one_hot(place_N // w, h), F.one_hot(place_N % w, w)], dim=1).to(q_BMND.dtype)
        unit_BMNP = unit_NP.expand(B, self.num_heads, -1, -1)
        q = torch.cat([q_BMND * self.scale, rel_h.flatten(2, 3), rel_w.flatten(2, 3)], dim=-1)
        k = torch.cat([k_BMND, unit_BMNP], dim=-1)
        # The kernels that hold no N x N map want one width for all three, a multiple of 8.
        width = q.shape[-1] + -q.shape[-1] % 8
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v_BMND))
        out_BMND = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., : self.head_dim]
        return self.proj(out_BMND.transpose(1, 2).reshape(B, h, w, -1))


def build_encoder(config: SamMultitaskConfig, weights_dir: str | None) -> VisionTransformerSAM:
    """SAM's image encoder, with staged weights where the config says so. Raises: WeightsError."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM, checkpoint_filter_fn

    encoder = VisionTransformerSAM(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
        neck_chans=config.neck,
        use_rel_pos=True,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]  # SAM's own; timm's default is 1e-5
    )
    if config.pretrained:
        staged = weights.load_staged(SamMultitask, SAM_VIT_B, weights_dir)
        with weights.fits(SamMultitask, SAM_VIT_B):
            encoder.load_state_dict(_on_its_grid(checkpoint_filter_fn(staged, encoder), encoder))
    for block in encoder.blocks:
        block.attn.__class__ = FoldedAttention  # the same parameters under the same names; timm has no door for it
    return encoder


def _on_its_grid(state: dict[str, torch.Tensor], encoder: VisionTransformerSAM) -> dict[str, torch.Tensor]:
    """SAM's positions, which are those of 1024 x 1024 pixels, interpolated as timm would in every step.

    The shapes then follow from the settings alone, and an export loads without SAM's own file.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed_nhwc

    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    state = dict(state)
    for name in state.keys() & shapes.keys():
        if name == "pos_embed":
            state[name] = resample_abs_pos_embed_nhwc(state[name], list(shapes[name][1:3]))
        elif ".rel_pos_" in name and state[name].shape != shapes[name]:
            state[name] = F.interpolate(state[name].T[None], size=shapes[name][0], mode="linear")[0].T
    return state


def encode(
    encoder: VisionTransformerSAM, image_BCHW: torch.Tensor, config: SamMultitaskConfig
) -> dict[str, torch.Tensor]:
    """The outputs that `config` needs of a normalised image."""
    if config.decoder == "sd" or not config.skip_blocks:
        return {"neck": encoder.forward_features(image_BCHW)}
    neck, skips = encoder.forward_intermediates(image_BCHW, indices=list(config.skip_blocks))
    return dict(zip(_outputs(config), (neck, *skips), strict=True))


def _outputs(config: SamMultitaskConfig) -> list[str]:
    return ["neck", *(f"block{i}" for i in config.skip_blocks if config.decoder == "unet")]


class FrozenEncoder:
    """SAM's encoder where it is not trained, on the device only while it is used.

    Deliberately no nn.Module. As a part of the model its 359 MB would be written into every run's checkpoints,
    broadcast by DDP, and held on every GPU, even if its features are cached and it never runs. So it must be the same
    without a checkpoint: staged weights, or a random draw from a separate seed.

    net: timm's VisionTransformerSAM, in eval mode.
    """

    SEED = 2023

    def __init__(self, config: SamMultitaskConfig, weights_dir: str | None) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.SEED)
            self.net = build_encoder(config, weights_dir)
        self.net.requires_grad_(False).eval()

    @not_compiled  # it moves between devices
    @torch.no_grad()
    def __call__(self, image_BCHW: torch.Tensor, normalize: Normalize) -> dict[str, torch.Tensor]:
        """The features, in the type of autocast where it is on, laid out alike: a store makes no difference."""
        net, device = self.net.to(image_BCHW.device), image_BCHW.device.type
        features = encode(net, normalize(image_BCHW, net), self.config)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image_BCHW.dtype
        return {name: value.to(dtype).contiguous() for name, value in features.items()}


# --- decoders and classifier ------------------------------------------------------------------------------------


class ConvNormAct(nn.Sequential):
    """3 x 3 convolution, normalisation, activation."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__(nn.Conv2d(given, made, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, made), nn.GELU())


class SimpleDecoder(nn.Module):
    """SD-H: two convolutions, each followed by bilinear upsampling, from the neck alone; no skips."""

    def __init__(self, config: SamMultitaskConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        channels = (config.neck, *config.decoder_channels[:2])
        self.stages = nn.ModuleList(ConvNormAct(*pair) for pair in itertools.pairwise(channels))
        self.head = nn.Conv2d(channels[-1], 1, kernel_size=1)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits B x 1 x H x W."""
        x = features["neck"]
        for stage in self.stages:
            x = F.interpolate(stage(x), scale_factor=2, mode="bilinear", align_corners=False)
        rest = self.patch_size >> len(self.stages)
        return F.interpolate(self.head(x), scale_factor=rest, mode="bilinear", align_corners=False)


class UNetDecoder(nn.Module):
    """UNet-H: transposed convolutions from the neck to the image's size, with skips from the encoder's blocks."""

    def __init__(self, config: SamMultitaskConfig) -> None:
        super().__init__()
        channels = (config.neck, *config.decoder_channels)
        blocks: list[int | None] = [*reversed(config.skip_blocks), *[None] * config.stages][: config.stages]
        self.stages = nn.ModuleList(
            UNetStage(given, made, config.width, block)
            for (given, made), block in zip(itertools.pairwise(channels), blocks, strict=True)
        )
        self.head = nn.Conv2d(channels[-1], 1, kernel_size=1)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits B x 1 x H x W."""
        x = features["neck"]
        for stage in self.stages:
            x = stage(x, features)
        return self.head(x)


class UNetStage(nn.Module):
    """One doubling: a transposed convolution, and where there is a skip, its concatenation and a convolution of both.

    A plain ViT has one resolution: its blocks' outputs are reduced to fewer channels and enlarged to this stage's size.
    """

    def __init__(self, given: int, made: int, width: int, block: int | None) -> None:
        super().__init__()
        self.block = block
        self.up = nn.ConvTranspose2d(given, made, 2, stride=2)
        if block is not None:
            # Blocks' outputs are the bare residual stream, of any size: normalised before all else.
            self.skip = nn.Sequential(nn.Conv2d(width, made, 1), nn.GroupNorm(GROUPS, made), nn.GELU())
            self.fuse: nn.Module = ConvNormAct(2 * made, made)
        else:  # as in SAM's own decoder
            self.fuse = nn.Sequential(nn.GroupNorm(GROUPS, made), nn.GELU())

    def forward(self, x: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """B x given x h x w to B x made x 2h x 2w."""
        x = self.up(x)
        if self.block is not None:
            skip = self.skip(features[f"block{self.block}"])
            skip = F.interpolate(skip, size=x.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.cat([x, skip], dim=1)
        return self.fuse(x)


class Classifier(nn.Module):
    """Label from the embedding F: its mean, and with MGC-A its mean weighted by the mask, through two linear layers.

    A = sigmoid(conv(mask at F's grid)), and the weighted mean is sum(A ⊙ F) / sum(A). Without a lesion A is the same
    everywhere but at the border, and the weighted mean nearly the mean itself.
    """

    def __init__(self, config: SamMultitaskConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.attention = nn.Conv2d(1, 1, 3, padding=1) if config.mask_guided else None
        if self.attention is not None:
            nn.init.constant_(self.attention.weight, GAIN / 9)
            nn.init.constant_(t.cast(torch.Tensor, self.attention.bias), REST)
        given = config.neck * (2 if config.mask_guided else 1)
        self.mlp = nn.Sequential(
            nn.Linear(given, config.classifier_width), nn.GELU(), nn.Linear(config.classifier_width, len(LABELS))
        )

    def forward(self, F_BChw: torch.Tensor, mask_BKHW: torch.Tensor) -> torch.Tensor:
        """Logits B x L. mask_BKHW: in [0, 1], ground truth or predicted; read by MGC-A alone."""
        F_BChw = F_BChw.float()  # sums over thousands of places
        pooled = [F_BChw.mean(dim=(2, 3))]
        if self.attention is not None:
            A_B1hw = self.attention(F.avg_pool2d(mask_BKHW, self.patch_size)).float().sigmoid()
            pooled.append((A_B1hw * F_BChw).sum(dim=(2, 3)) / A_B1hw.sum(dim=(2, 3)))
        return self.mlp(torch.cat(pooled, dim=1))
