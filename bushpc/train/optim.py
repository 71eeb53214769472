"""Optimiser, learning-rate schedule and weight average, the same for every model."""

from __future__ import annotations

import math
import typing as t
from collections.abc import Sequence

import torch
from torch import nn

from bushpc.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what requires a gradient, without weight decay on biases, norms and other vectors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr)


class Schedule:
    """The learning rate of every step, and whether training is over before its last one.

    Warm-up, cosine (XBusNet, 2.3) and constant are functions of the step alone. `plateau` and the early stop follow
    the loss on the tuning part, which the loop measures once an epoch and tells; what they remember is in `state`,
    goes into every checkpoint, and makes a resumed run decide as an undisturbed one.

    draws: samples of an epoch. state: of a checkpoint.
    """

    def __init__(self, config: TrainConfig, draws: int, state: t.Mapping[str, t.Any] | None = None) -> None:
        self.config, self.draws = config, draws
        self.epoch, self.best, self.since_best, self.since_lower, self.lowered = 0, math.inf, 0, 0, 0
        self.__dict__.update(state or {})

    def owes_loss(self, step: int) -> bool:
        """Whether another epoch is over before `step`, and its loss on the tuning part is not told yet."""
        return self.config.tuned and self._epochs(step) > self.epoch

    def tell(self, step: int, loss: float) -> str | None:
        """Take in the loss on the tuning part before `step`; returns what follows from it, in words."""
        self.epoch = self._epochs(step)
        better = loss < self.best  # never where it is no number
        self.best = loss if better else self.best
        self.since_best = 0 if better else self.since_best + 1
        self.since_lower = 0 if better else self.since_lower + 1
        if self.over:
            return f"no better loss on the held-out samples for {self.since_best} epochs: training ends here"
        if self.config.schedule == "plateau" and self.since_lower >= self.config.plateau_patience:
            self.since_lower, self.lowered = 0, self.lowered + 1
            return f"no better loss on the held-out samples: the learning rate is {self.lr(step):.2e} from here on"
        return None

    @property
    def over(self) -> bool:
        """Whether the early stop has come."""
        return 0 < self.config.stop_patience <= self.since_best

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        config = self.config
        peak = config.lr * config.plateau_factor**self.lowered
        if step < config.warmup:
            return peak * (step + 1) / config.warmup
        if config.schedule != "cosine":
            return peak
        progress = (step - config.warmup) / max(1, config.iterations - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def state(self) -> dict[str, t.Any]:
        """What it remembers, for meta.json."""
        names = ("epoch", "best", "since_best", "since_lower", "lowered")
        return {name: getattr(self, name) for name in names} if self.epoch else {}

    def _epochs(self, step: int) -> int:
        return step * self.config.batch_size // self.draws


class Average:
    """Exponential moving average of the weights, over this rank's share of them.

    The decay rises from 0.1 to `decay` as (1 + u) / (10 + u) over the updates u, so that a short training is not
    dominated by its start; timm and TensorFlow do the same.
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
