"""Settings of training: length, batch, optimiser, checkpoints, curves.

`configs/model/*.yaml` bring a paper's training protocol.
"""

from __future__ import annotations

import math
import typing as t

from bushpc.config.fields import config_class, setting
from bushpc.config.fine_tune import FineTuneConfig
from bushpc.errors import ConfigError, unknown_name
from bushpc.metrics.registry import METRICS

# Tools that show curves, and how each is installed.
TOOLS = {"tensorboard": "tensorboard", "wandb": "'bushpc[wandb]'", "mlflow": "'bushpc[mlflow]'"}


@config_class
class TrainConfig(FineTuneConfig):
    """How the model is trained: length, batch, optimiser, checkpoints, curves."""

    prefix: t.ClassVar[str] = "train."

    iterations: int = setting(1000, "Optimiser steps per fold.", unit="steps", ge=1)
    epochs: int | None = setting(
        None,
        "Passes over a fold's training part; the number of steps then follows from its size. null uses iterations.",
        ge=1,
    )
    batch_size: int = setting(
        4, "Global batch: samples per optimiser step, over all ranks together.", unit="samples", order=True, ge=1
    )
    accumulate: int = setting(
        1,
        "Each rank processes its share of the batch in this many equal parts, one after the other, to save memory. "
        "BatchNorm sees each part separately, as it does each rank.",
        ge=1,
    )
    balance: bool = setting(
        False,
        "Draw samples of rare labels more often, so that all labels are about equally frequent in an epoch; each draw "
        "is augmented separately. false draws every sample once.",
    )
    lr: float = setting(1e-4, "Peak learning rate of AdamW.", gt=0, lt=math.inf)
    schedule: t.Literal["cosine", "constant", "plateau"] = setting(
        "cosine",
        "Learning rate after warm-up: cosine decays to lr_end at the last step, constant stays, plateau drops when the "
        "loss on held-out training samples stops improving.",
    )
    cosine_steps: int | None = setting(
        None,
        "With schedule=cosine, the step at which the cosine ends, if training ends before; null is the last step.",
        unit="steps",
        ge=1,
        since=3,
    )
    lr_end: float = setting(
        0.0, "With schedule=cosine, the learning rate at which the cosine ends.", ge=0, lt=math.inf, since=3
    )
    plateau_factor: float = setting(0.25, "With schedule=plateau, each drop multiplies the rate by this.", gt=0, lt=1)
    plateau_patience: int = setting(
        4, "With schedule=plateau, epochs without improvement before a drop.", unit="epochs", ge=1
    )
    stop_patience: int = setting(
        0,
        "Stop after this many epochs without improvement on the held-out samples; 0 never stops early. Results come "
        "from the last step either way.",
        unit="epochs",
        ge=0,
    )
    holdout: float = setting(
        0.0,
        "Share of the training part, split by patient and label, that is held out for plateau and early stopping. "
        "Never the validation fold, which must not influence any choice.",
        ge=0,
        le=0.5,
    )
    weight_decay: float = setting(0.01, "Decoupled weight decay of AdamW; with 0 it is Adam.", ge=0)
    warmup: int = setting(0, "Steps of linear warm-up before the schedule.", unit="steps", ge=0)
    grad_clip: float = setting(1.0, "Clip gradients to this global L2 norm; 0 disables clipping.", ge=0)
    ema: float = setting(
        0.0,
        "Decay of the exponential moving average of the weights, and of BatchNorm's running statistics, which "
        "predictions then use; 0 disables it.",
        ge=0,
        lt=1,
    )
    save_every: int = setting(
        100,
        "Save a checkpoint every so many steps, in addition to the last step and stop signals.",
        unit="steps",
        affects="nothing",
        ge=1,
    )
    keep: int = setting(2, "Number of newest checkpoints to keep.", affects="nothing", ge=1)
    keep_every: int = setting(
        0,
        "Also keep every checkpoint whose step is a multiple of this; 0 keeps no others.",
        unit="steps",
        affects="nothing",
        ge=0,
    )
    keep_best: str | None = setting(
        None,
        "Also keep the checkpoint with the best value of this validation metric, such as dice; needs validate_every. "
        "It is for your own use: results always come from the last step. null keeps none.",
        affects="nothing",
    )
    log_every: int = setting(
        10, "Write a line to metrics.jsonl every so many steps.", unit="steps", affects="nothing", ge=1
    )
    track: tuple[str, ...] = setting(
        ("tensorboard",),
        "Tools that show the same curves: tensorboard, wandb, mlflow; [] for none. They write into the cell's folder, "
        "offline, unless WANDB_MODE or MLFLOW_TRACKING_URI say otherwise. wandb and mlflow are extras: bushpc[wandb].",
        affects="nothing",
    )
    validate_every: int = setting(
        0,
        "Measure Dice on the validation part every so many steps, for the curves; 0 never. Not used for selection.",
        unit="steps",
        affects="nothing",
        ge=0,
    )
    weights_from: str | None = setting(
        None,
        "Run folder whose folds are trained already: the cells take over its weights and only evaluate. Only settings "
        "that affect predictions or evaluation may differ from that run. null trains.",
        affects="nothing",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuned != bool(self.holdout):
            raise ConfigError(
                f"train.holdout={self.holdout} with train.schedule={self.schedule} and train.stop_patience="
                f"{self.stop_patience}: training samples are held out exactly when something watches their loss; set "
                "train.holdout=0.2 with train.schedule=plateau or train.stop_patience, else train.holdout=0"
            )
        self._check_cosine()
        for tool in self.track:
            if tool not in TOOLS:
                raise ConfigError(unknown_name("tool in train.track", tool, TOOLS))
        if self.keep_best is not None and self.keep_best not in METRICS:
            raise ConfigError(unknown_name("train.keep_best", self.keep_best, METRICS))
        if self.keep_best is not None and not self.validate_every:
            raise ConfigError(
                f"train.keep_best={self.keep_best} needs validations during training: set train.validate_every"
            )

    def _check_cosine(self) -> None:
        if self.schedule != "cosine" and (self.cosine_steps is not None or self.lr_end):
            raise ConfigError(
                f"train.cosine_steps={self.cosine_steps} and train.lr_end={self.lr_end:g} belong to "
                f"train.schedule=cosine, not {self.schedule}: leave them at null and 0, or set train.schedule=cosine"
            )
        if self.lr_end > self.lr:
            raise ConfigError(f"train.lr_end={self.lr_end:g} is above train.lr={self.lr:g}: the cosine only falls")
        if self.cosine_steps is not None and self.cosine_steps < self.iterations and self.epochs is None:
            raise ConfigError(
                f"train.cosine_steps={self.cosine_steps} ends before training does (train.iterations="
                f"{self.iterations}), and the rate would rise again: set it to {self.iterations} or more, or null"
            )

    @property
    def tuned(self) -> bool:
        """Whether learning rate or length follow the loss on samples that are held out of training."""
        return self.schedule == "plateau" or self.stop_patience > 0
