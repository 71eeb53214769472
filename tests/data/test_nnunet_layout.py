"""Promises of the export to nnU-Net: our folds, our pixels, nothing of the validation part in training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bushpc.config import CellConfig
from bushpc.data.cache import DecodingStopped, open_cache
from bushpc.data.loader import FoldData
from bushpc.data.nnunet_layout import export, list_scans, real_training_part
from bushpc.data.square import resize
from bushpc.shards.manifest import read_image, read_mask


@pytest.fixture
def exported(make_cell, tmp_path):
    """exported("override", …, fold=0, name="run") → (data, raw dataset folder, the split that nnU-Net will read)."""

    def make(*overrides: str, fold: int = 0, name: str = "run") -> tuple[FoldData, Path, dict[str, list[str]]]:
        cell_dir = make_cell(f"{name}{fold}", "model=unet_small", "model.image_size=32", *overrides, fold=fold)
        cell = CellConfig.load(cell_dir / "config.yaml")
        data = FoldData.open(cell, fold, cell_dir.parent.parent / "folds.csv")
        cache = open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader)
        raw = export(data, real_training_part(data, normals=False), cache, tmp_path / f"nnunet_{name}{fold}")
        [split] = json.loads((tmp_path / f"nnunet_{name}{fold}/preprocessed/{raw.name}/splits_final.json").read_text())
        return data, raw, split

    return make


def test_every_fold_is_ours_and_no_validation_patient_trains(exported, phantom_folder):
    with (phantom_folder / "folds.csv").open() as file:
        lesions = [row for row in csv.DictReader(file) if row["label"] != "normal"]
    patients = {row["key"]: row["patient"] for row in lesions}
    for fold in (0, 3):
        _, _, split = exported(fold=fold)
        assert set(split["val"]) == {row["key"] for row in lesions if row["fold"] == str(fold)}
        assert set(split["train"]) == {row["key"] for row in lesions if row["fold"] != str(fold)}
        assert not {patients[key] for key in split["val"]} & {patients[key] for key in split["train"]}


def test_nnunet_gets_the_pixels_that_every_model_gets(exported):
    data, raw, split = exported()
    list_scans(raw, data, [*data.train, *data.validation])
    described = json.loads((raw / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "lesion": 1}
    assert (
        described["numTraining"] == len(split["train"]) + len(split["val"]) == len(list((raw / "imagesTr").iterdir()))
    )
    for record in (data.train[0], data.validation[0]):
        image, mask = resize(read_image(data.folder, record), read_mask(data.folder, record), 32)
        np.testing.assert_array_equal(Image.open(raw / "imagesTr" / f"{record.key}_0000.png"), image)
        np.testing.assert_array_equal(Image.open(raw / "labelsTr" / f"{record.key}.png"), mask)


def test_synthetic_scans_train_and_are_never_validated_on(exported, synthetic_folder):
    _, real, before = exported()
    _, mixed, split = exported(f"data.synthetic={synthetic_folder}", "data.synthetic_ratio=0.5", fold=1)
    assert len([case for case in split["train"] if case.startswith("synthetic__")]) == round(
        0.5 * len([case for case in split["train"] if not case.startswith("synthetic__")])
    )
    assert not any(case.startswith("synthetic__") for case in split["val"])
    assert not any(case.startswith("synthetic__") for case in before["train"])
    names = {path.name.removesuffix("_0000.png") for path in (mixed / "imagesTr").iterdir()}
    assert names == {path.stem for path in (mixed / "labelsTr").iterdir()} == {*split["train"], *split["val"]}
    assert real.name == mixed.name


def test_nnunet_plans_from_the_folds_real_training_scans_alone(exported, synthetic_folder):
    _, _, split = exported()
    mixed = (f"data.synthetic={synthetic_folder}", "data.synthetic_ratio=1")
    for name, words in (("real", ()), ("mixed", mixed), ("alone", (*mixed, "data.real=false"))):
        _, raw, _ = exported(*words, name=name)
        described = json.loads((raw / "dataset.json").read_text())
        assert described["dataset"].keys() == set(split["train"])
        assert described["numTraining"] == len(split["train"])
        assert all((raw / scan["images"][0]).exists() for scan in described["dataset"].values())


def test_a_stop_ends_the_export_between_two_scans(exported, tmp_path):
    data, _, _ = exported()
    cell = CellConfig.load(next(tmp_path.glob("*/cells/fold0/config.yaml")))
    cache = open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader)
    answers = iter([True, True, True, False])
    with pytest.raises(DecodingStopped):
        export(data, data.train, cache, tmp_path / "stopped", lambda: next(answers))
    assert len(list((tmp_path / "stopped").glob("raw/*/labelsTr/*"))) == 3
