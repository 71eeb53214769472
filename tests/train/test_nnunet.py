"""Promises of nnU-Net in our runs: told what it can be told, stopped and resumed exactly, scored like every model.

Those that train need the extra bushpc[nnunet], which CI has: there they are not skipped.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bushpc.cell import run_cell
from bushpc.cli import main
from bushpc.config import CellConfig, compose
from bushpc.dispatch.grid_file import load_grid
from bushpc.dispatch.plan import cv_plan
from bushpc.dist import World
from bushpc.errors import ConfigError, TrainingError
from bushpc.models.baselines import UNet
from bushpc.sample import Prediction
from bushpc.train.ledger import why_none
from bushpc.train.loop import Stopped
from bushpc.train.preempt import StopFlag
from tests.conftest import write_run_record

ROOT = Path(__file__).resolve().parents[2]


def needs_nnunet(test: Callable) -> Callable:
    """Skipped without the package, which is a failure where nothing may be skipped."""
    missing = importlib.util.find_spec("nnunetv2") is None
    test = pytest.mark.skipif(missing, reason="the extra bushpc[nnunet] is not installed")(test)
    return pytest.mark.real(pytest.mark.usefixtures("few_voxels")(test))


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
    from bushpc.ops.doctor import check_config

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
        ("train.iterations=5", r"no multiple of model.iterations_per_epoch=2; the nearest is 4"),
        ("model.iterations_per_epoch=0", r"must be ≥ 1"),
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
    full.model.check_run(full)
    assert full.train.iterations == 1000 * full.model.iterations_per_epoch


def test_its_downstream_grid_has_the_papers_ratios():
    rows = {row.name: row.settings for row in load_grid("tumor_downstream_nnunet").rows}
    mixed = {f"synthetic_{ratio}": {"data.synthetic_ratio": ratio} for ratio in (1, 2, 4, 8)}
    alone = {"synthetic_only": {"data.synthetic_ratio": 1, "data.real": False}}
    assert rows == {"real_only": {"data.synthetic_ratio": 0}, **mixed, **alone}


@pytest.mark.parametrize(
    ("words", "trained", "labelled", "segmented"),
    [
        (["data.synthetic=made"], "busi", "[udiat]", "[udiat,stu]"),
        (["udiat", "data.synthetic=made"], "udiat", "[busi]", "[busi,stu]"),
    ],
)
def test_the_script_of_tables_3_and_4_trains_every_model_of_theirs(tmp_path, words, trained, labelled, segmented):
    for folder in ("slurm", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    script = shutil.copy(ROOT / "slurm" / "downstream_tumor_generator.sh", tmp_path / "slurm")
    (tmp_path / ".venv/bin/bushpc").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / ".venv/bin/bushpc").chmod(0o755)
    told = subprocess.run(["bash", script, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    rest = "cluster=a100 data.synthetic=made"
    assert told.splitlines() == [
        f"grid grid=tumor_downstream_classification data={trained} evaluate.external={labelled} {rest}",
        f"grid grid=tumor_downstream_segmentation data={trained} evaluate.external={segmented} {rest}",
        f"grid grid=tumor_downstream_nnunet data={trained} evaluate.external={segmented} {rest}",
    ]


# --- a model that brings its trainer, whichever ---------------------------------------------------------------------


OURS = ("model=unet_small", "model.image_size=32")


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
    own_trainer(monkeypatch, lambda at, *rest: at.cell.train.iterations)
    cell_dir = make_cell("own", *OURS)
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
    from bushpc.data.square import decode
    from bushpc.shards.manifest import Manifest

    records = Manifest.load(cell.data.folder).lesions
    return {r.key: decode(cell.data.folder, r, cell.model.image_size)[1] > 0 for r in records}


def test_a_stop_of_its_trainer_is_a_stop_of_the_cell(make_cell, monkeypatch):
    own_trainer(monkeypatch, lambda *rest: Stopped(step=2, signal_name="SIGTERM"))
    cell_dir = make_cell("stopped", *OURS)
    assert run_cell(cell_dir, World()) == Stopped(step=2, signal_name="SIGTERM")
    assert not (cell_dir / "DONE").exists()


def test_weights_of_another_run_are_taken_over_and_not_trained_again(make_cell, monkeypatch):
    source, cell_dir = make_cell("source", *OURS), make_cell("taking", *OURS)
    for folder in (source, cell_dir):
        (folder.parent.parent / "run.json").write_text(json.dumps({"cells": [{"name": "fold0", "fold": 0}]}))
    assert run_cell(source, World()) is None
    config = CellConfig.load(cell_dir / "config.yaml")
    taking = dataclasses.replace(config.train, weights_from=str(source.parent.parent))
    (cell_dir / "config.yaml").write_text(dataclasses.replace(config, train=taking).to_yaml())
    begun_at = []

    def train(at, model, resumed, saver):
        begun_at.append(resumed.step)
        return resumed.step

    own_trainer(monkeypatch, train)
    assert run_cell(cell_dir, World()) is None
    assert begun_at == [6]
    assert json.loads((cell_dir / "taken_over.json").read_text()) == {"trained_in": str(source), "step": 6}


# --- the real one ---------------------------------------------------------------------------------------------------


class StopWhen(StopFlag):
    """Is told to stop as soon as that is so."""

    def __init__(self, is_so: Callable[[], bool]) -> None:
        super().__init__()
        self.is_so = is_so

    def __bool__(self) -> bool:
        if self.is_so():
            self.signal_name = "SIGTERM"
        return self.signal_name is not None


def after(times: int, cell_dir: Path) -> StopWhen:
    """Is told to stop when it has been asked so often after training began: a step asks once."""
    state, left = cell_dir / "state.json", iter(range(times))
    training = lambda: state.exists() and json.loads(state.read_text())["phase"] == "training"  # noqa: E731
    return StopWhen(lambda: training() and next(left, None) is None)


def prepare(cell_dir: Path) -> Path:
    """Stopped the moment that nnU-Net's preparation is whole, which is kept; returns its folder."""
    folder = cell_dir / "nnunet"
    assert run_cell(cell_dir, World(), StopWhen((folder / "prepared").exists)) == Stopped(0, "SIGTERM")
    return folder


