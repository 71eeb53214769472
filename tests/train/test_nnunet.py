"""Promises of nnU-Net in our runs: told what it can be told, stopped and resumed exactly, scored like every model.

Those that train need the extra bushpc[nnunet], and are skipped without it.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bushpc.cli import main
from bushpc.config import CellConfig, compose
from bushpc.dispatch.grid import cv_plan, grid_plan
from bushpc.dist import World
from bushpc.errors import ConfigError
from bushpc.models.baselines import UNet
from bushpc.run import run_cell
from bushpc.sample import Prediction
from bushpc.train.loop import Stopped
from bushpc.train.preempt import StopFlag

needs_nnunet = pytest.mark.skipif(
    importlib.util.find_spec("nnunetv2") is None, reason="the extra bushpc[nnunet] is not installed"
)
TINY = (
    *("model=nnunet_small", "data=phantom", "cluster=local", "model.image_size=32"),
    *("model.iterations_per_epoch=2", "train.iterations=4", "train.save_every=2"),
)


@pytest.fixture
def plan(phantom_folder, tmp_path):
    """plan("override", …) → the plan of `bushpc cv model=nnunet_small` on the phantom."""
    return lambda *words: cv_plan(compose([*TINY, f"data.root={phantom_folder}", f"runs_dir={tmp_path}", *words]))


def rows_of(cell_dir: Path) -> list[dict[str, str]]:
    with (cell_dir / "per_image.csv").open() as file:
        return list(csv.DictReader(file))


# --- before the queue -----------------------------------------------------------------------------------------------


def test_without_the_extra_nothing_is_queued(plan, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'bushpc\[nnunet\]'"):
        plan("train.track=[]")


def test_the_doctor_looks_for_the_extra(phantom_folder, tmp_path, monkeypatch):
    from bushpc.dispatch.doctor import check_config

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    where = (f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "train.track=[]")
    checks = {check.name: check for check in check_config(compose([*TINY, *where]))}
    assert checks["trainer"].verdict == "broken"
    assert "bushpc[nnunet]" in checks["trainer"].found
    assert "not known" in checks["disk room"].found


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.ema=0.9", r"train.ema=0.9: nnU-Net has its own"),
        ("train.batch_size=4", r"train.batch_size=4"),
        ("train.epochs=3", r"train.epochs=3"),
        ("train.validate_every=2", r"train.validate_every=2"),
        ("augment.hflip=0.5", r"augment"),
        ("train.iterations=5", r"no multiple of model.iterations_per_epoch=2; the nearest that is: 4"),
        ("model.iterations_per_epoch=0", r"allowed is 1 or more"),
        ("model.pretrained=true", r"trains from scratch"),
    ],
)
def test_what_nnunet_cannot_be_told_is_refused_on_the_login_node(plan, word, said):
    with pytest.raises(ConfigError, match=said):
        plan(word)


def test_two_ranks_are_refused(plan):
    with pytest.raises(ConfigError, match="set both to 1"):
        plan("cluster.ranks_per_node=2", "train.batch_size=2")


def test_what_its_yaml_says_is_what_it_can_be_told(plan, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert plan().cells["fold4"].train.lr == 0.01
    full = compose(["model=nnunet", "data=phantom", "cluster=local"])
    full.model_class.check_run(full)
    assert full.train.iterations == 1000 * full.model.iterations_per_epoch


def test_its_downstream_grid_has_the_papers_ratios(phantom_folder, synthetic_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    where = (f"data.root={phantom_folder}", f"runs_dir={tmp_path}", f"data.synthetic={synthetic_folder}")
    small = ("model=nnunet_small", "data=phantom", "cluster=local", "fold=0")
    with pytest.raises(Exception, match=r"data.synthetic_ratio=8"):  # 20 scans are too few for the last rows
        grid_plan(["grid=tumor_downstream_nnunet", *small, *where])


# --- a model that brings its trainer, whichever ---------------------------------------------------------------------


class Left(UNet):
    """Says that the left half is lesion."""

    def predict(self, batch):
        prob_BKHW = torch.zeros_like(batch.mask_BKHW)
        prob_BKHW[..., : prob_BKHW.shape[-1] // 2] = 1
        return Prediction(prob_BKHW=prob_BKHW)


def own_trainer(monkeypatch, train):
    """Have cells of the U-Net trained by `train`."""
    monkeypatch.setattr(UNet, "trainer", "a_trainer_of_its_own")
    monkeypatch.setattr(UNet, "predict", Left.predict)
    monkeypatch.setitem(sys.modules, "a_trainer_of_its_own", types.SimpleNamespace(train=train))


def test_its_predictions_are_scored_like_every_models(make_cell, monkeypatch):
    own_trainer(monkeypatch, lambda cell, *rest: cell.train.iterations)
    cell_dir = make_cell("own", "model=unet_small", "model.image_size=32")
    assert run_cell(cell_dir, World()) is None
    assert json.loads((cell_dir / "DONE").read_text())["step"] == 6
    cell = CellConfig.load(cell_dir / "config.yaml")
    for row in rows_of(cell_dir):
        predicted = np.asarray(Image.open(cell_dir / "predictions" / "none" / f"{row['key']}.png")) > 127
        assert predicted[:, :16].all()
        assert not predicted[:, 16:].any()
        mask = masks_of(cell)[row["key"]]
        dice = 2 * (mask & predicted).sum() / (mask.sum() + predicted.sum())
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-6)


def masks_of(cell: CellConfig) -> dict[str, np.ndarray]:
    from bushpc.data.cache import decode
    from bushpc.shards.manifest import Manifest

    records = Manifest.load(cell.data.folder).lesions
    return {r.key: decode(cell.data.folder, r, cell.model.image_size)[1] > 0 for r in records}


def test_a_stop_of_its_trainer_is_a_stop_of_the_cell(make_cell, monkeypatch):
    own_trainer(monkeypatch, lambda *rest: Stopped(step=2, signal_name="SIGTERM"))
    cell_dir = make_cell("stopped", "model=unet_small", "model.image_size=32")
    assert run_cell(cell_dir, World()) == Stopped(step=2, signal_name="SIGTERM")
    assert not (cell_dir / "DONE").exists()


# --- the real one ---------------------------------------------------------------------------------------------------


class StopAfter(StopFlag):
    """Is told to stop when it has been asked so often after training began."""

    def __init__(self, cell_dir: Path, times: int) -> None:
        super().__init__()
        self.state, self.times = cell_dir / "state.json", times

    def __bool__(self) -> bool:
        if self.state.exists() and json.loads(self.state.read_text())["phase"] == "training":
            self.times -= 1
            if self.times < 0:
                self.signal_name = "SIGTERM"
        return self.signal_name is not None


@needs_nnunet
def test_nnunet_trains_and_is_scored_and_a_stop_changes_nothing(make_cell):
    """One test, as nnU-Net's preparation takes most of its time. About half a minute."""
    whole, halved = make_cell("whole", *TINY), make_cell("halved", *TINY)
    assert run_cell(whole, World()) is None
    stopped = run_cell(halved, World(), StopAfter(halved, 3))  # in the second epoch
    assert stopped == Stopped(step=2, signal_name="SIGTERM")
    assert run_cell(halved, World()) is None
    last = "checkpoints/step_00000004/model.safetensors"
    ours, theirs = load_file(whole / last), load_file(halved / last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    cell = CellConfig.load(whole / "config.yaml")
    masks = masks_of(cell)
    for row in rows_of(whole):
        predicted = np.asarray(Image.open(whole / "predictions" / "none" / f"{row['key']}.png")) > 127
        counted = ((predicted & masks[row["key"]]).sum(), (predicted & ~masks[row["key"]]).sum())
        assert np.abs(np.subtract(counted, (int(row["tp"]), int(row["fp"])))).max() <= 2  # maps have 8 bits
    assert not (whole / "nnunet" / "preprocessed").exists()
    assert_nnunets_own_command_agrees(whole)

    run_dir = whole.parent.parent
    import bushpc

    (run_dir / "run.json").write_text(json.dumps({"name": "whole", "cells": [{"name": "fold0", "fold": 0}]}))
    predictor = bushpc.load(run_dir, fold=0)
    image = np.asarray(Image.new("RGB", (40, 30), (90, 90, 90)))
    assert predictor(image).prob_HW.shape == (30, 40)


def assert_nnunets_own_command_agrees(cell_dir: Path) -> None:
    """What `nnUNetv2_predict` makes of the folder that it is left is what was scored."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from bushpc.data.cache import decode
    from bushpc.shards.manifest import Manifest

    cell = CellConfig.load(cell_dir / "config.yaml")
    key = rows_of(cell_dir)[0]["key"]
    image_SSC, _ = decode(cell.data.folder, Manifest.load(cell.data.folder).record(key), cell.model.image_size)
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    [folder] = (cell_dir / "nnunet" / "results").glob("*/nnUNetTrainer__nnUNetPlans__2d")
    theirs.initialize_from_trained_model_folder(str(folder), use_folds=(0,))
    levels_C1HW = image_SSC.transpose(2, 0, 1)[:, None].astype(np.float32)
    _, prob = theirs.predict_single_npy_array(levels_C1HW, {"spacing": (999, 1, 1)}, None, None, True)
    ours = np.asarray(Image.open(cell_dir / "predictions" / "none" / f"{key}.png")) / 255
    np.testing.assert_allclose(ours, prob[1, 0], atol=0.5 / 255 + 1e-4)


@needs_nnunet
def test_an_audit_says_why_there_is_nothing_to_prove(make_cell, capsys):
    from bushpc.train.ledger import keep_none

    cell_dir = make_cell("audited", *TINY)
    keep_none(cell_dir, "not proved: at random")
    run_dir = cell_dir.parent.parent
    import hashlib

    sha256 = hashlib.sha256((run_dir / "folds.csv").read_bytes()).hexdigest()
    content = {"folds": {"sha256": sha256}, "cells": [{"name": "fold0", "fold": 0}]}
    (run_dir / "run.json").write_text(json.dumps(content))
    assert main(["audit", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["verdict"] == "not proved: at random"
