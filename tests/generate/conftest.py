"""A tiny generator's run, trained for two steps: its images mean nothing, and everything around them is real."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from bushpc.config import compose
from bushpc.dispatch.grid import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dist import World
from bushpc.run import run_cell

TINY = (
    *("model=tumor_generator_small", "data=phantom", "cluster=local", "model.image_size=32", "model.steps=2"),
    *("model.unet_channels=[16,16,32]", "model.text_layers=1", "train.iterations=2", "train.batch_size=4"),
    *("train.warmup=0", "train.ema=0.5", "loader.features=false", "train.track=[]"),
)


@pytest.fixture(scope="session")
def train_generator(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> t.Callable[..., Path]:
    """train_generator("name", "seed=1", …) → the folder of a run whose fold 0 is trained."""
    folder = tmp_path_factory.mktemp("generators")

    def train(name: str, *overrides: str) -> Path:
        where = (f"data.root={phantom_folder}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}")
        write_run(folder / name, cv_plan(compose([*TINY, *where, f"name={name}", *overrides])), ["bushpc", "cv"])
        assert run_cell(folder / name / "cells" / "fold0", World()) is None
        return folder / name

    return train


@pytest.fixture(scope="session")
def generator_run(train_generator: t.Callable[..., Path]) -> Path:
    """Ready for `bushpc generate`."""
    return train_generator("generator")
