"""Promises of exports: every mask, patient and fold comes back, read by the libraries that the formats belong to."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bushpc.cli import main
from bushpc.shards.manifest import Manifest, read_image, read_mask
from bushpc.shards.split import ensure_folds, read_fold_numbers
from bushpc.shards.write import pack


@pytest.fixture(scope="module")
def eyes(tmp_path_factory) -> Path:
    """Shards with two classes, of which one lies in the other: colour scans of six eyes, one without a cup."""
    raw, shards = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("eyes")
    for part in ("images", "mask"):
        (raw / "train" / part).mkdir(parents=True)
    y, x = np.mgrid[:30, :40]
    for number in range(6):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(raw / f"train/images/g{number:04d}.jpg")
        squared = (y - 12 - number) ** 2 + (x - 11) ** 2
        levels = np.where(squared < 16 * (number > 0), 0, np.where(squared < 64, 128, 255))
        Image.fromarray(levels.astype(np.uint8)).save(raw / f"train/mask/g{number:04d}.bmp")
    ensure_folds(shards, pack("refuge2", raw, shards, excerpt=True))
    return shards


@pytest.fixture(scope="module")
def exported(tmp_path_factory, phantom_folder, eyes):
    """exported("phantom" or "eyes", format) → (shards, what was written)."""
    shards = {"phantom": phantom_folder, "eyes": eyes}
    made: dict[tuple[str, str], Path] = {}

    def export(name: str, kind: str) -> tuple[Path, Path]:
        if (name, kind) not in made:
            made[name, kind] = out = tmp_path_factory.mktemp(name) / kind
            with contextlib.redirect_stdout(io.StringIO()):
                assert main(["shards", "export", f"data={shards[name]}", f"format={kind}", f"out={out}"]) == 0
        return shards[name], made[name, kind]

    return export


def raw_of(out: Path) -> Path:
    [raw] = (out / "raw").iterdir()
    return raw


# --- nnU-Net ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phantom", "eyes"])
def test_nnunets_own_integrity_check_passes(exported, name, monkeypatch, capsys):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    _, out = exported(name, "nnunet")
    verify_dataset_integrity(str(raw_of(out)), 1)
    said = capsys.readouterr().out
    assert "verify_dataset_integrity Done" in said
    assert "Error" not in said


@pytest.mark.parametrize("name", ["phantom", "eyes"])
def test_nnunet_reads_our_pixels_and_gets_our_masks_back_from_its_labels(exported, name):
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    shards, out = exported(name, "nnunet")
    manifest, raw, reader = Manifest.load(shards), raw_of(out), NaturalImage2DIO()
    described = json.loads((raw / "dataset.json").read_text())
    labels = LabelManager(described["labels"], described.get("regions_class_order"))
    assert labels.has_regions == (name == "eyes")
    for record in manifest.records:
        image, _ = reader.read_images([str(raw / "imagesTr" / f"{record.key}_0000.png")])
        assert len(image) == len(described["channel_names"])
        expected = read_image(shards, record).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.broadcast_to(image[:, 0], expected.shape), expected)
        values, _ = reader.read_seg(str(raw / "labelsTr" / f"{record.key}.png"))
        mask_HW = read_mask(shards, record)
        for k, class_ in enumerate(manifest.mask_classes):
            its = described["labels"][class_]
            np.testing.assert_array_equal(np.isin(values[0, 0], its), mask_HW >> k & 1)
        if labels.has_regions:  # a perfect prediction of the regions becomes the very label that was written
            regions = np.stack([np.isin(values[0], labels.all_regions[i]) for i in range(len(labels.all_regions))])
            np.testing.assert_array_equal(labels.convert_logits_to_segmentation(regions * 20.0 - 10), values[0])


def test_regions_that_a_card_lists_from_the_inside_are_painted_from_the_outside():
    """Three nested classes, the innermost first, as BraTS' card has them; bits 1, 2 and 4."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from bushpc.shards.exchange.to_nnunet import values_of

    values = values_of(["enhancing", "core", "whole"], {0: 100, 0b100: 30, 0b110: 20, 0b111: 10})
    assert list(values.labels) == ["whole", "core", "enhancing"]
    labels = LabelManager({"background": 0, **values.labels}, values.order["regions_class_order"])
    bits = np.array([[0, 0b100, 0b110, 0b111]])
    written = values.value_of[bits]
    regions = np.stack([np.isin(written, region) for region in labels.all_regions])
    np.testing.assert_array_equal(labels.convert_logits_to_segmentation(regions * 20.0 - 10), written)


