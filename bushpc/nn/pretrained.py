"""What is known of an encoder before it is built: whether it exists, and how its weights expect the input.

    name → timm's pretrained_cfg, or what is written down here → mean and deviation of the model's input

timm keeps these facts beside a network's name, so nothing is built and nothing is downloaded.
"""

from __future__ import annotations

import difflib
import functools
import typing as t
from collections.abc import Iterable

from bushpc.errors import ConfigError, unknown_name
from bushpc.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

Colour = tuple[float, ...]
TIMM = "tu-"  # how segmentation-models-pytorch marks an encoder of timm
IMAGENET: tuple[Colour, Colour] = (IMAGENET_MEAN, IMAGENET_STD)
HALF: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# timm's networks of the shipped configs: with these the login node need not import timm.
WRITTEN_DOWN = {
    "efficientnet_b0": IMAGENET,
    "resnet50.a1_in1k": IMAGENET,
    "resnet50.tv_in1k": IMAGENET,
    "densenet121.tv_in1k": IMAGENET,
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": HALF,
    "vit_base_r50_s16_224.orig_in21k": HALF,
    "test_efficientnet": IMAGENET,
    "test_resnet": HALF,
    "test_vit": HALF,
}
# segmentation-models-pytorch's own encoders by the start of their names; all others, ImageNet's. Its table lies in the
# repositories of the weights and would have to be fetched.
OF_SMP = {
    "inception": HALF,
    "xception": HALF,
    "timm-tf_efficientnet_lite": HALF,
    "dpn": ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
}


class Facts(t.NamedTuple):
    """Of a timm network's weights. fixed: the network is built for one size of image."""

    mean: Colour
    std: Colour
    fixed: bool


@functools.cache
def timm_facts(network: str) -> Facts:
    """What timm states about a network and its weights. Raises: ConfigError for a name or a tag that timm lacks."""
    import timm  # takes seconds to import

    architecture, _, tag = network.partition(".")
    if not timm.is_model(architecture):
        raise unknown_encoder(architecture, timm.list_models())
    try:
        found = timm.get_pretrained_cfg(network)
    except RuntimeError:  # of a tag that the architecture lacks
        found = None
    if found is None:
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        if not tag or not tags:
            raise ConfigError(
                f"timm states nothing about '{network}', neither weights nor normalisation; choose another"
                + f", such as {architecture}" * bool(tag)
            )
        raise ConfigError(unknown_name(f"weights of timm's {architecture}", tag, tags))
    return Facts(mean=tuple(found.mean), std=tuple(found.std), fixed=bool(found.fixed_input_size))


def unknown_encoder(given: str, valid: Iterable[str]) -> ConfigError:
    """With the nearest names alone: there are more than a thousand."""
    near = difflib.get_close_matches(given, list(valid), n=5, cutoff=0.5)
    return ConfigError(
        f"unknown encoder '{given}'; did you mean {' or '.join(map(repr, near)) or 'another'}? "
        "`python -c 'import timm; print(timm.list_models())'` prints timm's names"
    )


def normalisation(encoder: str) -> tuple[Colour, Colour]:
    """Mean and deviation of RGB in [0, 1] that an encoder's weights expect.

    encoder: a network of timm, with its tag or without. Raises: ConfigError for a name that timm does not know.
    """
    if encoder in WRITTEN_DOWN:
        return WRITTEN_DOWN[encoder]
    facts = timm_facts(encoder)
    return facts.mean, facts.std


def normalisation_of_smp(encoder: str) -> tuple[Colour, Colour]:
    """As `normalisation`, for a name of segmentation-models-pytorch: `tu-NETWORK` of timm, or an encoder of its own."""
    if encoder.startswith(TIMM):
        return normalisation(encoder.removeprefix(TIMM))
    if encoder.endswith(".advprop"):
        return HALF
    return next((numbers for start, numbers in OF_SMP.items() if encoder.startswith(start)), IMAGENET)
