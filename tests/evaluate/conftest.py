"""A run with two trained folds of five, made once: what predictions and exports are made from."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from bushpc.cell import run_cell
from bushpc.config import compose
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dist import World


class Trained(t.NamedTuple):
    """run: its folder. shards: what it was trained on."""

    run: Path
    shards: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Trained:
    """XBusNet on synthetic scans, folds 0 and 1, with averaged weights; folds 2 to 4 were never started."""
    folder = tmp_path_factory.mktemp("trained")
    config = compose(
        [
            *("model=xbusnet_small", "data=phantom", "cluster=local", "model.image_size=64", "name=used"),
            *("train.iterations=8", "train.batch_size=4", "train.lr=3e-3", "train.warmup=0", "train.ema=0.5"),
            *("evaluate.explain=0", "also_prompts=[]"),
            *(f"data.root={phantom_folder}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}"),
            f"loader.features_dir={folder / 'features'}",
        ]
    )
    write_run(folder / "used", cv_plan(config), ["bushpc", "cv"])
    for fold in (0, 1):
        assert run_cell(folder / "used" / "cells" / f"fold{fold}", World()) is None
    return Trained(run=folder / "used", shards=phantom_folder)


TINY_UNET = (
    *("model=unet_small", "model.image_size=32", "train.iterations=2", "train.warmup=0", "evaluate.explain=0"),
    *("evaluate.metrics=[dice,iou,hd95_px,dice_2class]", "prompts=none", "also_prompts=[]"),
)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, two_folds_folder: Path) -> Path:
    """A cross-validation of two folds, both done: a U-Net of 32 pixels after two steps. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("whole")
    where = (f"data.root={two_folds_folder}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}", "name=pp")
    write_run(folder / "pp", cv_plan(compose([*TINY_UNET, "data=phantom", "cluster=local", *where])), ["bushpc", "cv"])
    for fold in (0, 1):
        assert run_cell(folder / "pp" / "cells" / f"fold{fold}", World()) is None
    return folder / "pp"
