"""Promises of the optimiser: the paper's cosine, and decay where it belongs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bushpc.config import compose
from bushpc.train.optim import Average, adamw, learning_rate


def config(*overrides):
    return compose(["model=unet_small", "data=phantom", *overrides]).train


def test_the_schedule_is_torchs_cosine():
    train = config("train.iterations=50", "train.lr=1e-2", "train.warmup=0")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=train.lr)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate(step, train) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_warm_up_rises_to_the_peak():
    train = config("train.iterations=50", "train.lr=1e-2", "train.warmup=4")
    assert [learning_rate(step, train) for step in range(5)] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])


def test_only_trained_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decayed, plain = adamw(model, config("train.weight_decay=0.1")).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_the_average_follows_its_closed_form():
    weights = [torch.zeros(2)]
    average = Average(weights, decay=0.15)
    expected = torch.zeros(2)
    for update, value in enumerate((1.0, 2.0, 3.0)):
        average.update([torch.full((2,), value)])
        decay = min(0.15, (1 + update) / (10 + update))  # 0.1, then 0.15
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.tensors[0], expected)
    assert torch.equal(weights[0], torch.zeros(2))
