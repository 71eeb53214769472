"""timm's feature extractors as encoders: built without weights, and held against the strides that a decoder needs."""

from __future__ import annotations

import difflib
import typing as t
from collections.abc import Sequence

import timm
from torch import nn

from bushpc.errors import ConfigError


def feature_extractor(name: str, strides: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """The network `name` as far as its features at `strides` go, and how many channels each of them has.

    strides: of the features to the image, rising from the first that the network gives. Raises: ConfigError for a name
    that timm does not know, with those near it, and for a network with other strides.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ConfigError(f"unknown encoder '{name}'; near it timm has: {', '.join(near) or 'nothing'}.")
    try:
        indices = tuple(range(len(strides)))
        encoder: t.Any = timm.create_model(name, features_only=True, out_indices=indices, pretrained=False)
        found = encoder.feature_info.reduction()
    except Exception as error:  # timm raises anything from AttributeError to RuntimeError here
        raise ConfigError(f"timm cannot make a feature extractor of encoder '{name}': {error}") from error
    if found != list(strides):
        raise ConfigError(
            f"encoder '{name}' gives features at strides {found}; needed are {list(strides)}, "
            "as timm's ResNets have them."
        )
    return encoder, list(encoder.feature_info.channels())
