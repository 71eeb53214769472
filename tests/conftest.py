"""Shared fixtures: where the real data is, what may not be skipped, and a small packed phantom dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

REQUIRE_REAL = os.environ.get("BUSHPC_REQUIRE_REAL") == "1"


def pytest_configure(config):
    """A worker of several (`pytest -n 2`) takes one core: more threads than cores make every test slower."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where BUSHPC_REQUIRE_REAL=1 (CI), a skipped test that is marked `real` is a failure."""
    outcome = yield
    report = outcome.get_result()
    if REQUIRE_REAL and report.skipped and item.get_closest_marker("real"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but BUSHPC_REQUIRE_REAL=1: {report.longrepr}"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real datasets; without it the tests that use it are skipped, and say so."""
    folder = os.environ.get("BUSHPC_DATA")
    if not folder:
        pytest.skip("BUSHPC_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 synthetic scans, packed, with folds."""
    from bushpc.cli import main

    folder = tmp_path_factory.mktemp("phantom")
    assert main(["pack", "data=phantom", f"out={folder}", "count=20", "workers=1"]) == 0
    return folder


@pytest.fixture(scope="session")
def synthetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 other synthetic scans, packed with the mark of a trained generator's images."""
    from bushpc.cli import main
    from bushpc.shards.card import PROJECT_SHARDS

    folder = tmp_path_factory.mktemp("synthetic")
    (folder / "card.yaml").write_text((PROJECT_SHARDS / "phantom" / "card.yaml").read_text() + "synthetic: true\n")
    assert main(["pack", "data=phantom", f"out={folder}", "count=20", "seed=1", "workers=1"]) == 0
    other = {"data": "busi", "manifest_sha256": "b" * 64, "folds_sha256": "f" * 64, "fold": 0}
    (folder / "generate.json").write_text(json.dumps({"trained_on": [other]}))
    return folder


TINY = (
    *("model=xbusnet_small", "data=phantom", "cluster=local", "model.image_size=64"),
    *("train.iterations=6", "train.batch_size=4", "train.save_every=2", "train.log_every=1", "prompts=first_pass"),
)


@pytest.fixture
def make_cell(tmp_path: Path, phantom_folder: Path):
    """make_cell("name", "train.lr=1e-3", …) → the folder of one tiny cell (fold 0), ready for `run_cell`."""
    import dataclasses
    import shutil

    from bushpc.config import compose

    def make(name: str, *overrides: str, fold: int = 0) -> Path:
        where = (f"data.root={phantom_folder}", f"runs_dir={tmp_path}", f"loader.cache_dir={tmp_path / 'cache'}")
        config = compose([*TINY, *where, *overrides])
        cell_dir = tmp_path / name / "cells" / f"fold{fold}"
        cell_dir.mkdir(parents=True)
        (cell_dir / "config.yaml").write_text(dataclasses.replace(config, fold=fold, name=name).to_yaml())
        shutil.copy(phantom_folder / "folds.csv", tmp_path / name / "folds.csv")
        return cell_dir

    return make


TINY_GENERATOR = (
    *("model=tumor_generator_small", "data=phantom", "cluster=local", "model.image_size=32", "model.steps=2"),
    *("model.unet_channels=[16,16,32]", "model.text_layers=1", "train.iterations=2", "train.batch_size=4"),
    *("train.warmup=0", "train.ema=0.5", "loader.features=false", "train.track=[]"),
)


@pytest.fixture(scope="session")
def train_generator(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Callable[..., Path]:
    """train_generator("name", "seed=1", …) → the folder of a run whose fold 0 is trained, for two steps.

    Its images mean nothing, and everything around them is real.
    """
    from bushpc.cell import run_cell
    from bushpc.config import compose
    from bushpc.dispatch.plan import cv_plan
    from bushpc.dispatch.run_folder import write_run
    from bushpc.dist import World

    folder = tmp_path_factory.mktemp("generators")

    def train(name: str, *overrides: str) -> Path:
        where = (f"data.root={phantom_folder}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}")
        plan = cv_plan(compose([*TINY_GENERATOR, *where, f"name={name}", "fold=0", *overrides]))
        write_run(folder / name, plan, ["bushpc", "cv"])
        assert run_cell(folder / name / "cells" / "fold0", World()) is None
        return folder / name

    return train


@pytest.fixture(scope="session")
def generator_run(train_generator: Callable[..., Path]) -> Path:
    """Ready for `bushpc generate`."""
    return train_generator("generator")
