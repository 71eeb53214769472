"""Test-time augmentation: which ways there are, and which a model can take. On the login node; no torch.

evaluate.tta, `bushpc predict --tta` ─refuse_tta→ ConfigError before anything is queued or predicted
"""

from __future__ import annotations

import typing as t

from bushpc.errors import ConfigError, unknown_name

if t.TYPE_CHECKING:
    from bushpc.config.data import DataConfig
    from bushpc.config.evaluate import EvaluateConfig
    from bushpc.config.model import ModelConfig

Resolution = t.Literal["network", "original"]
Tta = t.Literal["none", "mirror", "mirror_scale"]
TTA: tuple[Tta, ...] = t.get_args(Tta)
SCALES = (0.75, 1.0, 1.25)  # of the input's edge, with mirror_scale; rounded to the network's stride


def scaled_sizes(image_size: int, stride: int) -> tuple[int, int, int]:
    """The edges of the input with mirror_scale, each a multiple of `stride` but the middle one, which is its own.

    Rounded away from it, so that a coarse stride does not make two of them equal.
    """
    smaller = int(image_size * SCALES[0] // stride * stride)
    larger = -int(-image_size * SCALES[2] // stride * stride)
    return smaller, image_size, larger


def refuse_impossible(evaluate: EvaluateConfig, data: DataConfig, model: ModelConfig, makes: t.Collection[str]) -> None:
    """Raises: ConfigError for what the model cannot do, and for a grid that is not at hand."""
    refuse_tta(evaluate.tta, model, makes, f"evaluate.tta={evaluate.tta}")
    if evaluate.resolution == "original" and data.stream:
        raise ConfigError(
            "evaluate.resolution=original with data.stream: a stream delivers scans at the network's size; read the "
            "shards from data.root instead, or set evaluate.resolution=network"
        )


def refuse_tta(tta: str, model: ModelConfig, makes: t.Collection[str], given: str) -> None:
    """Raises: ConfigError for a way that does not exist, or that a model cannot take.

    makes: fields of its predictions. given: how the user asked for it, such as `evaluate.tta=mirror`.
    """
    if tta not in TTA:
        raise ConfigError(unknown_name("test-time augmentation", tta, TTA))
    if tta == "none":
        return
    if not {"prob_BKHW", "class_prob_BL"} & set(makes):
        raise ConfigError(
            f"{given}: {model.title} predicts neither masks nor labels, so there is nothing to average; leave it out"
        )
    if model.why_no_mirror:
        raise ConfigError(f"{given}: {model.title} {model.why_no_mirror}; leave it out (none)")
    if tta == "mirror_scale":
        _refuse_scale(model, given)


def _refuse_scale(model: ModelConfig, given: str) -> None:
    if model.size_stride is None:
        raise ConfigError(
            f"{given}: {model.title} reads images of {model.image_size} pixels a side alone; use mirror, or none"
        )
    smallest, size, _ = scaled_sizes(model.image_size, model.size_stride)
    if not 0 < smallest < size:
        raise ConfigError(
            f"{given}: model.image_size={model.image_size} has no smaller multiple of {model.size_stride} near "
            f"{SCALES[0]:g} of it, the stride of {model.title}; use mirror, or a larger model.image_size"
        )
