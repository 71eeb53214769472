"""Promises of the optimiser: the paper's cosine, and decay where it belongs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from bushpc.config import compose
from bushpc.train.optim import Average, Schedule, adamw


def config(*overrides):
    return compose(["model=unet_small", "data=phantom", *overrides]).train


def test_the_schedule_is_torchs_cosine():
    train = config("train.iterations=50", "train.lr=1e-2", "train.warmup=0")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=train.lr)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert Schedule(train, 10).lr(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_warm_up_rises_to_the_peak():
    train = config("train.iterations=50", "train.lr=1e-2", "train.warmup=4")
    assert [Schedule(train, 10).lr(step) for step in range(5)] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])


TUNED = ("train.schedule=plateau", "train.holdout=0.2", "train.lr=1e-2", "train.warmup=0", "train.batch_size=4")
LOSSES = [5.0, 4.0, 4.5, 4.2, 4.1, 4.4, 3.9, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_a_plateau_lowers_the_rate_as_often_as_torchs():
    schedule = Schedule(config(*TUNED, "train.plateau_patience=3", "train.plateau_factor=0.5"), draws=8)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    # torch lowers after more than `patience` epochs, Keras (and we) after as many.
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0.0)
    for epoch, loss in enumerate(LOSSES, 1):
        step = 2 * epoch  # of 4 samples each, 8 are an epoch
        assert schedule.needs_tuning_loss(step)
        assert not schedule.needs_tuning_loss(step - 1)
        schedule.report(step, loss)
        reference.step(loss)
        assert not schedule.needs_tuning_loss(step)
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.lr(0) == pytest.approx(2.5e-3)  # it did happen, twice


def test_training_ends_after_as_many_epochs_without_a_better_loss_as_told():
    schedule = Schedule(config(*TUNED, "train.stop_patience=5", "train.schedule=constant"), draws=4)
    over = []
    for step, loss in enumerate(LOSSES, 1):
        schedule.report(step, loss)
        over.append(schedule.over)
    assert over.index(True) == LOSSES.index(3.9) + 5


def test_one_loss_that_is_no_number_counts_as_no_better_and_nothing_more():
    schedule = Schedule(config(*TUNED, "train.stop_patience=3", "train.schedule=constant"), draws=4)
    for step, loss in enumerate((2.0, math.nan, 1.0, 1.5), 1):
        schedule.report(step, loss)
    assert (schedule.best, schedule.since_best) == (1.0, 1)


def test_a_schedule_goes_on_from_its_state_as_if_undisturbed():
    train = config(*TUNED, "train.plateau_patience=2", "train.stop_patience=6")
    whole = Schedule(train, draws=4)
    parted = Schedule(train, draws=4)
    for step, loss in enumerate(LOSSES, 1):
        parted = Schedule(train, 4, json.loads(json.dumps(parted.state())))
        assert whole.report(step, loss) == parted.report(step, loss)
        assert (whole.lr(step), whole.over) == (parted.lr(step), parted.over)


def test_a_constant_rate_stays_after_its_warm_up():
    schedule = Schedule(config("train.schedule=constant", "train.warmup=2", "train.lr=1e-2"), 10)
    assert [schedule.lr(step) for step in (0, 1, 2, 500)] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])


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
