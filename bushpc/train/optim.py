"""Optimiser and learning-rate schedule, the same for every model."""

from __future__ import annotations

import math
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


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `lr` to 0 at the last iteration (paper 2.3); a function of the step alone."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.iterations - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


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
