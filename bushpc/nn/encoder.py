"""timm's feature extractors as encoders, built without weights and checked for the strides that a decoder needs."""

from __future__ import annotations

import difflib
import typing as t
from collections.abc import Sequence

import torch
from torch import nn

from bushpc.errors import ConfigError

# Channels at strides 2, 4, 8 … of the encoders in our configs: with these the login node need not import timm.
CHANNELS = {
    "resnet50.a1_in1k": (64, 256, 512, 1024, 2048),
    "resnet50.tv_in1k": (64, 256, 512, 1024, 2048),
    "densenet121.tv_in1k": (64, 256, 512, 1024),
    "test_resnet": (32, 32, 48, 192, 96),
}


def feature_channels(name: str, strides: Sequence[int]) -> list[int]:
    """How many channels the encoder `name` has at each of `strides`. Raises: ConfigError, as `feature_extractor`."""
    known = CHANNELS.get(name, ())
    if list(strides) == [2 << i for i in range(len(known))][: len(strides)]:
        return list(known[: len(strides)])
    with torch.device("meta"):  # shapes without weights
        return feature_extractor(name, strides)[1]


def feature_extractor(name: str, strides: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """The network `name` up to its features at `strides`, and the number of channels of each feature map.

    strides: of the features relative to the image, ascending from the network's first. Raises: ConfigError for a name
    that timm does not know (suggests similar ones), and for a network with other strides.
    """
    import timm  # takes seconds to import

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ConfigError(f"unknown encoder '{name}'; similar names in timm: {', '.join(near) or 'none'}.")
    try:
        indices = tuple(range(len(strides)))
        encoder: t.Any = timm.create_model(name, features_only=True, out_indices=indices, pretrained=False)
        found = encoder.feature_info.reduction()
    except Exception as error:  # timm raises anything from AttributeError to RuntimeError here
        raise ConfigError(f"timm cannot build a feature extractor from encoder '{name}': {error}") from error
    if found != list(strides):
        raise ConfigError(
            f"encoder '{name}' has features at strides {found}, but the decoder needs {list(strides)}. timm's ResNets "
            "have these."
        )
    return encoder, list(encoder.feature_info.channels())
