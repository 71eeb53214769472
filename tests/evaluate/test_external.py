"""Promises of other datasets: every scan of each is scored by every fold's model, and none that it may have seen."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch

from bushpc.cell import run_cell
from bushpc.cli import main
from bushpc.config import CellConfig, ModelConfig, compose
from bushpc.data.loader import FoldData
from bushpc.data.square import resize
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dist import World
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.evaluate import Evaluation, Predicting
from bushpc.evaluate.external import evaluate_external
from bushpc.models.base import Model
from bushpc.report import build_report
from bushpc.runs.layout import CellDir
from bushpc.sample import LABELS, Prediction
from bushpc.shards.manifest import Manifest, read_image, read_mask

UNET = ("model=unet_small", "model.image_size=64", "evaluate.batch_size=4")


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """10 scans and 2 normal ones of another seed than the phantom's, packed into a folder called far."""
    folder = tmp_path_factory.mktemp("other") / "far"
    words = ["pack", "data=phantom", f"out={folder}", "count=10", "normals=2", "seed=5", "workers=1"]
    assert main(words) == 0
    return folder


class Dark(Model):
    """Takes what is dark for lesion: a prediction that a test can make by itself."""

    Config = ModelConfig
    makes = frozenset({"prob_BKHW"})

    def predict(self, batch):
        return Prediction(prob_BKHW=(batch.image_BCHW.mean(1, keepdim=True) < 0.25).float())


def how(stop=lambda: False):
    return Predicting(device=torch.device("cpu"), autocast=contextlib.nullcontext, stop=stop, alive=lambda _: None)


@pytest.fixture
def scored(make_cell, far, monkeypatch, tmp_path):
    """scored(name, stop=…) → (whether it went to its end, its folder) of the dark model on `far`."""

    # A job has a copy of the code, and no cards beside it.
    monkeypatch.setattr("bushpc.shards.card.PROJECT_SHARDS", tmp_path / "nowhere")

    def make(name, *overrides, stop=lambda: False):
        cell_dir = make_cell(name, *UNET, f"evaluate.external=[{far}]", *overrides)
        return again(cell_dir, stop), cell_dir

    return make


def again(cell_dir, stop=lambda: False):
    cell = CellConfig.load(cell_dir / "config.yaml")
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    model = Dark(ModelConfig(image_size=64, pretrained=False))
    return evaluate_external(Evaluation(cell, model, data, how(stop), World(), print), CellDir(cell_dir), 7)


def rows_of(cell_dir):
    with (cell_dir / "external" / "far.csv").open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def test_every_scan_is_scored_as_a_validation_image_would_be(scored, far):
    ended, cell_dir = scored("whole")
    assert ended
    rows, manifest = rows_of(cell_dir), Manifest.load(far)
    assert list(rows) == sorted(record.key for record in manifest.lesions)
    for record in manifest.lesions:
        image_SSC, mask_SS = resize(read_image(far, record), read_mask(far, record), 64)
        found_SS = image_SSC.mean(2) / 255 < 0.25
        dice = 2 * np.sum(found_SS & (mask_SS > 0)) / (found_SS.sum() + (mask_SS > 0).sum())
        assert float(rows[record.key]["dice"]) == pytest.approx(dice, abs=1e-6)
        assert (rows[record.key]["fold"], rows[record.key]["prompts"]) == ("0", "none")


def test_normal_scans_are_scored_where_the_model_knows_them(scored, far):
    _, cell_dir = scored("normals", "data.normals=true")
    assert set(rows_of(cell_dir)) == {record.key for record in Manifest.load(far).records}


def test_a_stopped_evaluation_goes_on_where_it_was_and_ends_alike(scored, tmp_path):
    journal = tmp_path / "stopped" / "cells" / "fold0" / "evaluated"
    ended, cell_dir = scored("stopped", stop=journal.exists)  # after the first batch
    assert not ended
    assert not (cell_dir / "external").exists()
    assert again(cell_dir)
    _, whole = scored("uninterrupted")
    assert rows_of(cell_dir) == rows_of(whole)


def words(phantom_folder, tmp_path, *more):
    where = (f"data.root={phantom_folder}", f"runs_dir={tmp_path}", f"loader.cache_dir={tmp_path / 'cache'}")
    return ["data=phantom", "cluster=local", *where, *more]


def test_a_classifier_is_trained_scored_elsewhere_explained_and_reported(phantom_folder, far, tmp_path):
    small = ("model=efficientnet_small", "model.image_size=64", "train.iterations=4", "data.normals=true")
    plan = cv_plan(compose(words(phantom_folder, tmp_path, *small, f"evaluate.external=[{far}]")))
    write_run(plan.first.run_dir, plan, ["bushpc", "cv"])
    cell_dir = plan.first.run_dir / "cells" / "fold0"
    assert run_cell(cell_dir, World()) is None
    rows = rows_of(cell_dir)
    assert len(rows) == 12
    assert all(math.isnan(float(row["dice"])) for row in rows.values())
    assert all(sum(float(row[f"prob_{label}"]) for label in LABELS) == pytest.approx(1) for row in rows.values())
    result = build_report(plan.first.run_dir)
    assert result.summary.arms[0].external["far"].images == 12
    page = result.html.read_text()
    assert 'id="maps"' in page  # the label's Grad-CAM
    assert 'id="calibration"' not in page


def test_scans_that_were_trained_on_or_made_up_are_no_test(phantom_folder, synthetic_folder, far, tmp_path):
    def plan(folder):
        return cv_plan(compose(words(phantom_folder, tmp_path, *UNET, f"evaluate.external=[{folder}]")))

    shutil.copytree(phantom_folder, tmp_path / "copy")
    for same in (phantom_folder, tmp_path / "copy"):
        with pytest.raises(DataError, match="would be tested on scans they have seen"):
            plan(same)
    with pytest.raises(DataError, match="results on them say nothing about patients"):
        plan(synthetic_folder)
    shutil.copytree(far, tmp_path / "classes")
    dataclasses.replace(Manifest.load(far), mask_classes=["disc", "cup"]).save(tmp_path / "classes")
    with pytest.raises(DataError, match="has the mask classes disc, cup, but phantom has lesion"):
        plan(tmp_path / "classes")


def test_a_dataset_is_named_once_and_wherever_it_lies(phantom_folder, far, tmp_path):
    def cell(*folders):
        return compose(words(phantom_folder, tmp_path, *UNET, f"evaluate.external=[{','.join(map(str, folders))}]"))

    shutil.copytree(far, tmp_path / "elsewhere" / "far")
    assert cell(far).hash == cell(tmp_path / "elsewhere" / "far").hash != cell().hash
    with pytest.raises(ConfigError, match="each name may occur once"):
        cell(far, tmp_path / "elsewhere" / "far")
    with pytest.raises(ConfigError, match="did you mean 'udiat'"):
        cell("udiatt")
