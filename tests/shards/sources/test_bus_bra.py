"""Promises of BUS-BRA: the case is the patient, the publisher's folds stay its folds, and bad rows are named."""

from __future__ import annotations

import csv
import os
from collections import Counter

import numpy as np
import pytest

from bushpc.cli import main
from bushpc.errors import DataError
from bushpc.shards.manifest import Manifest, read_image, read_mask
from bushpc.shards.split import load_folds

ROWS = (  # ID, Case, Histology, Pathology, BIRADS, Device, Width, Height, Side, BBOX; the second height is wrong
    ("bus_0001-l", "1", "fibroadenoma", "benign", "3", "GE Logiq 7 @10-14MHz", "30", "20", "left", "[1,2,3,4]"),
    ("bus_0001-r", "1", "fibroadenoma", "benign", "3", "GE Logiq 7 @10-14MHz", "30", "22", "right", "[1,2,3,4]"),
    ("bus_0007-s", "7", "", "malignant", "5", "U-Systems @10-14MHz", "30", "20", "single", "[1,2,3,4]"),
)
FOLDS = (("bus_0001-l", "2", "0", "NaN"), ("bus_0001-r", "2", "1", "NaN"), ("bus_0007-s", "1", "NaN", "1"))
LABELS = {"benign": 2, "malignant": 1}
HEADER = ("ID", "Case", "Histology", "Pathology", "BIRADS", "Device", "Width", "Height", "Side", "BBOX")


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def tables(raw, rows=ROWS, folds=FOLDS):
    write(raw.folder / "bus_data.csv", HEADER, rows)
    write(raw.folder / "5-fold-cv.csv", ("ID", "kFold", "valid_1", "valid_2"), folds)


@pytest.fixture
def bus_bra(raw_of):
    raw = raw_of("bus_bra")
    raw.images = {row[0]: raw.image(f"Images/{row[0]}.png") for row in ROWS}
    for row in ROWS:
        raw.mask(f"Masks/mask_{row[0][4:]}.png", mode="1")
    tables(raw)
    return raw


def test_samples_have_their_mask_patient_and_facts(bus_bra, labels_of):
    manifest = bus_bra.pack(LABELS)
    assert labels_of(manifest) == LABELS
    record = manifest.record("bus_0001-r")
    assert (record.patient, record.height, record.lesion_pixels) == ("1", 20, 77)
    assert record.attributes == {
        "birads": "3", "histology": "fibroadenoma", "device": "GE Logiq 7 @10-14MHz", "side": "right",
    }  # fmt: skip
    assert manifest.record("bus_0007-s").attributes["histology"] is None
    assert np.array_equal(read_image(bus_bra.shards, record), bus_bra.images["bus_0001-r"])


def test_the_published_folds_lie_beside_the_shards_and_come_back_when_deleted(bus_bra):
    manifest = bus_bra.pack(LABELS)
    path = bus_bra.shards / "folds_published.csv"
    assert load_folds(path, manifest.records).fold_by_key == {"bus_0001-l": 1, "bus_0001-r": 1, "bus_0007-s": 0}
    path.unlink()
    bus_bra.pack(LABELS)
    assert path.exists()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda raw: (raw.folder / "Masks/mask_0001-r.png").unlink(), r"row 3: Masks/mask_0001-r\.png is missing"),
        (lambda raw: (raw.folder / "Images/bus_0007-s.png").unlink(), r"row 4: Images/bus_0007-s\.png is missing"),
        (lambda raw: raw.image("Images/bus_0009-l.png"), r"Images/bus_0009-l\.png has no row in bus_data\.csv"),
        (lambda raw: tables(raw, (*ROWS, ROWS[0])), r"row 5: bus_0001-l is already in row 2"),
        (lambda raw: tables(raw, (*ROWS[:2], (*ROWS[2][:3], "normal", *ROWS[2][4:]))),
         r"row 4: Pathology is 'normal'; allowed: benign, malignant"),
        (lambda raw: tables(raw, folds=FOLDS[:2]), r"5-fold-cv\.csv has no row for bus_0007-s"),
        (lambda raw: tables(raw, folds=(*FOLDS[:2], ("bus_0007-s", "2", "NaN", "1"))),
         r"5-fold-cv\.csv, row 4: kFold is '2', but NaN is in valid_1"),
        (lambda raw: (raw.folder / "5-fold-cv.csv").unlink(), r"5-fold-cv\.csv does not exist"),
        (lambda raw: write(raw.folder / "bus_data.csv", HEADER[1:], []), r"bus_data\.csv lacks the column ID"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_packed(bus_bra, harm, message):
    harm(bus_bra)
    with pytest.raises(DataError, match=message):
        bus_bra.pack(LABELS)
    assert bus_bra.packed_nothing()


def test_a_mask_whose_image_an_excerpt_lacks_is_named(bus_bra):
    (bus_bra.folder / "Images/bus_0007-s.png").unlink()
    with pytest.raises(DataError, match=r"Masks/mask_0007-s\.png is the mask of no image$"):
        bus_bra.pack(LABELS, excerpt=True)
    (bus_bra.folder / "Masks/mask_0007-s.png").unlink()
    assert len(bus_bra.pack(LABELS, excerpt=True).records) == 2


def test_the_real_excerpt_packs_with_its_patients_facts_and_folds(real_data, tmp_path):
    raw = real_data / "busbra_excerpt" / "BUSBRA"
    workers = min(2, len(os.sched_getaffinity(0)))
    assert main(["pack", "data=bus_bra", f"src={raw}", f"out={tmp_path}", "excerpt=true", f"workers={workers}"]) == 0
    manifest = Manifest.load(tmp_path)
    with (raw / "bus_data.csv").open() as file:
        rows = {row["ID"]: row for row in csv.DictReader(file)}
    assert {record.key for record in manifest.records} == set(rows)
    assert Counter(record.label for record in manifest.records) == {"benign": 72, "malignant": 34}
    assert len({record.patient for record in manifest.records}) == 60
    for record in manifest.records:
        row = rows[record.key]
        assert (record.label, record.patient, record.attributes["birads"]) == (
            row["Pathology"], row["Case"], row["BIRADS"],
        )  # fmt: skip
        assert record.width == int(row["Width"])
        # The publisher's own bounding box [x, y, width, height] of the lesion, from 1: a reading apart from ours.
        ys, xs = np.nonzero(read_mask(tmp_path, record))
        box = [int(number) for number in row["BBOX"].strip("[]").split(",")]
        assert np.abs(np.subtract(box, (xs.min() + 1, ys.min() + 1, np.ptp(xs) + 1, np.ptp(ys) + 1))).max() <= 1

    published = load_folds(tmp_path / "folds_published.csv", manifest.records, excerpt=True)
    with (raw / "5-fold-cv.csv").open() as file:
        for row in csv.DictReader(file):
            assert row[f"valid_{published.fold_by_key[row['ID']] + 1}"] == "NaN"
    frozen = load_folds(tmp_path / "folds.csv", manifest.records, excerpt=True)
    assert published.count == frozen.count == 5
