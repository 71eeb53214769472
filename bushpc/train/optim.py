"""Optimiser, learning-rate schedule and weight average, the same for every model."""

from __future__ import annotations

import math
import typing as t
from collections.abc import Sequence

import torch
from torch import nn

from bushpc.config import TrainConfig
from bushpc.models.base import Model
from bushpc.train.fine_tune import lr_scales


def adamw(model: Model, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient; biases, norms and other vectors have no weight decay.

    With train.layer_decay each layer has groups with its `lr_scale`, by which `set_lr` multiplies the rate.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.layer_decay != 1:
        return torch.optim.AdamW(_layer_groups(trained, lr_scales(model, config.layer_decay), config), lr=config.lr)
    matrices = [parameter for parameter in trained.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr)


def _layer_groups(
    trained: t.Mapping[str, nn.Parameter], scales: t.Mapping[str, float], config: TrainConfig
) -> list[dict[str, t.Any]]:
    groups: dict[tuple[float, float], dict[str, t.Any]] = {}
    for name, parameter in trained.items():
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        group = groups.setdefault(
            (scales[name], decay), {"params": [], "weight_decay": decay, "lr_scale": scales[name]}
        )
        group["params"].append(parameter)
    return list(groups.values())


def set_lr(groups: t.Iterable[dict[str, t.Any]], lr: float) -> None:
    """Give an optimiser's groups the learning rate of a step, each its layer's share of it."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Schedule:
    """The learning rate of every step, and the early stop.

    Warm-up, cosine (XBusNet, 2.3) and constant depend only on the step. `plateau` and the early stop follow the loss on
    the tuning part, which the loop measures once an epoch and reports. Their `state` goes into every checkpoint, so a
    resumed run decides as an uninterrupted one.

    draws: samples per epoch. state: from a checkpoint.
    """

    def __init__(self, config: TrainConfig, draws: int, state: t.Mapping[str, t.Any] | None = None) -> None:
        self.config, self.draws = config, draws
        self.epoch, self.best, self.since_best, self.since_lower, self.lowered = 0, math.inf, 0, 0, 0
        self.__dict__.update(state or {})

    def needs_tuning_loss(self, step: int) -> bool:
        """Whether an epoch ended before `step` whose loss on the tuning part has not been reported."""
        return self.config.tuned and self._epochs(step) > self.epoch

    def report(self, step: int, loss: float) -> str | None:
        """Take the loss on the tuning part before `step`; returns a message if the schedule reacts to it."""
        self.epoch = self._epochs(step)
        better = loss < self.best  # False for NaN
        self.best = loss if better else self.best
        self.since_best = 0 if better else self.since_best + 1
        self.since_lower = 0 if better else self.since_lower + 1
        if self.over:
            return f"the loss on the held-out samples has not improved for {self.since_best} epochs: training stops"
        if self.config.schedule == "plateau" and self.since_lower >= self.config.plateau_patience:
            self.since_lower, self.lowered = 0, self.lowered + 1
            return f"the loss on the held-out samples has not improved: the learning rate is now {self.lr(step):.2e}"
        return None

    @property
    def over(self) -> bool:
        """Whether the early stop has been reached."""
        return 0 < self.config.stop_patience <= self.since_best

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        config = self.config
        peak = config.lr * config.plateau_factor**self.lowered
        if step < config.warmup:
            return peak * (step + 1) / config.warmup
        if config.schedule != "cosine":
            return peak
        end = config.cosine_steps or config.iterations
        progress = min(1.0, (step - config.warmup) / max(1, end - config.warmup))
        return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))

    def state(self) -> dict[str, t.Any]:
        """The schedule's memory, for meta.json."""
        names = ("epoch", "best", "since_best", "since_lower", "lowered")
        return {name: getattr(self, name) for name in names} if self.epoch else {}

    def _epochs(self, step: int) -> int:
        return step * self.config.batch_size // self.draws


class Average:
    """Exponential moving average of this rank's part of the weights.

    The decay rises from 0.1 to `decay` as (1 + u) / (10 + u) over the updates u, so that the initial weights don't
    dominate a short training; timm and TensorFlow do the same.
    """

    def __init__(self, weights: Sequence[torch.Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.tensors = [tensor.clone() for tensor in weights]

    def update(self, weights: Sequence[torch.Tensor]) -> None:
        """Move towards `weights` after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.tensors, list(weights), 1 - decay)
        self.updates += 1