def test_classes_that_never_overlap_are_plain_labels():
    from bushpc.shards.exchange.to_nnunet import values_of

    values = values_of(["cyst", "tumour"], {0: 100, 1: 5, 2: 5})
    assert (values.labels, values.order) == ({"cyst": 1, "tumour": 2}, {})
    assert values.value_of[[0, 1, 2]].tolist() == [0, 1, 2]


def test_splits_and_table_are_our_folds_and_patients(exported):
    shards, out = exported("phantom", "nnunet")
    folds = read_fold_numbers(shards / "folds.csv")
    raw = raw_of(out)
    splits = json.loads((out / "preprocessed" / raw.name / "splits_final.json").read_text())
    assert [set(split["val"]) for split in splits] == [{k for k, f in folds.items() if f == n} for n in range(5)]
    assert all(set(split["train"]) == folds.keys() - set(split["val"]) for split in splits)
    with (raw / "cases.csv").open() as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    for record in Manifest.load(shards).records:
        row = rows[record.key]
        assert (row["patient"], row["label"], row["fold"]) == (record.patient, record.label, str(folds[record.key]))
        assert {name: row[name] for name in record.attributes} == {
            name: "" if value is None else str(value) for name, value in record.attributes.items()
        }


# --- COCO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phantom", "eyes"])
def test_pycocotools_reads_every_mask_back(exported, name, capsys):
    from pycocotools.coco import COCO

    shards, out = exported(name, "coco")
    manifest, coco = Manifest.load(shards), COCO(out / "annotations.json")
    folds = read_fold_numbers(shards / "folds.csv")
    assert [each["name"] for each in coco.loadCats(coco.getCatIds())] == manifest.mask_classes
    assert len(coco.imgs) == len(manifest.records)
    for entry in coco.imgs.values():
        record = manifest.record(entry["key"])
        assert (entry["patient"], entry["label"], entry["fold"]) == (record.patient, record.label, folds[record.key])
        assert (entry["pixel_mm"], entry["attributes"]) == (record.pixel_mm, record.attributes)
        pixels = np.asarray(Image.open(out / "images" / entry["file_name"]).convert("RGB"))
        np.testing.assert_array_equal(pixels, read_image(shards, record))
        mask_HW = np.zeros((entry["height"], entry["width"]), np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(entry["id"])):
            part = coco.annToMask(annotation)
            assert annotation["area"] == part.sum()
            mask_HW |= part << annotation["category_id"] - 1
        np.testing.assert_array_equal(mask_HW, read_mask(shards, record))


def test_every_part_of_a_lesion_is_an_instance_and_an_empty_mask_has_none():
    from bushpc.shards.exchange.to_coco import instances

    mask_HW = np.zeros((6, 8), np.uint8)
    assert instances(mask_HW, 1, 1, 1) == []
    mask_HW[1, 1] = mask_HW[2, 2] = 1  # they touch at a corner
    mask_HW[4:6, 5:8] = 1
    found = instances(mask_HW, 1, 7, 3)
    assert [(each["id"], each["image_id"], each["area"]) for each in found] == [(3, 7, 2), (4, 7, 6)]
    assert [each["bbox"] for each in found] == [[1, 1, 2, 2], [5, 4, 3, 2]]


# --- what cannot be ---------------------------------------------------------------------------------------------


def test_a_folder_with_files_is_refused_and_an_empty_one_is_filled(phantom_folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("a year's work")
    words = ["shards", "export", f"data={phantom_folder}", "format=coco"]
    assert main([*words, f"out={tmp_path / 'mine'}"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    (tmp_path / "empty").mkdir()
    assert main([*words, f"out={tmp_path / 'empty'}"]) == 0
    assert (tmp_path / "empty" / "annotations.json").exists()


def test_a_damaged_dataset_leaves_nothing_behind(phantom_folder, tmp_path, capsys):
    shards = shutil.copytree(phantom_folder, tmp_path / "shards")
    tar = max(shards.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-20000])
    for kind in ("nnunet", "coco"):
        assert main(["shards", "export", f"data={shards}", f"format={kind}", f"out={tmp_path / 'out'}"]) == 2
        assert "is cut off" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_without_folds_the_scans_are_exported_and_folds_that_were_asked_for_are_missed(eyes, tmp_path, capsys):
    shards = shutil.copytree(eyes, tmp_path / "shards")
    (shards / "folds.csv").unlink()
    words = ["shards", "export", f"data={shards}", "format=nnunet"]
    assert main([*words, f"out={tmp_path / 'a'}", "folds=frozen"]) == 2
    assert not (tmp_path / "a").exists()
    assert main([*words, f"out={tmp_path / 'b'}"]) == 0
    assert "6 scans, no folds: " in capsys.readouterr().out
    assert not list((tmp_path / "b").rglob("splits_final.json"))
