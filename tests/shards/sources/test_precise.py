"""Promises of the union: every part's samples as its own source reads them, under names that tell the parts apart."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import openpyxl
import pytest

from bushpc.errors import DataError
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.manifest import read_image
from bushpc.shards.split import make_folds

IMAGES = "BrEaST-Lesions_USG-images_and_masks"


@pytest.fixture
def precise(raw_of, card_of):
    """One BrEaST case, two BUS-BRA scans of one patient, a benign and a normal scan of BUSI."""
    raw = raw_of("precise")
    raw.images = {
        "breast-case001": raw.image(f"breast/{IMAGES}/case001.png", "RGB"),
        "bus_bra-bus_0001-l": raw.image("bus_bra/Images/bus_0001-l.png"),
        "bus_bra-bus_0001-r": raw.image("bus_bra/Images/bus_0001-r.png"),
        "busi-benign_0001": raw.image("busi/benign/benign (1).png"),
        "busi-normal_0001": raw.image("busi/normal/normal (1).png"),
    }
    raw.mask(f"breast/{IMAGES}/case001_tumor.png", "RGBA")
    raw.mask("bus_bra/Masks/mask_0001-l.png", "1")
    raw.mask("bus_bra/Masks/mask_0001-r.png", "1")
    raw.mask("busi/benign/benign (1)_mask.png")
    raw.mask("busi/normal/normal (1)_mask.png", box=None)
    (raw.folder / "busi/malignant").mkdir()
    card = card_of("breast")
    facts = {"Image_filename": "case001.png", "Mask_tumor_filename": "case001_tumor.png", "Pixel_size": 0.0075}
    facts |= {"Classification": "malignant", "BIRADS": 5}
    book = openpyxl.Workbook()
    book.active.append(card.columns)
    book.active.append([facts.get(column) for column in card.columns])
    book.save(raw.folder / "breast" / card.layout["spreadsheet"])
    header = "ID,Case,Histology,Pathology,BIRADS,Device,Side\n"
    rows = "bus_0001-l,1,fibroadenoma,benign,3,GE,left\nbus_0001-r,1,fibroadenoma,benign,3,GE,right\n"
    (raw.folder / "bus_bra/bus_data.csv").write_text(header + rows)
    (raw.folder / "bus_bra/5-fold-cv.csv").write_text("ID,kFold,valid_1\nbus_0001-l,1,NaN\nbus_0001-r,1,NaN\n")
    return raw


LABELS = {"benign": 3, "malignant": 1, "normal": 1}


def test_samples_are_their_own_sources_under_new_names(precise, labels_of):
    manifest = precise.pack(LABELS, workers=2)
    assert labels_of(manifest) == LABELS
    assert {record.key for record in manifest.records} == set(precise.images)
    for record in manifest.records:
        assert np.array_equal(read_image(precise.shards, record), precise.images[record.key])
        assert record.attributes["dataset"] == record.key.partition("-")[0]
        assert record.patient.startswith(f"{record.attributes['dataset']}-")
    assert manifest.record("bus_bra-bus_0001-l").patient == manifest.record("bus_bra-bus_0001-r").patient == "bus_bra-1"
    assert manifest.record("breast-case001").pixel_mm == pytest.approx(0.075)
    assert manifest.record("breast-case001").attributes["birads"] == "5"
    assert f"breast/{IMAGES}/case001.png" in manifest.sources


def test_no_patient_straddles_the_80_20_split(precise):
    folds = make_folds(precise.pack(LABELS).records, k=3)
    assert folds["bus_bra-bus_0001-l"] == folds["bus_bra-bus_0001-r"]
    assert Counter(folds.values()).keys() == {0, 1, 2}


def test_a_part_that_is_missing_is_named_unless_it_is_an_excerpt(precise):
    shutil.rmtree(precise.folder / "busi")
    with pytest.raises(DataError, match=r"the folder busi/ is missing: what data=busi takes as src"):
        precise.pack(LABELS)
    assert precise.packed_nothing()
    manifest = precise.pack({}, excerpt=True)
    assert {record.attributes["dataset"] for record in manifest.records} == {"breast", "bus_bra"}


def test_a_fault_of_a_part_is_its_sources_own_words(precise):
    (precise.folder / "busi/benign/benign (1)_mask.png").unlink()
    with pytest.raises(DataError, match=r"raw/busi:\n  benign/benign \(1\)\.png has no mask"):
        precise.pack(LABELS)


def test_the_cards_counts_are_the_sums_of_its_parts(card_of):
    total: Counter[str] = Counter()
    for part in card_of("precise").layout:
        total.update(Card.load(PROJECT_SHARDS / part).counts)
    assert card_of("precise").counts == dict(total)
