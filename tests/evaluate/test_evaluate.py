"""Promises of evaluation: every number in per_image.csv follows from the pictures and masks that lie beside it."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import BinaryCalibrationError
from torchmetrics.functional.classification import (
    binary_f1_score,
    binary_jaccard_index,
    binary_recall,
    binary_specificity,
    binary_stat_scores,
)

from bushpc.cell import run_cell
from bushpc.conditions import VARIANTS
from bushpc.conditions.sentences import FirstPass, SizeBins, attribute_prompt, largest_component, spatial_prompt
from bushpc.config import CellConfig, compose
from bushpc.data.square import resize
from bushpc.dist import World
from bushpc.models.xbusnet import XBusNet
from bushpc.shards.manifest import Manifest, read_image, read_mask

FOLD, SIZE, STEPS = 1, 64, 24
SOURCES = ("first_pass", "oracle", "none")
# Maps are saved as round(255 p), so both thresholds fall between two grey values: p >= 0.5 is 127.5 and more, saved as
# 128 and more (halves go to even), and p >= 0.3 is 76.5 and more, saved as 77 and more, p = 0.3 itself excepted.
LESION, PROPOSAL = 128, 77


@pytest.fixture(scope="module")
def cell_dir(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Path:
    """One cell, trained and evaluated once for all tests; two batches per prompt source."""
    run_dir = tmp_path_factory.mktemp("evaluate")
    config = compose(
        [
            *("model=xbusnet_small", "data=phantom", "cluster=local", f"model.image_size={SIZE}", "train.lr=3e-3"),
            *(f"train.iterations={STEPS}", f"train.validate_every={STEPS}", "evaluate.batch_size=3"),
            *(f"data.root={phantom_folder}", f"runs_dir={run_dir}", f"loader.cache_dir={run_dir / 'cache'}"),
        ]
    )
    cell_dir = run_dir / "cells" / f"fold{FOLD}"
    cell_dir.mkdir(parents=True)
    (cell_dir / "config.yaml").write_text(dataclasses.replace(config, fold=FOLD, name="evaluate").to_yaml())
    shutil.copy(phantom_folder / "folds.csv", run_dir / "folds.csv")
    assert run_cell(cell_dir, World()) is None
    return cell_dir


@pytest.fixture(scope="module")
def rows(cell_dir: Path) -> list[dict[str, str]]:
    return read_rows(cell_dir / "per_image.csv")


@pytest.fixture(scope="module")
def manifest(phantom_folder: Path) -> Manifest:
    return Manifest.load(phantom_folder)


@pytest.fixture(scope="module")
def masks(phantom_folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Key → mask at the network's resolution, from the shards."""
    return {
        record.key: resize(read_image(phantom_folder, record), read_mask(phantom_folder, record), SIZE)[1]
        for record in manifest.lesions
    }


@pytest.fixture(scope="module")
def bins(phantom_folder: Path, manifest: Manifest) -> SizeBins:
    """The training part's terciles of lesion size, from its masks."""
    held_out = fold_of(phantom_folder)
    training = [record for record in manifest.lesions if held_out[record.key] != FOLD]
    sizes = [read_mask(phantom_folder, record).mean() ** 0.5 for record in training]
    low, high = np.quantile(sizes, [0.3333, 0.6667])
    return SizeBins(low=float(low), high=float(high))


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fold_of(folder: Path) -> dict[str, int]:
    """Key of a lesion → the fold whose validation part holds it."""
    return {row["key"]: int(row["fold"]) for row in read_rows(folder / "folds.csv") if row["label"] != "normal"}


def saved_map(cell_dir: Path, source: str, key: str) -> np.ndarray:
    return np.asarray(Image.open(cell_dir / "predictions" / source / f"{key}.png"))


def test_every_validation_image_is_scored_once_per_prompt_source_and_no_training_image(cell_dir, rows, phantom_folder):
    held_out = fold_of(phantom_folder)
    validation = sorted(key for key, fold in held_out.items() if fold == FOLD)
    assert 3 < len(validation) < len(held_out)
    for source in SOURCES:
        assert [row["key"] for row in rows if row["prompts"] == source] == validation
        assert sorted(path.name for path in (cell_dir / "predictions" / source).iterdir()) == [
            f"{key}.png" for key in validation
        ]
    assert len(rows) == len(SOURCES) * len(validation)
    assert {row["fold"] for row in rows} == {str(FOLD)}


