"""Optimiser and learning-rate schedule, the same for every model."""

from __future__ import annotations

import math

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
