"""Promises of BUS-CoT: records give labels, patients and origin; masks are united; nothing is left out unsaid."""

from __future__ import annotations

import json
import shutil

import pytest

from bushpc.errors import DataError
from bushpc.shards.manifest import read_mask

RECORDS = "DatasetFiles/BUS-Expert_dataset.json"


def record(name: str, pathology: str, patient: int, **more):
    return {
        "patient_id": patient,
        "dataset": "BUS-BRA",
        "image_file": {"raw_image": f"{name}/{name}@raw.png", "cropped_image": f"{name}/{name}@cropped.png"},
        "pathology_histology": {"pathology": pathology, "subtype": {}},
        "us_report": {"0": {"BIRADS": "4A", "LesionEdge": "Regular"}},
        **more,
    }


@pytest.fixture
def bus_cot(raw_of):
    raw = raw_of("bus_cot")
    raw.records = {
        "000000": record("000000", "Benign", 7),
        "000001": record("000001", "Malignant", 7),
        "000002": record("000002", "Uncertain malignant potential", 8, us_report={}),
    }
    for name in raw.records:
        for kind in ("raw", "cropped"):
            raw.image(f"BUS-Expert/{name}/{name}@{kind}.png", "RGB")
        raw.mask(f"BUS-Expert/{name}/{name}@mask0.png")
    raw.mask("BUS-Expert/000001/000001@mask1.png", box=(slice(0, 3), slice(0, 4)))
    raw.save = lambda: (raw.folder / RECORDS).write_text(json.dumps(raw.records))
    (raw.folder / "DatasetFiles").mkdir()
    raw.save()
    return raw


COUNTS = {"benign": 1, "malignant": 1, "unlabelled": 1}


def test_records_give_label_patient_and_origin_and_masks_are_united(bus_cot):
    manifest = bus_cot.pack(COUNTS)
    rows = [(record.key, record.label, record.patient) for record in manifest.records]
    assert rows == [
        ("bus_cot_000000", "benign", "bus_cot_7"),
        ("bus_cot_000001", "malignant", "bus_cot_7"),
        ("bus_cot_000002", "unlabelled", "bus_cot_8"),
    ]
    assert [read_mask(bus_cot.shards, record).sum() for record in manifest.records] == [77, 77 + 12, 77]
    assert [record.attributes for record in manifest.records] == [
        {"origin": "BUS-BRA", "birads": "4A", "pathology": "Benign"},
        {"origin": "BUS-BRA", "birads": "4A", "pathology": "Malignant"},
        {"origin": "BUS-BRA", "birads": None, "pathology": "Uncertain malignant potential"},
    ]


def changed(**more):
    def harm(raw):
        raw.records["000002"] |= more
        raw.save()

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda raw: (raw.folder / "BUS-Expert/000001/000001@raw.png").unlink(), "000001@raw.png is missing"),
        (lambda raw: (raw.folder / "BUS-Expert/000002/000002@mask0.png").unlink(), "000002@raw.png has no mask"),
        (lambda raw: raw.image("BUS-Expert/000003/000003@raw.png"), "000003@raw.png has no record in"),
        (changed(patient_id=None), "record 000002: it has no patient_id"),
        (lambda raw: (raw.folder / RECORDS).write_text("[1"), "cannot be read as JSON"),
        (lambda raw: (raw.folder / RECORDS).write_text("[1]"), "must hold an object with one record for each image"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_packed(bus_cot, harm, message):
    harm(bus_cot)
    with pytest.raises(DataError, match=message):
        bus_cot.pack(COUNTS)
    assert bus_cot.packed_nothing()


def test_an_excerpt_leaves_images_without_masks_out(bus_cot):
    (bus_cot.folder / "BUS-Expert/000002/000002@mask0.png").unlink()
    manifest = bus_cot.pack({}, excerpt=True)
    assert [record.key for record in manifest.records] == ["bus_cot_000000", "bus_cot_000001"]


def test_one_image_is_an_excerpt_too(bus_cot):
    for name in ("000001", "000002"):
        shutil.rmtree(bus_cot.folder / "BUS-Expert" / name)
    assert [record.key for record in bus_cot.pack({}, excerpt=True).records] == ["bus_cot_000000"]


def test_the_cards_counts_are_the_publications(card_of):
    card = card_of("bus_cot")
    assert sum(card.counts.values()) == card.files["BUS-Expert/*/*@raw.png"] == 11439
    assert not card.verified
