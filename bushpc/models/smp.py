"""segmentation-models-pytorch: any of its architectures on any of its encoders, timm's networks included.

    architecture + encoder + their weights, each by one word ─SmpConfig→ Smp

Whether the two fit each other and the image is found out when the settings are composed (`bushpc.nn.probe`).
"""

from __future__ import annotations

import functools
import typing as t

import torch
from torch import nn

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError, unknown_name
from bushpc.models.one_mask import OneMask, OneMaskConfig
from bushpc.nn.pretrained import TIMM, Colour, normalisation_of_smp, timm_facts, unknown_encoder
from bushpc.nn.probe import Found, probe

ArchitectureName = t.Literal[
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "DeepLabV3",
    "DeepLabV3Plus",
    "PAN",
    "UPerNet",
    "Segformer",
    "DPT",
]


class Architecture(t.NamedTuple):
    """What the library calls the widths of a decoder (one number each, or one list of all stages), and its depth."""

    widths: tuple[str, ...]
    depth: int = 5
    a_list: bool = False
    stride: int | None = None  # of the deepest features, where the decoder has the encoder dilated


ARCHITECTURES: dict[str, Architecture] = {
    "Unet": Architecture(("decoder_channels",), a_list=True),
    "UnetPlusPlus": Architecture(("decoder_channels",), a_list=True),
    "MAnet": Architecture(("decoder_channels",), a_list=True),
    "Linknet": Architecture(()),
    "FPN": Architecture(("decoder_pyramid_channels", "decoder_segmentation_channels")),
    "PSPNet": Architecture(("psp_out_channels",), depth=3),
    "DeepLabV3": Architecture(("decoder_channels",), stride=8),
    "DeepLabV3Plus": Architecture(("decoder_channels",), stride=16),
    "PAN": Architecture(("decoder_channels",), stride=16),
    "UPerNet": Architecture(("decoder_channels",)),
    "Segformer": Architecture(("decoder_segmentation_channels",)),
    "DPT": Architecture(("decoder_fusion_channels",), depth=4),
}


WIDTHS = (256, 128, 64, 32, 16)  # the library's default of a decoder with five stages
# Of the shipped configs, known to fit: building them to find out would take seconds of every command.
SHIPPED = (("Unet", "resnet18"), ("Unet", "resnet34"))


class Shape(t.NamedTuple):
    """What a network is built from, as in `SmpConfig`."""

    architecture: str
    encoder: str
    image_size: int
    depth: int
    decoder_channels: tuple[int, ...] | None
    patch_size: int | None


