"""Settings of others, and run folders in group space."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from .reader import Reader, file, lines

READERS: dict[str, Reader] = {}


FOLDS = "cells/fold0"


CELL = ("model=unet_small", "data=phantom", "model.image_size=32")


def _compose(*words: str) -> Callable[[Path], None]:
    def read(_: Path) -> None:
        from bushpc.config import compose

        compose([*CELL, *words]).to_yaml()

    return read


def _load_grid(folder: Path) -> None:
    from bushpc.config import compose
    from bushpc.dispatch.grid_file import load_grid

    grid = load_grid(str(folder / "mine.yaml"))
    for row in grid.rows[:2]:
        compose([*CELL, *grid.base, *(f"{key}={value}" for key, value in row.settings.items())])


def _paper(folder: Path) -> None:
    from bushpc.dispatch.reproduce import load_paper

    load_paper(str(folder / "mine.yaml"))


SITE = """# A site.
defaults: [slurm, _self_]
partition: gpu
account: null
gpus: 1
cpus_per_rank: 8
mem_gb: ${cluster.cpus_per_rank}
setup: [module load cuda/12.6, 'export A="b c"']
sbatch: {hint: nomultithread, qos: 010}
"""
GRID = """title: Widths
base: [train.iterations=10]
axes:
  lr:
    small: {train.lr: 1.0e-4}
    large: {train.lr: 1.0e-3}
  seed: [0, 1]
exclude:
  - {train.lr: 1.0e-4, seed: 1}
rows:
  last: {label: Last, set: {train.lr: 0.01, train.batch_size: 4}}
baseline: last
"""
PAPER = """title: Mine
steps:
  one: {what: "Table 1", command: [cv, model=unet_small, data=phantom]}
  two: {what: "the model", command: [export, "{run:one}", "{export:one}", --fold, 0]}
"""
READERS["a site's yaml"] = Reader(write=file("configs/cluster/mine.yaml", SITE), read=_compose("cluster=mine"), slow=3)
READERS["a grid's yaml"] = Reader(write=file("mine.yaml", GRID), read=_load_grid)
READERS["a paper's yaml"] = Reader(write=file("mine.yaml", PAPER), read=_paper)


def _frozen(folder: Path, _: Path) -> Path:
    from bushpc.config import compose

    (folder / "config.yaml").write_text(dataclasses.replace(compose([*CELL]), fold=0, name="x").to_yaml())
    return folder / "config.yaml"


def _load_frozen(folder: Path) -> None:
    from bushpc.config import CellConfig
    from bushpc.config.frozen import FrozenSettings

    FrozenSettings.load(folder / "config.yaml")
    cell = CellConfig.load(folder / "config.yaml")
    assert CellConfig.from_dict(cell.to_dict()) == cell


READERS["a cell's config.yaml"] = Reader(write=_frozen, read=_load_frozen)


def _run(name: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, _: Path) -> Path:
        from ..report.conftest import RunBuilder, make_rows

        run = RunBuilder(folder / "run", folds=1)
        run.complete({0: make_rows(0, {"first_pass": [0.5, 0.8]})})
        run.spent(0, {"training": 10.0})
        cell = run.path / FOLDS
        (cell / "state.json").write_text(json.dumps({"phase": "training", "step": 5, "total": 10, "time": 1000.0}))
        (cell / "evaluated").mkdir()
        line = {"weights": "w", "row": {"key": "k"}, "seconds": 0.1}
        (cell / "evaluated" / "first_pass.0.jsonl").write_text(lines(line, line))
        (cell / "ledger").mkdir()
        (cell / "ledger" / "rank0.csv").write_text("attempt,step,world,rank,samples\n0,0,1,0,0:a 0:b\n0,1,1,0,1:a\n")
        return run.path / name

    return write


def _use_run(folder: Path) -> None:
    from bushpc.dispatch.status import read_status
    from bushpc.report.read_run import read_run
    from bushpc.runs.goodput import read_attempts

    read_attempts(folder / "run" / FOLDS)
    read_status(folder / "run").to_json()
    run = read_run(folder / "run")
    str(run)


for name in ("run.json", *(f"{FOLDS}/{each}" for each in (
    "metrics.jsonl", "per_image.csv", "attempts.jsonl", "DONE", "state.json", "config.yaml"
))):  # fmt: skip
    READERS[f"a run's {name.rpartition('/')[2]}"] = Reader(write=_run(name), read=_use_run)
