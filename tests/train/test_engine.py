"""Promises of the engine in one process: precision, parts of a batch, other kernels; and it says what it is."""

from __future__ import annotations

import contextlib

import pytest
import torch

from bushpc.config import CellConfig, ModelConfig
from bushpc.dist import World, seed_everything
from bushpc.errors import TrainingError
from bushpc.losses.overlap import overlap_losses
from bushpc.models.base import Model
from bushpc.sample import Batch, Losses
from bushpc.train.engine import Engine, refuse_emulated_bf16, start_ranks
from tests.train.on_ranks import assert_equal, global_batch


def alone(make_cell, name: str, *overrides: str, model_class: type[Model] | None = None) -> tuple[Engine, list[float]]:
    """Two steps on one rank in this process; returns the engine and the loss before each step and after the last."""
    cell = CellConfig.load(make_cell(name, "train.grad_clip=0.5", *overrides) / "config.yaml")
    start_ranks(cell, World())
    seed_everything(cell.seed, "init")
    engine = Engine(cell, World(), (model_class or cell.model_class)(cell.model))
    engine.train()
    losses = []
    for step in range(3):
        seed_everything(cell.seed, "step", 0, 0)
        losses.append(float(engine.losses(global_batch(0)).total))
        if step < 2:
            engine.update(cell.train.lr)
    return engine, losses


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in engine.trained.items()}


def test_recomputed_blocks_train_the_same_weights_bit_for_bit(make_cell):
    plain, _ = alone(make_cell, "plain")
    recomputed, _ = alone(make_cell, "recomputed", "engine.recompute=true")
    assert any("Recomputed" in type(module).__name__ for module in recomputed.model.modules())
    assert_equal(weights_of(recomputed), weights_of(plain))


class TinyModel(Model):
    """Small enough to compile in a test."""

    Config = ModelConfig

    def __init__(self, config: ModelConfig, weights_dir: str | None = None) -> None:
        super().__init__(config)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 1))

    def forward(self, batch: Batch) -> Losses:
        return overlap_losses(self.net(batch.image_BCHW), batch.mask_BKHW, dice_weight=1.0, bce_weight=1.0)


@pytest.mark.parametrize("override", ["engine.channels_last=true", "engine.compile=true"])
def test_other_kernels_train_alike(make_cell, override):
    _, plain = alone(make_cell, "plain", "train.lr=1e-2", model_class=TinyModel)
    _, other = alone(make_cell, "other", "train.lr=1e-2", override, model_class=TinyModel)
    assert plain[2] < plain[0] - 0.01
    assert other == pytest.approx(plain, rel=1e-4)


def test_a_batch_in_parts_adds_up_to_the_gradient_of_their_mean(make_cell):
    """Against two backward passes by hand: BatchNorm sees each part alone, so the whole batch is no reference."""
    cell = CellConfig.load(make_cell("parts", "train.accumulate=2", "train.batch_size=4") / "config.yaml")
    start_ranks(cell, World())
    models = []
    for _ in range(2):
        seed_everything(cell.seed, "init")
        models.append(cell.model_class(cell.model).train())
    by_hand, ours = models
    engine = Engine(cell, World(), ours)
    parts = global_batch(0).split(2)
    for part in parts:
        seed_everything(0)
        (by_hand(part).total / 2).backward()
        seed_everything(0)
        engine.losses(part, last=part is parts[-1])
    theirs = dict(by_hand.named_parameters())
    for name, parameter in engine.trained.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
    expected = torch.nn.utils.get_total_norm([p.grad for p in by_hand.parameters() if p.grad is not None])
    assert float(engine.update(1e-3)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_bf16_that_a_gpu_would_only_emulate_is_refused_on_the_node(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    expected = pytest.raises(TrainingError, match=r"start anew with engine\.precision=fp16")
    with expected if refused else contextlib.nullcontext():
        refuse_emulated_bf16("bf16")
    refuse_emulated_bf16("fp16")


def test_an_overflow_under_fp16_skips_the_step_and_halves_the_scale(make_cell):
    cell = CellConfig.load(make_cell("fp16", "engine.precision=fp16", "train.ema=0.9") / "config.yaml")
    start_ranks(cell, World())
    engine = Engine(cell, World(), cell.model_class(cell.model))
    engine.train()
    engine.losses(global_batch(0))
    first = next(iter(engine.trained.values()))
    before, first.grad[0] = first.detach().clone(), torch.inf
    scale = engine.state()["scale"]["value"]
    assert not torch.isfinite(engine.update(1e-3))
    assert torch.equal(first, before)
    assert engine.state()["scale"]["value"] == scale / 2
    engine.scale.value = 1.5
    engine.losses(global_batch(0))
    first.grad[0] = torch.inf
    with pytest.raises(TrainingError, match="loss scale fell below 1"):
        engine.update(1e-3)


def test_averaged_weights_predict_with_averaged_statistics(make_cell):
    """Of 2 steps with decays (1 + u) / (10 + u): 1/10 and 2/11. Today's statistics would be those of other features."""
    cell = CellConfig.load(make_cell("averaged", "train.ema=0.9") / "config.yaml")
    start_ranks(cell, World())
    seed_everything(cell.seed, "init")
    engine = Engine(cell, World(), cell.model_class(cell.model))
    engine.train()
    name, norm = next((n, m) for n, m in engine.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d))
    expected = norm.running_var.clone()
    for kept in (1 / 10, 2 / 11):
        engine.losses(global_batch(0))
        engine.update(cell.train.lr)
        expected = kept * expected + (1 - kept) * norm.running_var
    assert not torch.allclose(expected, norm.running_var, rtol=1e-3)
    with engine.predictor() as model:
        torch.testing.assert_close(model.get_buffer(f"{name}.running_var"), expected)
    saved = {key: tensor for part, key, tensor in engine.tensors() if part == "ema"}
    torch.testing.assert_close(saved[f"{name}.running_var"], expected)


def test_a_model_without_batch_norm_keeps_an_average(make_cell):
    cell = CellConfig.load(make_cell("averaged", "train.ema=0.9") / "config.yaml")
    start_ranks(cell, World())
    engine = Engine(cell, World(), TinyModel(cell.model))
    engine.train()
    name, weight = next(iter(engine.trained.items()))
    start = weight.detach().clone()
    engine.losses(global_batch(0))
    engine.update(cell.train.lr)
    assert not torch.equal(weight, start)
    with engine.predictor() as model:
        torch.testing.assert_close(model.get_parameter(name).detach(), 0.1 * start + 0.9 * weight.detach())


def test_a_world_that_is_not_the_one_asked_for_is_refused(make_cell):
    cell = CellConfig.load(make_cell("two", "cluster.ranks_per_node=2") / "config.yaml")
    with pytest.raises(TrainingError, match=r"asked for ddp, 2 rank\(s\) on cpu, fp32, batch 4; got .*1 rank\(s\)"):
        Engine(cell, World(rank=0, size=2), cell.model_class(cell.model))
