"""Promises of the engine: whatever shares out or saves memory, the same model is trained; and it says what it is."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from bushpc.config import CellConfig, ModelConfig
from bushpc.dist import World, meet, seed_everything
from bushpc.errors import TrainingError
from bushpc.losses.overlap import overlap_losses
from bushpc.models.base import Model
from bushpc.runs import checkpoint
from bushpc.sample import Batch, Losses
from bushpc.train.engine import Engine, refuse_emulated_bf16, start_ranks
from bushpc.train.optim import Schedule

# Ranks are forked from a process that has the slow imports behind it and has opened nothing.
RANKS = multiprocessing.get_context("forkserver")
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed decides when it is imported
RANKS.set_forkserver_preload(["accelerate", "deepspeed", "bushpc.models.xbusnet", "bushpc.train.engine"])


def global_batch(step: int, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        keys=[f"{step}-{i}" for i in range(size)],
        epochs=[0] * size,
        image_BCHW=torch.rand(size, 3, 64, 64, generator=generator),
        mask_BKHW=(torch.rand(size, 1, 64, 64, generator=generator) > 0.5).float(),
        label_B=torch.zeros(size, dtype=torch.long),
        conditions={
            "spatial_prompts": ["a small lesion in the upper inner quadrant of the breast", "", "", ""][:size],
            "attribute_prompts": ["oval shape", "irregular shape", "", "round shape"][:size],
            "captions": [""] * size,
        },
    )


def train(cell: CellConfig, world: World, folder: Path, start: int, stop: int) -> None:
    """Train from the newest checkpoint in `folder` (or from scratch), with a checkpoint before and after each step."""
    start_ranks(cell, world)
    seed_everything(cell.seed, "init")
    resumed = checkpoint.newest(folder, folder)
    assert (resumed.step if resumed else 0) == start
    engine = Engine(cell, world, smooth_model(cell), resumed)
    engine.train()
    save(engine, world, folder, start)
    for step in range(start, stop):
        seed_everything(cell.seed, "step", step, world.rank)
        whole = global_batch(step)
        shares = whole.split(world.size * cell.train.accumulate)
        mine = shares[world.rank * cell.train.accumulate :][: cell.train.accumulate]
        for part in mine:
            engine.losses(part, last=part is mine[-1])
        norm = engine.update(Schedule(cell.train, 4).lr(step))
        save(engine, world, folder, step + 1, norm)


@contextlib.contextmanager
def without_kinks() -> Iterator[None]:
    """ReLU and max pooling replaced by smooth functions.

    At a kink rounding decides which way a gradient goes: one activation near zero moved a layer's gradient by 1 %.
    """

    def relu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return torch.nn.functional.silu(x)

    def max_pool2d(
        x: torch.Tensor, kernel_size: int, stride: int, padding: int, *_: object, **__: object
    ) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, kernel_size, stride, padding)

    with (
        mock.patch("torch.nn.functional.relu", relu),
        mock.patch("torch.nn.functional.max_pool2d", max_pool2d),
    ):
        yield


def smooth_model(cell: CellConfig) -> Model:
    """The cell's model, to be used within `without_kinks`."""
    model = cell.model_class(cell.model)
    for module in model.modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer):
            module.activation = torch.nn.functional.gelu  # it took hold of relu when torch was imported
    return model


def save(engine: Engine, world: World, folder: Path, step: int, norm: torch.Tensor | None = None) -> None:
    """Besides the tensors of a checkpoint, the norm of the gradient before clipping and what the engine predicts."""
    parts: checkpoint.Parts = {} if norm is None else {"gradient": {"norm": norm.detach().float()}}
    for part, name, tensor in engine.tensors():
        parts.setdefault(part, {})[name] = tensor.detach().clone().contiguous()
    with engine.predictor() as model, torch.no_grad(), engine.autocast():
        parts["prediction"] = {"prob": model.predict(global_batch(99)).prob_BKHW.float()}
    engine.train()
    if world.is_main:
        checkpoint.write(folder, step, parts, {"frozen": None, **engine.state()})


def child(config: Path, rank: int, size: int, folder: Path, start: int, stop: int) -> None:
    torch.set_num_threads(1)
    cell = CellConfig.load(config)
    world = World(rank=rank, size=size, local_rank=rank)
    meet(world, folder, f"{start}-{stop}")
    with without_kinks():
        train(cell, world, folder, start, stop)
    assert torch.get_num_threads() == 1, "ranks that share cores must not each take all of them"


@pytest.fixture
def trained(make_cell, tmp_path):
    """trained("name", ranks, "override", …, start=0, stop=2) → the folder of checkpoints, after training in it."""

    def run(name: str, ranks: int, *overrides: str, start: int = 0, stop: int = 2) -> Path:
        folder = tmp_path / f"{name}-checkpoints"
        folder.mkdir(exist_ok=True)
        cell_dir = make_cell(
            f"{name}-{start}-{ranks}", f"cluster.ranks_per_node={ranks}", "train.grad_clip=0.5", *overrides
        )
        processes = [
            RANKS.Process(target=child, args=(cell_dir / "config.yaml", rank, ranks, folder, start, stop))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        return folder

    return run


def tensors(folder: Path, part: str, step: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step_{step:08d}" / f"{part}.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert different == []


@pytest.mark.real
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_zero_trains_what_ddp_trains(trained, tmp_path, kind):
    """Compares gradients at the same weights, and holds ZeRO's update of the weights against AdamW's formula.

    Weights after a step cannot be compared: Adam divides each gradient by its own size, so where a gradient is zero up
    to rounding, as for a bias before BatchNorm, the sign of the rounding error decides a whole step.
    """
    overrides = ("train.ema=0.9", "train.grad_clip=0.2")
    ddp, zero = trained("ddp", 2, *overrides), trained(kind, 2, f"engine={kind}", *overrides)
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
            torch.testing.assert_close(after[name], before[name] * (1 - lr * decay) - lr * change, rtol=1e-5, atol=1e-6)
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


# Engine and precision on two ranks, and the engine that goes on alone.
CASES = [
    *[("ddp", "bf16", "zero3"), ("zero1", "bf16", "ddp"), ("zero2", "bf16", "zero2"), ("zero3", "bf16", "zero3")],
    *[("ddp", "fp16", "ddp"), ("zero2", "fp16", "zero1")],
]


@pytest.mark.real
@pytest.mark.parametrize(("kind", "precision", "alone_kind"), CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_and_any_engine_on_other_ranks_goes_on_from_it(
    trained, tmp_path, kind, precision, alone_kind
):
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


def test_a_world_that_is_not_the_one_asked_for_is_refused(make_cell):
    cell = CellConfig.load(make_cell("two", "cluster.ranks_per_node=2") / "config.yaml")
    with pytest.raises(TrainingError, match=r"asked for ddp, 2 rank\(s\) on cpu, fp32, batch 4; got .*1 rank\(s\)"):
        Engine(cell, World(rank=0, size=2), cell.model_class(cell.model))
