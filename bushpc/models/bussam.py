"""BUSSAM (Tu et al. 2024): SAM with adapters and a CNN beside its ViT, asked by a point or a box.

    image ─patches, adapter─ViT blocks, with adapters in some ─┬─neck─┬─two-way transformer─→ logits
              │                 ↑↓ cross-branch                │      │
              └─CNN ────────────┴──────────────── x 1/2 ───────┘      place ─SAM's prompt encoder

The ViT is the one of `bushpc.models.sam_multitask`, prompt encoder and mask decoder are transformers'. The adapters,
the CNN and the mask decoder train, SAM's other weights are frozen. By the publication's description and the sizes in
its release; different from there: SAM's patches of 16 pixels are kept (there 8), the mask decoder trains (there it is
frozen), as its weights come from another file and may be absent, and the CNN stage has plain convolutions.
"""

from __future__ import annotations

import itertools
import typing as t

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.conditions import Condition, Variant
from bushpc.conditions.places import PlacePrompt
from bushpc.conditions.variants import SPATIAL
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.overlap import overlap_losses, require_loss
from bushpc.models.base import Model
from bushpc.models.sam_multitask import ConvNormAct, SamMultitaskConfig, build_encoder
from bushpc.nn.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from bushpc.sample import Batch, Losses, Prediction

SAM_PROMPTED = WeightFile(
    name="sam_vit_b_prompted.safetensors",
    hub_repo="facebook/sam-vit-base",
    hub_file="model.safetensors",
    revision="main",  # `weights pull` resolves it to a commit and records that commit with the file's hash
    licence="apache-2.0",
)
VARIANTS = ("first_pass", "oracle", "none")
NO_POINT = -1  # SAM's label of a point that is none


@config_class
class BussamConfig(SamMultitaskConfig):
    """SAM's ViT-B at the release's 256 pixels. The fields of decoder and classifier of sam_multitask are not read."""

    image_size: int = setting(256, "Edge of the square input, as in the release.", unit="pixels", ge=1)
    pretrained: bool = setting(
        True, "SAM starts from staged weights, trained on SA-1B: `bushpc weights pull model=bussam`."
    )
    prompt: t.Literal["point", "box"] = setting("point", "What SAM is asked by. Released: a point.")
    cross_blocks: tuple[int, ...] = setting(
        (2, 5, 8, 11),
        "Blocks of the ViT that have adapters and take in the CNN's features, counted from 0: SAM's global ones.",
    )
    adapter_ratio: float = setting(0.25, "Width of an adapter in shares of the ViT's.", gt=0, le=1)
    decoder_width: int = setting(2048, "Hidden width of SAM's two-way transformer.", ge=1)
    decoder_heads: int = setting(8, "Attention heads of SAM's two-way transformer.", ge=1)
    dice_weight: float = setting(0.8, "Weight of the soft Dice loss.", ge=0, lt=float("inf"))
    bce_weight: float = setting(0.2, "Weight of the cross-entropy loss.", ge=0, lt=float("inf"))

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        self._check_blocks("cross_blocks", self.cross_blocks)
        require_loss(self)
        if self.neck % (4 * self.decoder_heads):
            raise ConfigError(
                f"model.neck={self.neck} is no multiple of 4 x model.decoder_heads={self.decoder_heads}; choose other "
                "numbers"
            )

    @property
    def title(self) -> str:
        """As the publication has it."""
        return "BUSSAM"

    @property
    def needs(self) -> frozenset[str]:
        """Image and mask; the place is a condition."""
        return frozenset({"image_BCHW", "mask_BKHW"})

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The place."""
        return (PlacePrompt(kind=self.prompt),)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Of the place."""
        return tuple(variant for variant in SPATIAL if variant.name in VARIANTS)

    @property
    def feature_settings(self) -> dict[str, t.Any]:
        """Adapters change the encoder's outputs."""
        return {}

    def weight_files(self) -> list[WeightFile]:
        """The ViT as timm keeps it, and all of SAM."""
        return [*super().weight_files(), SAM_PROMPTED] if self.pretrained else []


