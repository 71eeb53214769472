"""Promises of UDIAT: the spreadsheet's numbers find their six-digit files, and bad rows are named."""

from __future__ import annotations

import openpyxl
import pytest

from bushpc.errors import DataError

ROWS = ((1, "Benign", "CYST"), ("000002", "Malignant", "IDC"), (10, "benign ", None))
LABELS = {"benign": 2, "malignant": 1}


def sheet(raw, rows, header=("Image", "Type", "Diagnosis")):
    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append(row)
    book.save(raw.folder / "DatasetB.xlsx")


@pytest.fixture
def udiat(raw_of):
    raw = raw_of("udiat")
    for number in ("000001", "000002", "000010"):
        raw.image(f"original/{number}.png")
        raw.mask(f"GT/{number}.png")
    sheet(raw, ROWS)
    return raw


def test_labels_and_diagnoses_come_from_the_spreadsheet(udiat, labels_of):
    manifest = udiat.pack(LABELS)
    assert labels_of(manifest) == LABELS
    assert {record.key: record.attributes["diagnosis"] for record in manifest.records} == {
        "000001": "cyst", "000002": "idc", "000010": None,
    }  # fmt: skip
    assert all(record.lesion_pixels == 77 and record.patient == record.key for record in manifest.records)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda raw: (raw.folder / "GT/000010.png").unlink(), r"row 4: GT/000010\.png is missing"),
        (lambda raw: raw.image("original/000011.png"), r"original/000011\.png has no row in DatasetB\.xlsx"),
        (lambda raw: sheet(raw, (*ROWS, ROWS[0])), r"row 5: image 000001 already has a row"),
        (lambda raw: sheet(raw, (*ROWS[:2], (10, "Unknown", ""))), r"row 4: Type is 'Unknown'; allowed: benign"),
        (lambda raw: sheet(raw, (*ROWS, ("ten", "Benign", ""))), r"row 5: Image is 'ten'; it must be an image number"),
        (lambda raw: sheet(raw, ROWS, ("Image", "Kind", "Diagnosis")), r"DatasetB\.xlsx lacks the column Type"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_packed(udiat, harm, message):
    harm(udiat)
    with pytest.raises(DataError, match=message):
        udiat.pack(LABELS)
    assert udiat.packed_nothing()


def test_the_cards_counts_are_those_of_the_publication(card_of):
    assert card_of("udiat").counts == {"benign": 110, "malignant": 53}
