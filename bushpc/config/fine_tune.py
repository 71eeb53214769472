"""Settings of fine-tuning: what a training starts from, what stays frozen, and how learning rates fall with depth.

They are part of the group `train.` (`TrainConfig`). Weights of other projects come in by `model.weights`.
"""

from __future__ import annotations

import re

from bushpc.config.fields import Settings, config_class, setting
from bushpc.errors import ConfigError

ENCODER = "encoder"


@config_class
class FineTuneConfig(Settings):
    """How a training builds on an earlier one."""

    prefix = "train."

    start_from: str | None = setting(
        None,
        "Start from the weights of another run, fold for fold: its folder, or an exported model. A cell, a checkpoint "
        "or an export of one fold starts all folds. Runs that trained on scans that this one validates are refused.",
        affects="nothing",
        since=3,
    )
    start_row: str | None = setting(None, "Row of train.start_from, if that is a grid.", affects="nothing", since=3)
    start_sha256: str | None = setting(
        None,
        "SHA-256 of the checkpoint or file that a fold starts from, for a run that requires exactly these weights; "
        "null accepts what is there, and each cell records it.",
        since=3,
    )
    layer_decay: float = setting(
        1.0,
        "The learning rate of each layer of the model's encoder is this times that of the layer after it; decoder and "
        "heads have the full rate. 1 gives all the same rate; 0.75 is usual for pretrained transformers.",
        since=3,
        gt=0,
        le=1,
    )
    freeze: tuple[str, ...] = setting(
        (),
        "Parameters that stay as they are: patterns of their names such as net.encoder.layer1.*, or the word encoder "
        "for all of the encoder. BatchNorms that are frozen whole keep their statistics. [] trains all.",
        since=3,
    )

    def __post_init__(self) -> None:
        if (self.start_row or self.start_sha256) and not self.start_from:
            name = "start_row" if self.start_row else "start_sha256"
            raise ConfigError(f"train.{name}={getattr(self, name)} without train.start_from: set that to a run folder")
        if self.start_sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.start_sha256):
            raise ConfigError(f"train.start_sha256={self.start_sha256}: must be 64 hex digits, or null")
        if "" in self.freeze:
            raise ConfigError("train.freeze holds an empty pattern: name parameters, or the word encoder; [] for none")