class Bussam(Model):
    """SAM for breast ultrasound, asked by a place; one mask class.

    First pass and second: where a place is a function of the first prediction (`FirstPlace`), no place gives a
    probability map, the function turns it into a place, and that gives the prediction.
    """

    Config = BussamConfig
    makes = frozenset({"prob_BKHW", "conditions"})

    config: BussamConfig

    def __init__(self, config: BussamConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)  # SAM's own, in units of [0, 1]
        self.vit = build_encoder(config, weights_dir)
        self.vit.requires_grad_(not config.pretrained)  # a random one would give noise
        self.cnn = Cnn(config)
        self.entry = Adapter(config.width, config.adapter_ratio)
        self.crossings = nn.ModuleDict({str(block): Crossing(config) for block in config.cross_blocks})
        self.prompts, self.decoder = build_sam(config)
        if config.pretrained:
            _load(self.prompts, self.decoder, weights.load_staged(type(self), SAM_PROMPTED, weights_dir))
        self.prompts.requires_grad_(False)
        # What its other outputs need gets no gradient, and DDP stops at that.
        for name, parameter in self.decoder.named_parameters():
            unused = name.startswith("iou_prediction_head") or name.startswith(
                tuple(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3))
            )
            parameter.requires_grad_(not unused)

    def backbone(self) -> nn.Module:
        """SAM's ViT."""
        return self.vit

    def cam_layer(self) -> nn.Module:
        """The neck, which the mask decoder reads."""
        return self.vit.neck

    def forward(self, batch: Batch) -> Losses:
        """Soft Dice and cross-entropy of the logits, weighted; terms "dice" and "bce"."""
        logits_BKHW = self._ask(self._embed(batch.image_BCHW), batch.conditions["place_prompts"])
        return overlap_losses(
            logits_BKHW,
            batch.mask_BKHW,
            dice_weight=self.config.dice_weight,
            bce_weight=self.config.bce_weight,
        )

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities, and the places that gave them. `Batch.mask_BKHW` is not read."""
        F_BChw, given = self._embed(batch.image_BCHW), batch.conditions["place_prompts"]
        places = [() if callable(place) else place for place in given]
        prob_BKHW = self._ask(F_BChw, places).float().sigmoid()
        if any(map(callable, given)):
            maps = prob_BKHW[:, 0].cpu().numpy()
            places = [place(prob_HW) if callable(place) else place for place, prob_HW in zip(given, maps, strict=True)]
            prob_BKHW = self._ask(F_BChw, places).float().sigmoid()
        return Prediction(prob_BKHW=prob_BKHW, conditions={"place_prompts": places})

    def _embed(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """SAM's embedding, B x neck x h x w."""
        image_BCHW = self.normalize(image_BCHW, self.vit)
        local_BhwC = self.cnn(image_BCHW)
        x_BhwC = self.vit.patch_embed(image_BCHW)
        x_BhwC = x_BhwC + self.entry(x_BhwC) + self.vit.pos_embed
        for index, block in enumerate(self.vit.blocks):
            if str(index) in self.crossings:
                x_BhwC, local_BhwC = self.crossings[str(index)](x_BhwC, local_BhwC)
            x_BhwC = block(x_BhwC)
        F_BChw: torch.Tensor = self.vit.neck((x_BhwC + 0.5 * local_BhwC).permute(0, 3, 1, 2))
        return F_BChw

    def _ask(self, F_BChw: torch.Tensor, places: list[tuple[float, ...]]) -> torch.Tensor:
        """Logits B x 1 x H x W."""
        sparse, dense = self._prompted(places, F_BChw.device)
        masks, _ = self.decoder(
            image_embeddings=F_BChw,
            image_positional_embeddings=self._positions(F_BChw).expand(len(places), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        size = (self.config.image_size, self.config.image_size)
        return F.interpolate(masks[:, 0], size=size, mode="bilinear", align_corners=False)

    def _prompted(self, places: list[tuple[float, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM's tokens of the places, two each, and its map without a mask. A missing place is two points that are
        none: so every image of a batch has as many tokens.
        """
        edge = self.config.image_size
        corners = torch.tensor([(*place, *(0,) * (4 - len(place))) for place in places], device=device) * edge
        corners_B122 = corners.view(len(places), 1, 2, 2)  # SAM's code adds half a pixel to whole ones; ours are edges
        kinds = {0: (NO_POINT, NO_POINT), 2: (1, NO_POINT), 4: (2, 3)}  # 2, 3: corners of a box
        labels_B12 = torch.tensor([kinds[len(place)] for place in places], device=device)[:, None]
        tokens_B12C = self.prompts.shared_embedding(corners_B122, (edge, edge))
        none = labels_B12[..., None] == NO_POINT
        tokens_B12C = torch.where(none, self.prompts.not_a_point_embed.weight, tokens_B12C)
        for kind, embedding in enumerate(self.prompts.point_embed):
            tokens_B12C = tokens_B12C + embedding.weight * (labels_B12[..., None] == kind)
        edge_hw = self.config.image_size // self.config.patch_size
        dense = self.prompts.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(len(places), -1, edge_hw, edge_hw)
        return tokens_B12C, dense

    def _positions(self, F_BChw: torch.Tensor) -> torch.Tensor:
        """SAM's code of each place of the embedding, 1 x C x h x w."""
        h, w = F_BChw.shape[-2:]
        y = (torch.arange(h, device=F_BChw.device) + 0.5) / h
        x = (torch.arange(w, device=F_BChw.device) + 0.5) / w
        grid_1hw2 = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)[None]
        return self.prompts.shared_embedding(grid_1hw2).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Adapter(nn.Module):
    """Linear, GELU, linear; the second starts at zero, so that SAM is SAM at the start."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, int(width * ratio))
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return t.cast(torch.Tensor, self.up(F.gelu(self.down(x))))


class Crossing(nn.Module):
    """Where the branches meet: the ViT takes in what the CNN has, and the CNN goes on by one convolution."""

    def __init__(self, config: BussamConfig) -> None:
        super().__init__()
        self.adapter = Adapter(config.width, config.adapter_ratio)
        self.refine = ConvNormAct(config.width, config.width)

    def forward(self, x_BhwC: torch.Tensor, local_BhwC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_BhwC = x_BhwC + self.adapter(x_BhwC + local_BhwC)
        return x_BhwC, self.refine(local_BhwC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Cnn(nn.Module):
    """The CNN branch: from the image to the ViT's grid and width, the channels doubled at each halving."""

    def __init__(self, config: BussamConfig) -> None:
        super().__init__()
        least = max(4, config.width >> config.stages)
        widths = [least << level for level in range(config.stages)] + [config.width]
        self.stages = nn.ModuleList(ConvNormAct(*pair) for pair in itertools.pairwise((3, *widths)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W to B x h x w x C."""
        for level, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if level else x)
        return x.permute(0, 2, 3, 1)


def build_sam(config: BussamConfig) -> tuple[t.Any, t.Any]:
    """transformers' prompt encoder and mask decoder of SAM, at this model's size."""
    from transformers import SamConfig
    from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

    size = {"image_size": config.image_size, "patch_size": config.patch_size}
    settings: t.Any = SamConfig(
        vision_config={"num_pos_feats": config.neck // 2, **size},
        prompt_encoder_config={"hidden_size": config.neck, **size},
        mask_decoder_config={
            "hidden_size": config.neck,
            "mlp_dim": config.decoder_width,
            "num_attention_heads": config.decoder_heads,
        },
    )
    settings.mask_decoder_config._attn_implementation = "sdpa"
    prompts = SamPromptEncoder(settings)
    del prompts.mask_embed  # no mask is ever given
    return prompts, SamMaskDecoder(settings.mask_decoder_config)


def _load(prompts: nn.Module, decoder: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Raises: WeightsError."""
    code = "shared_image_embedding.positional_embedding"
    for module, prefix in ((prompts, "prompt_encoder."), (decoder, "mask_decoder.")):
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        own = {name: value for name, value in own.items() if not name.startswith("mask_embed.")}
        if module is prompts and code in state:
            own["shared_embedding.positional_embedding"] = state[code]
        with weights.fits(Bussam, SAM_PROMPTED):
            module.load_state_dict(own)
