"""Promises of ZeRO: whatever shares out memory, the same model is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bushpc.config import CellConfig
from bushpc.train.fine_tune import lr_scales
from bushpc.train.optim import Schedule
from tests.conftest import cell_maker
from tests.train.on_ranks import assert_equal, global_batch, smooth_model, tensors, trainer, without_kinks

OVERRIDES = ("train.ema=0.9", "train.grad_clip=0.2", "train.layer_decay=0.8")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, phantom_folder) -> Path:
    """The checkpoints of the training that all kinds of ZeRO are held against."""
    folder = tmp_path_factory.mktemp("ddp")
    return trainer(folder, cell_maker(folder, phantom_folder))("ddp", 2, *OVERRIDES)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_zero_trains_what_ddp_trains(ddp, make_cell, tmp_path, kind):
    """Compares gradients at the same weights, and holds ZeRO's update of the weights against AdamW's formula.

    Weights after a step cannot be compared: Adam divides each gradient by its own size, so where a gradient is zero up
    to rounding, as for a bias before BatchNorm, the sign of the rounding error decides a whole step.
    """
    zero = trainer(tmp_path, make_cell)(kind, 2, f"engine={kind}", *OVERRIDES)
    assert_equal(tensors(zero, "model", 0), tensors(ddp, "model", 0))
    whole_norm = float(tensors(ddp, "gradient", 1)["norm"])
    assert whole_norm > 0.3
    assert float(tensors(zero, "gradient", 1)["norm"]) == pytest.approx(whole_norm, rel=1e-4)
    ours, theirs = gradients(zero, 1), gradients(ddp, 1)
    assert ours.keys() == theirs.keys()
    clipped_norm = total_norm(theirs)
    assert clipped_norm == pytest.approx(0.2, rel=1e-4)
    for name, gradient in theirs.items():
        # A gradient is a sum: its rounding error depends on the size of the terms, which may cancel.
        allowed = 1e-4 * float(gradient.norm()) + 1e-5 * clipped_norm
        assert float((ours[name] - gradient).norm()) < allowed, name
    for name, value in tensors(ddp, "model", 1).items():
        if name not in theirs:  # statistics of BatchNorm
            torch.testing.assert_close(tensors(zero, "model", 1)[name], value, rtol=1e-4, atol=1e-5)
    # The second gradient is taken at weights that already differ in such signs.
    ours, theirs = gradients(zero, 2), gradients(ddp, 2)
    apart = total_norm({name: ours[name] - gradient for name, gradient in theirs.items()})
    assert apart < 0.01 * total_norm(theirs)

    cell = CellConfig.load(tmp_path / f"{kind}-0-2" / "cells" / "fold0" / "config.yaml")
    scales = lr_scales(smooth_model(cell), 0.8)
    for step in (1, 2):
        before, after, averaged = (
            tensors(zero, "model", step - 1),
            tensors(zero, "model", step),
            tensors(zero, "ema", step),
        )
        state, lr = tensors(zero, "optimizer", step), Schedule(cell.train, 4).lr(step - 1)
        for name, gradient in gradients(zero, step).items():
            first, second = state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"]
            old = tensors(zero, "optimizer", step - 1)[f"exp_avg_sq/{name}"]
            torch.testing.assert_close(second, 0.999 * old + 0.001 * gradient**2, rtol=1e-3, atol=1e-12)
            assert state[f"step/{name}"] == step
            decay = cell.train.weight_decay if before[name].ndim >= 2 else 0.0
            change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            rate = lr * scales[name]
            expected = before[name] * (1 - rate * decay) - rate * change
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)
            kept = step / (9 + step)  # of the average, while that is less than 0.9
            expected = kept * tensors(zero, "ema", step - 1)[name] + (1 - kept) * after[name]
            torch.testing.assert_close(averaged[name], expected, rtol=1e-5, atol=1e-7)
    model = smooth_model(cell).eval()
    model.load_state_dict({**tensors(zero, "model"), **tensors(zero, "ema")}, strict=False)
    with torch.no_grad(), without_kinks():
        prob = model.predict(global_batch(99)).prob_BKHW
    torch.testing.assert_close(tensors(zero, "prediction")["prob"], prob, rtol=0, atol=1e-5)


def gradients(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The clipped gradient of a step by parameter, from AdamW's first moments before and after it."""
    after = tensors(folder, "optimizer", step)
    before = tensors(folder, "optimizer", step - 1) if step > 1 else {key: torch.zeros(()) for key in after}
    return {
        key.partition("/")[2]: (value - 0.9 * before[key]) / 0.1
        for key, value in after.items()
        if key.startswith("exp_avg/")
    }


def total_norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(gradients.values())))