@config_class
class SmpConfig(OneMaskConfig):
    """An architecture of segmentation-models-pytorch. Its own defaults are the defaults, but for what is said here."""

    architecture: ArchitectureName = setting("Unet", "The network around the encoder, by the library's name.")
    encoder: str = setting(
        "resnet34",
        "An encoder of the library, or `tu-` and a network of timm, such as tu-convnext_tiny. Behind a dot stand the "
        "weights (tu-convnext_tiny.fb_in22k, resnet50.swsl); without it, the library's first. ViTs need "
        "architecture=DPT.",
    )
    encoder_depth: int | None = setting(
        None,
        "How many of the encoder's stages are used; each halves the resolution. null is the architecture's own: 5, of "
        "PSPNet 3, of DPT 4.",
        ge=1,
    )
    decoder_channels: tuple[int, ...] | None = setting(
        None,
        "Width of the decoder: a number per stage, deepest first, for Unet, UnetPlusPlus and MAnet; pyramid and head "
        "for FPN; one number for the others. null is the library's.",
    )
    patch_size: int | None = setting(
        None,
        "Edge of a ViT's patches; its filter is resampled. null is the network's own. DPT needs a power of 2: set 16 "
        "for DINOv2, whose patches have 14.",
        unit="pixels",
        ge=1,
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        self._check_decoder()
        self._check_image()
        if not self._shipped:
            self._check_encoder()
            _find(self.shape)

    @property
    def title(self) -> str:
        """The architecture's name."""
        return self.architecture

    @property
    def backbone(self) -> str:
        """The encoder's name, with `tu-` before timm's."""
        return self.encoder

    def stated(self, backbone: str) -> tuple[Colour, Colour]:
        """timm's numbers, or those of the library's own encoders."""
        return normalisation_of_smp(backbone)

    @property
    def least_images(self) -> int:
        """2 where a BatchNorm has one value per channel of a single image."""
        if self._shipped:
            return 2 if self.image_size == 2**self.depth else 1
        return _find(self.shape).least_images

    @property
    def blocks(self) -> tuple[type, ...]:
        """Whatever encoder and decoder repeat."""
        return _find(self.shape).blocks

    def weight_files(self) -> list[WeightFile]:
        """The encoder's weights by their tag. Raises: ConfigError when the library has none."""
        if not self.pretrained:
            return []
        if self.of_timm:
            return [WeightFile.of_timm(self.network)]
        from segmentation_models_pytorch.encoders import encoders

        known = encoders[self.network]["pretrained_settings"]
        tag = self.tag or next(iter(known), "")
        return [
            WeightFile(
                name=f"smp_{self.network}_{tag}.safetensors",
                hub_repo=known[tag]["repo_id"],
                hub_file="model.safetensors",
                revision=known[tag]["revision"],
            )
        ]

    @property
    def of_timm(self) -> bool:
        """Whether timm builds the encoder."""
        return self.encoder.startswith(TIMM)

    @property
    def network(self) -> str:
        """The encoder's name in the library that builds it; a tag is part of timm's names."""
        return self.encoder.removeprefix(TIMM) if self.of_timm else self.encoder.partition(".")[0]

    @property
    def tag(self) -> str:
        """Which weights, or ""."""
        return self.encoder.partition(".")[2]

    @property
    def depth(self) -> int:
        """Of the encoder, in stages."""
        return self.encoder_depth or ARCHITECTURES[self.architecture].depth

    @property
    def shape(self) -> Shape:
        """What the network is built from."""
        return Shape(
            self.architecture, self.encoder, self.image_size, self.depth, self.decoder_channels, self.patch_size
        )

    def _check_decoder(self) -> None:
        architecture, given = ARCHITECTURES[self.architecture], self.decoder_channels
        if given is None:
            return
        needed = self.depth if architecture.a_list else len(architecture.widths)
        if len(given) != needed or min(given, default=1) < 1:
            raise ConfigError(
                f"model.decoder_channels={list(given)}: model.architecture={self.architecture} takes {needed} numbers "
                "above 0"
                + ", one per stage, deepest first" * architecture.a_list
                + ("" if needed else ": set it to null")
            )

    def _check_encoder(self) -> None:
        """The name, before anything is built."""
        if self.of_timm:
            timm_facts(self.network)
            return
        if self.architecture == "DPT":
            raise ConfigError(
                f"model.encoder={self.encoder}: model.architecture=DPT takes ViTs of timm alone, such as "
                "tu-vit_small_patch16_224"
            )
        from segmentation_models_pytorch.encoders import encoders

        if self.network not in encoders:
            import timm

            raise unknown_encoder(self.network, [*encoders, *(f"{TIMM}{name}" for name in timm.list_models())])
        if self.patch_size:
            raise ConfigError(f"model.patch_size={self.patch_size}: {self.encoder} has no patches; set it to null")
        known = encoders[self.network]["pretrained_settings"]
        if self.tag and self.tag not in known:
            raise ConfigError(unknown_name(f"weights of {self.network}", self.tag, known))

    @property
    def size_stride(self) -> int | None:
        """Of an encoder whose input size is free: its stride."""
        if self.architecture == "DPT" or (self.of_timm and timm_facts(self.network).fixed):
            return None
        return self._stride

    @property
    def _stride(self) -> int:
        return min(ARCHITECTURES[self.architecture].stride or 2**self.depth, 2**self.depth)

    def _check_image(self) -> None:
        stride = self._stride
        if self.architecture != "DPT" and self.image_size % stride:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of {stride}, the encoder's stride; the nearest "
                f"is {max(1, round(self.image_size / stride)) * stride}."
            )

    @property
    def _shipped(self) -> bool:
        return self.shape[:2] in SHIPPED and self.depth == 5 and not self.patch_size


