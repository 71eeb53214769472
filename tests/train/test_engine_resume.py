"""Promises of the engine across checkpoints: nothing is lost or rounded, whatever engine and ranks go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.on_ranks import assert_equal, tensors, trainer

# Engine and precision on two ranks, and the engine that goes on alone.
CASES = [
    *[("ddp", "bf16", "zero3"), ("zero1", "bf16", "ddp"), ("zero2", "bf16", "zero2"), ("zero3", "bf16", "zero3")],
    *[("ddp", "fp16", "ddp"), ("zero2", "fp16", "zero1")],
]


@pytest.mark.real
@pytest.mark.parametrize(("kind", "precision", "alone_kind"), CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_and_any_engine_on_other_ranks_goes_on_from_it(
    make_cell, tmp_path, kind, precision, alone_kind
):
    trained = trainer(tmp_path, make_cell)
    overrides = (f"engine.precision={precision}", "train.ema=0.9")
    whole = trained("whole", 2, f"engine={kind}", *overrides, stop=3)
    assert not torch.equal(tensors(whole, "prediction", 2)["prob"], tensors(whole, "prediction", 3)["prob"])
    for ranks, engine in ((2, kind), (1, alone_kind)):
        shutil.copytree(whole / "step_00000002", tmp_path / f"on{ranks}-checkpoints" / "step_00000002")
        resumed = trained(f"on{ranks}", ranks, f"engine={engine}", *overrides, start=2, stop=3)
        for part in ("model", "optimizer", "ema", "prediction"):
            # Read, shared out over other ranks, and written again: nothing is lost or rounded.
            assert_equal(tensors(resumed, part, 2), tensors(whole, part, 2))
            if ranks == 2:
                assert_equal(tensors(resumed, part, 3), tensors(whole, part, 3))
        # On another number of ranks each one's BatchNorm sees other samples: the step goes nearly the same way.
        ours, theirs = step_of(resumed), step_of(whole)
        assert float(ours @ theirs / (ours.norm() * theirs.norm())) > 0.5
        assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.2)


def step_of(folder: Path) -> torch.Tensor:
    """What the last step did to the weights, as one vector."""
    before, after = tensors(folder, "model", 2), tensors(folder, "model", 3)
    return torch.cat([(after[name] - before[name]).flatten() for name in before if name.endswith("weight")])
