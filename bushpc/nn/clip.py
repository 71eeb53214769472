"""CLIP's frozen towers: sentences and pictures → embeddings, each asked once per distinct sentence.

    sentences ─tokenize, text tower─→ T(p), B x E
    pictures  ─image tower──────────→ V(x), B x E

Both towers are no modules of the model that reads them, see `TextEncoder`.
"""

from __future__ import annotations

import typing as t
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from bushpc.conditions.words import refuse_long
from bushpc.config import WeightFile
from bushpc.errors import ConfigError
from bushpc.nn.uncompiled import not_compiled

CLIP_VIT_B16 = WeightFile(
    name="clip_vit_b16_openai.safetensors",
    hub_repo="timm/vit_base_patch16_clip_224.openai",
    hub_file="open_clip_model.safetensors",
    revision="main",  # `weights pull` resolves it to a commit and records that commit with the file's hash
    licence="apache-2.0",  # timm's word for its copy
)
# open_clip's OPENAI_DATASET_MEAN and _STD, without importing open_clip.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TextSizes(t.Protocol):
    """Settings of a text tower: channels, layers, heads, and the width of an embedding."""

    @property
    def text_width(self) -> int: ...

    @property
    def text_layers(self) -> int: ...

    @property
    def text_heads(self) -> int: ...

    @property
    def text_dim(self) -> int: ...

    @property
    def pretrained(self) -> bool: ...


class ImageSizes(t.Protocol):
    """Settings of an image tower: patch size in pixels, channels, blocks and heads."""

    @property
    def clip_patch_size(self) -> int: ...

    @property
    def clip_width(self) -> int: ...

    @property
    def clip_layers(self) -> int: ...

    @property
    def clip_heads(self) -> int: ...

    @property
    def pretrained(self) -> bool: ...


def check_text_tower(config: TextSizes) -> None:
    """Refuse sizes that cannot be built, or that CLIP's weights do not fit. Raises: ConfigError."""
    check_divides("text_heads", config.text_heads, "text_width", config.text_width)
    shape = (config.text_width, config.text_layers, config.text_heads, config.text_dim)
    if config.pretrained and shape != (512, 12, 8, 512):
        raise ConfigError(
            "pretrained=true loads CLIP's ViT-B/16, and (text_width, text_layers, text_heads, text_dim) "
            f"are {shape}, not (512, 12, 8, 512). Use those, or pretrained=false."
        )


def check_image_tower(config: ImageSizes) -> None:
    """Refuse sizes that cannot be built, or that CLIP's weights do not fit. Raises: ConfigError."""
    check_divides("clip_heads", config.clip_heads, "clip_width", config.clip_width)
    shape = (config.clip_patch_size, config.clip_width, config.clip_layers, config.clip_heads)
    if config.pretrained and shape != (16, 768, 12, 12):
        raise ConfigError(
            "pretrained=true loads CLIP's ViT-B/16, and (clip_patch_size, clip_width, clip_layers, clip_heads) "
            f"are {shape}, not (16, 768, 12, 12). Use those, or pretrained=false."
        )


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raises: ConfigError with the nearest multiple."""
    if value % divisor:
        nearest = max(1, round(value / divisor)) * divisor
        raise ConfigError(f"{name}={value} is not a multiple of {divisor_name}={divisor}; the nearest is {nearest}.")


def text_part(clip_state: t.Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text tower's tensors in CLIP's file."""
    return {name: tensor for name, tensor in clip_state.items() if not name.startswith(("visual.", "logit_"))}


def image_part(clip_state: t.Mapping[str, torch.Tensor], tower: nn.Module) -> dict[str, torch.Tensor]:
    """The image tower's tensors in CLIP's file, its positions interpolated bicubically to the grid of `tower`."""
    from open_clip.model import resize_pos_embed

    state = {name: tensor for name, tensor in clip_state.items() if name.startswith("visual.")}
    resize_pos_embed(state, SimpleNamespace(visual=tower))
    return {name.removeprefix("visual."): tensor for name, tensor in state.items()}