@pytest.fixture
def few_voxels(monkeypatch):
    """nnU-Net's statistics of intensities, which our plans only note, are from fewer than a hundred million voxels."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    whole = DatasetFingerprintExtractor.__init__

    def fewer(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1e5

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", fewer)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nnunet") / "kept"


@pytest.fixture
def prepared(make_cell, kept) -> Callable[..., Path]:
    """prepared("name", "override", …) → the folder of a tiny cell that is prepared for training."""

    def make(name: str, *overrides: str) -> Path:
        cell_dir = make_cell(name, *TINY, *overrides)
        if not kept.exists():
            shutil.copytree(prepare(cell_dir), kept)
        shutil.copytree(kept, cell_dir / "nnunet", dirs_exist_ok=True)
        return cell_dir

    return make


@needs_nnunet
def test_nnunet_trains_and_is_scored_and_a_stop_changes_nothing(prepared, monkeypatch, capsys):
    """One test of what a whole run leaves."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    splits, do_split = [], nnUNetTrainer.do_split
    monkeypatch.setattr(nnUNetTrainer, "do_split", lambda self: splits.append(do_split(self)) or splits[-1])
    whole, halved = prepared("whole"), prepared("halved")
    assert run_cell(whole, World()) is None
    stopped = run_cell(halved, World(), after(3, halved))  # in the second epoch
    assert stopped == Stopped(step=2, signal_name="SIGTERM")
    assert run_cell(halved, World()) is None
    last = "checkpoints/step_00000004/model.safetensors"
    ours, theirs = load_file(whole / last), load_file(halved / last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    cell, run_dir = CellConfig.load(whole / "config.yaml"), whole.parent.parent
    masks = masks_of(cell)
    with (run_dir / "folds.csv").open() as file:
        fold_of = {row["key"]: row["fold"] for row in csv.DictReader(file) if row["key"] in masks}
    assert splits
    for train, val in splits:
        assert set(train) == {key for key, fold in fold_of.items() if fold != "0"}
        assert set(val) == {key for key, fold in fold_of.items() if fold == "0"}
    for row in rows_of(whole):
        predicted = np.asarray(Image.open(whole / "predictions" / "none" / f"{row['key']}.png")) > 127
        counted = ((predicted & masks[row["key"]]).sum(), (predicted & ~masks[row["key"]]).sum())
        assert np.abs(np.subtract(counted, (int(row["tp"]), int(row["fp"])))).max() <= 2  # maps have 8 bits
    assert not (whole / "nnunet" / "preprocessed").exists()
    assert_nnunets_own_command_agrees(whole)

    import bushpc

    write_run_record(whole, "nnunet")
    predictor = bushpc.load(run_dir, fold=0)
    image = np.asarray(Image.new("RGB", (40, 30), (90, 90, 90)))
    assert predictor(image).prob_HW.shape == (30, 40)
    assert main(["export", str(run_dir), str(run_dir.parent / "exported")]) == 0
    np.testing.assert_array_equal(bushpc.load(run_dir.parent / "exported")(image).prob_HW, predictor(image).prob_HW)

    capsys.readouterr()
    assert main(["audit", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["verdict"] == why_none(whole) == "unproved: drawn at random"


def assert_nnunets_own_command_agrees(cell_dir: Path) -> None:
    """What `nnUNetv2_predict` makes of the folder that it is left is what was scored."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from bushpc.data.square import decode
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
def test_rows_that_differ_in_synthetic_scans_have_one_plan(prepared, make_cell, synthetic_folder):
    real = prepared("real") / "nnunet"
    for name, more in (("mixed", ()), ("alone", ("data.real=false",))):
        words = (f"data.synthetic={synthetic_folder}", "data.synthetic_ratio=1", *more)
        row = prepare(make_cell(name, *TINY, *words))
        [plans] = row.glob("preprocessed/*/nnUNetPlans.json")
        assert plans.read_bytes() == (real / plans.relative_to(row)).read_bytes()


@needs_nnunet
def test_a_stop_does_not_wait_for_the_preparation(make_cell, monkeypatch):
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    begun, stopped = threading.Event(), threading.Event()

    def slowly(*words):
        begun.set()
        assert stopped.wait(60)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", slowly)
    cell_dir = make_cell("stopped", *TINY)
    assert run_cell(cell_dir, World(), StopWhen(begun.is_set)) == Stopped(0, "SIGTERM")
    stopped.set()
    assert not (cell_dir / "nnunet" / "prepared").exists()


@needs_nnunet
def test_another_split_than_the_folds_is_refused(prepared):
    cell_dir = prepared("moved")
    [file] = (cell_dir / "nnunet").glob("preprocessed/*/splits_final.json")
    [split] = json.loads(file.read_text())
    split["train"].append(split["val"].pop())
    file.write_text(json.dumps([split]))
    with pytest.raises(TrainingError, match=r"train on 17 scans and validate on 3 that are not the fold's 16 and 4"):
        run_cell(cell_dir, World())


@needs_nnunet
def test_a_worker_process_draws_by_the_seed_and_stops_and_resumes(prepared, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    seen, train_step = [], nnUNetTrainer.train_step
    monkeypatch.setattr(nnUNetTrainer, "train_step", lambda self, batch: seen.append(batch) or train_step(self, batch))
    cell_dir = prepared("worker", "loader.workers=1")
    assert run_cell(cell_dir, World(), after(1, cell_dir)) == Stopped(0, "SIGTERM")
    assert run_cell(cell_dir, World(), after(3, cell_dir)) == Stopped(2, "SIGTERM")
    assert run_cell(cell_dir, World()) is None
    assert not multiprocessing.active_children()
    attempts = [seen[:1], seen[1:4], seen[4:]]
    assert [len(attempt) for attempt in attempts] == [1, 3, 2]
    first, again, later = (attempt[0] for attempt in attempts)
    assert list(first["keys"]) == list(again["keys"])
    assert torch.allclose(first["data"], again["data"], atol=1e-3)  # its blur convolves in the way that is faster now
    assert not torch.allclose(first["data"], later["data"], atol=1e-3)


@needs_nnunet
def test_a_failure_ends_the_process_with_its_workers(prepared, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    def fail(self, batch):
        raise RuntimeError("out of memory")

    def job():
        torch.set_num_threads(1)  # OpenMP's do not outlive a fork
        run_cell(cell_dir, World())

    monkeypatch.setattr(nnUNetTrainer, "train_step", fail)
    cell_dir = prepared("failing", "loader.workers=1", "engine.hang_s=0")
    process = multiprocessing.Process(target=job)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 1
