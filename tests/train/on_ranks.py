"""Trainings on several ranks that tests compare: a checkpoint before and after each step, with gradients' norms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from bushpc.config import CellConfig
from bushpc.dist import World, meet, seed_everything
from bushpc.models.base import Model
from bushpc.runs import checkpoint
from bushpc.sample import Batch
from bushpc.train.engine import Engine, start_ranks
from bushpc.train.optim import Schedule
from tests.ranks import RANKS


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


def trainer(folder: Path, make_cell: Callable[..., Path]) -> Callable[..., Path]:
    """run("name", ranks, "override", …, start=0, stop=2) → the folder of checkpoints, after training in it."""

    def run(name: str, ranks: int, *overrides: str, start: int = 0, stop: int = 2) -> Path:
        checkpoints = folder / f"{name}-checkpoints"
        checkpoints.mkdir(exist_ok=True)
        cell_dir = make_cell(
            f"{name}-{start}-{ranks}", f"cluster.ranks_per_node={ranks}", "train.grad_clip=0.5", *overrides
        )
        processes = [
            RANKS.Process(target=child, args=(cell_dir / "config.yaml", rank, ranks, checkpoints, start, stop))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        return checkpoints

    return run


def tensors(folder: Path, part: str, step: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step_{step:08d}" / f"{part}.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert different == []