class TextEncoder:
    """T of (9): CLIP's text tower, frozen, asked once per distinct sentence.

    Deliberately no nn.Module. As a part of the model its weights would be written into every checkpoint
    and broadcast by DDP; under ZeRO-3, ranks that meet a new sentence at different steps would wait for
    each other for ever in the gathering of the tower's parameters. So the tower must be the same without
    a checkpoint: staged weights, or a random draw from a separate seed.

    e = sqrt(d) (T(p) - T("")) / |T(p) - T("")|, and 0 for "", so a sentence that was dropped asks for no
    modulation beyond the biases of the layers that read e. The shift is one that those biases can undo.
    The scale makes the components about 1 whatever the tower: without it |T(p)| is 7 for the small random
    tower and 22 for a random one of CLIP's size. Sentences that differ in one word stay apart: their
    cosine is at most 0.997 and 0.8 on average for random towers, before the shift and after it.

    tower: open_clip's TextTransformer, in eval mode.
    """

    SEED = 2021

    def __init__(self, config: TextSizes, clip_state: dict[str, torch.Tensor] | None) -> None:
        """clip_state: CLIP's file, or None for a random draw. Raises: RuntimeError if it does not fit."""
        from open_clip.transformer import QuickGELU, TextTransformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.SEED)
            self.tower = TextTransformer(
                width=config.text_width,
                heads=config.text_heads,
                layers=config.text_layers,
                output_dim=config.text_dim,
                act_layer=QuickGELU,
            )
        if clip_state is not None:
            self.tower.load_state_dict(text_part(clip_state))
        self.tower.requires_grad_(False).eval()
        self._raw: dict[str, torch.Tensor] = {}

    # Not compiled: there would be a graph for each sentence, and which were compiled would depend on the start.
    @not_compiled
    def __call__(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """e of B sentences, B x E, float32, on `device`."""
        raw_BE, nothing_1E = self._raw_of(prompts, device), self._raw_of([""], device)
        e_BE: torch.Tensor = F.normalize(raw_BE - nothing_1E, dim=-1) * raw_BE.shape[-1] ** 0.5
        return e_BE.to(device)

    @not_compiled
    def plain(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """T(p) of B sentences, B x E, float32, on `device`."""
        return self._raw_of(prompts, device).to(device)

    def _raw_of(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._raw:
                self._raw[prompt] = self._embed(prompt, device)
        return torch.stack([self._raw[prompt] for prompt in prompts])

    def _embed(self, prompt: str, device: torch.device) -> torch.Tensor:
        # One sentence at a time: in a batch its last digits would depend on its neighbours, and a resumed
        # run meets the sentences in other company than the run it must repeat. Not in inference mode: the
        # tensor is kept, and training saves it for the backward pass.
        from open_clip.tokenizer import tokenize

        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            e_1E: torch.Tensor = self.tower.to(device)(tokenize([refuse_long(prompt, "a prompt")]).to(device))
            return e_1E[0].cpu()


class ImageEncoder:
    """V: CLIP's whole image tower, frozen, with the projection into the space of sentences. No nn.Module, as above."""

    SEED = 2022

    def __init__(self, config: ImageSizes, size: int, dim: int, clip_state: dict[str, torch.Tensor] | None) -> None:
        """dim: width of an embedding. clip_state: as in `TextEncoder`. Raises: RuntimeError if it does not fit."""
        from open_clip.transformer import QuickGELU, VisionTransformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.SEED)
            self.tower = VisionTransformer(
                image_size=size,
                patch_size=config.clip_patch_size,
                width=config.clip_width,
                layers=config.clip_layers,
                heads=config.clip_heads,
                mlp_ratio=4.0,
                output_dim=dim,
                act_layer=QuickGELU,
            )
        if clip_state is not None:
            self.tower.load_state_dict(image_part(clip_state, self.tower))
        self.tower.requires_grad_(False).eval()

    @not_compiled
    def __call__(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """V(x), B x E, float32, of pictures of `size` that are already normalised."""
        with torch.no_grad(), torch.autocast(image_BCHW.device.type, enabled=False):
            e_BE: torch.Tensor = self.tower.to(image_BCHW.device)(image_BCHW.float())
            return e_BE