class Smp(OneMask):
    """A network of segmentation-models-pytorch; one mask class."""

    Config: t.ClassVar[type[SmpConfig]] = SmpConfig

    config: SmpConfig

    def __init__(self, config: SmpConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        if not config.weight_files():
            self.net = self.built(None)
        for file in config.weight_files():  # one
            staged = weights.load_staged(type(self), file, weights_dir)
            with weights.fits(type(self), file):
                self.net = self.built(staged if config.of_timm else None)
                if not config.of_timm:
                    self.backbone().load_state_dict(staged)

    def built(self, state: dict[str, torch.Tensor] | None) -> nn.Module:
        """The network. state: see `build`."""
        return build(self.config.shape, state)

    def backbone(self) -> nn.Module:
        """The encoder."""
        return self.net.get_submodule("encoder")

    def cam_layer(self) -> nn.Module:
        """The decoder, whose output the head turns into the mask."""
        return self.net.get_submodule("decoder")


def build(
    shape: Shape, state: dict[str, torch.Tensor] | None = None, aux_params: dict[str, t.Any] | None = None
) -> nn.Module:
    """The library's network.

    state: of the staged file of timm's encoder, which timm fits to image and patches. aux_params: of a second head, in
    the library's words; the network then returns the outputs of both.
    """
    import segmentation_models_pytorch as smp  # takes seconds to import

    options: dict[str, t.Any] = {"encoder_depth": shape.depth, "classes": 1, "encoder_weights": None, **_widths(shape)}
    options["aux_params"] = aux_params
    if shape.architecture == "PSPNet":
        options["upsampling"] = 2**shape.depth  # the library's is that of its depth of 3
    name = shape.encoder if shape.encoder.startswith(TIMM) else shape.encoder.partition(".")[0]
    if name.startswith(TIMM) and timm_facts(name.removeprefix(TIMM)).fixed:
        options["img_size"] = shape.image_size
    if shape.patch_size:
        options["patch_size"] = shape.patch_size
    if state is not None:
        options |= {"encoder_weights": "given", "pretrained_cfg_overlay": {"state_dict": state}}
    return t.cast(nn.Module, getattr(smp, shape.architecture)(name, **options))


def _widths(shape: Shape) -> dict[str, t.Any]:
    """The decoder's width as the library's arguments."""
    architecture = ARCHITECTURES[shape.architecture]
    if architecture.a_list:  # the library's default has five stages, whatever the depth
        return {"decoder_channels": shape.decoder_channels or WIDTHS[-shape.depth :]}
    return dict(zip(architecture.widths, shape.decoder_channels or (), strict=False))


@functools.lru_cache(maxsize=256)
def _find(shape: Shape) -> Found:
    architecture = ARCHITECTURES[shape.architecture]
    advice = "Choose another encoder, architecture or model.encoder_depth"
    if architecture.stride:
        advice += f"; {shape.architecture} dilates its encoder, as timm's and the library's convolutional ones allow"
    if shape.architecture != "DPT":
        advice += "; a ViT, whose features have one stride, needs model=smp model.architecture=DPT"
    elif not shape.patch_size:
        advice += "; a ViT whose patches have no power of 2 as edge needs model.patch_size=16"
    what = f"model.architecture={shape.architecture} and model.encoder={shape.encoder}"
    return probe(functools.partial(build, shape), what, shape.image_size, advice)