def test_counts_and_metrics_are_those_of_the_saved_maps_against_the_packed_masks(cell_dir, rows, masks):
    for row in rows:
        predicted = torch.from_numpy((saved_map(cell_dir, row["prompts"], row["key"]) >= LESION).astype(int))
        actual = torch.from_numpy(masks[row["key"]].astype(int))
        tp, fp, tn, fn, _ = binary_stat_scores(predicted, actual).tolist()
        assert [int(row[name]) for name in ("tp", "fp", "fn", "tn")] == [tp, fp, fn, tn]
        assert tp + fp + fn + tn == SIZE * SIZE
        assert float(row["dice"]) == pytest.approx(float(binary_f1_score(predicted, actual)), abs=1e-6)
        assert float(row["iou"]) == pytest.approx(float(binary_jaccard_index(predicted, actual)), abs=1e-6)
        assert float(row["fpr"]) == pytest.approx(1 - float(binary_specificity(predicted, actual)), abs=1e-6)
        assert float(row["fnr"]) == pytest.approx(1 - float(binary_recall(predicted, actual)), abs=1e-6)
    assert all(sum(int(row[name]) for row in rows) for name in ("tp", "fp", "fn", "tn")), "the case is degenerate"


def test_calibration_counts_every_pixel_so_that_the_error_is_torchmetrics(cell_dir, unevaluated, monkeypatch):
    """Of the probabilities themselves, which only the model knows: the saved maps are rounded."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {source: [] for source in SOURCES}
    predict = XBusNet.predict

    def listens(model, batch):
        prediction = predict(model, batch)
        if not torch.is_inference_mode_enabled():  # for Grad-CAM
            return prediction
        given = batch.conditions["spatial_prompts"]
        source = "first_pass" if callable(given[0]) else "oracle" if any(given) else "none"
        seen[source].append((prediction.prob_BKHW.flatten(), batch.mask_BKHW.flatten().int()))
        return prediction

    monkeypatch.setattr(XBusNet, "predict", listens)
    run_cell(unevaluated, World())
    assert (unevaluated / "calibration.csv").read_bytes() == (cell_dir / "calibration.csv").read_bytes()
    rows = read_rows(cell_dir / "calibration.csv")
    for source in SOURCES:
        probs, masks = (torch.cat(parts) for parts in zip(*seen[source], strict=True))
        bins = [row for row in rows if row["prompts"] == source]
        assert [int(row["bin"]) for row in bins] == list(range(15))
        inside = [(float(row["low"]) <= probs) & (probs < float(row["high"])) for row in bins]
        assert [int(row["pixels"]) for row in bins] == [int(these.sum()) for these in inside]
        gaps = [abs(float(row["prob_sum"]) - int(row["lesion_pixels"])) for row in bins]
        error = BinaryCalibrationError(n_bins=15, norm="l1")(probs, masks)
        assert sum(gaps) / len(probs) == pytest.approx(float(error), rel=1e-4)
        assert sum(int(row["lesion_pixels"]) for row in bins) == int(masks.sum()) > 0


def test_a_finished_cell_has_its_grad_cam_maps(cell_dir):
    cell = CellConfig.load(cell_dir / "config.yaml")
    maps = [np.asarray(Image.open(path)) for path in (cell_dir / "explain").iterdir()]
    assert len(maps) == cell.evaluate.explain
    assert {(picture.shape, picture.max()) for picture in maps} == {((SIZE, SIZE), 255)}


def test_facts_about_a_lesion_come_from_the_manifest(rows, manifest, phantom_folder):
    for row in rows:
        record = manifest.record(row["key"])
        ys, xs = np.nonzero(read_mask(phantom_folder, record))
        assert int(row["length_px"]) == record.lesion_length == max(np.ptp(ys), np.ptp(xs)) + 1
        assert (row["patient"], row["label"]) == (record.patient, record.label)
        assert row["attribute_prompt"] == attribute_prompt(record.attributes) != ""
    assert len({row["attribute_prompt"] for row in rows}) > 1


def test_the_oracle_reads_its_prompt_from_the_mask(rows, masks, bins):
    of_oracle = {row["key"]: row["spatial_prompt"] for row in rows if row["prompts"] == "oracle"}
    assert of_oracle == {key: spatial_prompt(masks[key] > 0, bins) for key in of_oracle}
    assert len(set(of_oracle.values())) > 1


def test_the_first_pass_reads_its_prompt_from_the_map_that_the_model_makes_without_one(cell_dir, rows, bins):
    of_first_pass = {row["key"]: row["spatial_prompt"] for row in rows if row["prompts"] == "first_pass"}
    proposals = {key: largest_component(saved_map(cell_dir, "none", key) >= PROPOSAL) for key in of_first_pass}
    assert of_first_pass == {key: spatial_prompt(proposal, bins) for key, proposal in proposals.items()}
    assert any(of_first_pass.values())


def test_none_gives_no_prompt(rows):
    assert {row["spatial_prompt"] for row in rows if row["prompts"] == "none"} == {""}


def test_the_sources_are_told_apart_by_what_the_model_makes_of_them(cell_dir, rows):
    """Otherwise the comparison of first_pass, oracle and none would be three copies of one number."""
    for source in ("first_pass", "oracle"):
        prompted = [row["key"] for row in rows if row["prompts"] == source and row["spatial_prompt"]]
        assert any((saved_map(cell_dir, source, key) != saved_map(cell_dir, "none", key)).any() for key in prompted), (
            source
        )


def test_validation_during_training_gives_the_means_of_the_headline_source(cell_dir, rows):
    lines = [json.loads(line) for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    (last,) = (line for line in lines if line["kind"] == "validation")
    assert last["step"] == STEPS
    headline = [row for row in rows if row["prompts"] == CellConfig.load(cell_dir / "config.yaml").prompts]
    for name in ("dice", "iou", "fpr", "fnr"):
        assert last[name] == pytest.approx(sum(float(row[name]) for row in headline) / len(headline), rel=1e-9)


@pytest.fixture
def unevaluated(cell_dir: Path, tmp_path: Path) -> Path:
    """The trained cell as it was before its evaluation."""
    shutil.copytree(cell_dir.parent.parent, tmp_path / "run")
    copy = tmp_path / "run" / "cells" / cell_dir.name
    for name in ("DONE", "per_image.csv"):
        (copy / name).unlink()
    shutil.rmtree(copy / "predictions")
    return copy


def test_only_the_oracle_hands_the_model_a_sentence_and_only_the_first_pass_a_way_to_one(
    unevaluated, monkeypatch, rows
):
    handed = []
    predict = XBusNet.predict

    def listens(model, batch):
        handed.append(batch.conditions["spatial_prompts"])
        return predict(model, batch)

    monkeypatch.setattr(XBusNet, "predict", listens)
    run_cell(unevaluated, World())
    first_pass, oracle, none = handed[:2], handed[2:4], handed[4:6]
    prompts = [row["spatial_prompt"] for row in rows if row["prompts"] == "oracle"]
    assert oracle == [prompts[:3], prompts[3:]]
    assert none == [[""] * 3, [""] * len(prompts[3:])]
    assert [len(given) for given in first_pass] == [3, len(prompts[3:])]
    assert all(isinstance(value, FirstPass) for given in first_pass for value in given)


def test_the_file_is_there_only_when_the_evaluation_is_whole_and_then_it_is_the_same(
    cell_dir, unevaluated, monkeypatch, capsys
):
    batches = []
    predict = XBusNet.predict

    def dies_in_the_second_source(model, batch):
        batches.append(batch.keys)
        if len(batches) == 3:
            raise MemoryError("as a GPU that is full")
        return predict(model, batch)

    monkeypatch.setattr(XBusNet, "predict", dies_in_the_second_source)
    with pytest.raises(MemoryError, match="as a GPU"):
        run_cell(unevaluated, World())
    monkeypatch.undo()
    assert (unevaluated / "predictions" / "first_pass").is_dir()
    assert not (unevaluated / "per_image.csv").exists()
    assert not (unevaluated / "DONE").exists()

    capsys.readouterr()
    run_cell(unevaluated, World())
    assert (unevaluated / "per_image.csv").read_bytes() == (cell_dir / "per_image.csv").read_bytes()
    assert f"images with prompts={VARIANTS['oracle'].label}: Dice" in capsys.readouterr().out
