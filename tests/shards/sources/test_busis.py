"""Promises of BUSIS: numbers tell what belongs together, with or without zeros; the table may be missing."""

from __future__ import annotations

import pytest

from bushpc.errors import DataError
from bushpc.shards.manifest import read_mask

TABLE = "img name,Ground Truth Name,tumor type\ncase001,case001_GT,B\ncase002,case002_GT,M\ncase010,case010_GT,b\n,,\n"


@pytest.fixture
def busis(raw_of):
    raw = raw_of("busis")
    for number in (1, 2, 10):
        raw.image(f"Original/case{number}.bmp")
        raw.mask(f"GT/case{number}_GT.bmp")
    raw.image("preview.png")
    (raw.folder / "BUSIS562.csv").write_text(TABLE)
    return raw


def test_the_table_gives_the_labels(busis):
    manifest = busis.pack({"benign": 2, "malignant": 1})
    assert {record.key: record.label for record in manifest.records} == {
        "busis_001": "benign", "busis_002": "malignant", "busis_010": "benign",
    }  # fmt: skip
    assert [read_mask(busis.shards, record).sum() for record in manifest.records] == [77, 77, 77]
    assert "BUSIS562.csv" in manifest.sources


def test_without_the_table_the_scans_have_no_labels(busis, labels_of):
    (busis.folder / "BUSIS562.csv").unlink()
    assert labels_of(busis.pack({}, excerpt=True)) == {"unlabelled": 3}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.replace("case002,", "case003,"), r"(?s)case2\.bmp has no row in BUSIS562.*case 3, which has no"),
        (TABLE.replace(",M", ",X"), r"row 3: 'img name' is 'case002' and 'tumor type' is 'X'; allowed: .* B or M"),
        (TABLE.replace("img name", "image"), "lacks the column img name"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named_and_nothing_is_packed(busis, table, message):
    (busis.folder / "BUSIS562.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        busis.pack({"benign": 2, "malignant": 1})
    assert busis.packed_nothing()


def test_the_cards_counts_are_the_benchmarks(card_of):
    card = card_of("busis")
    assert card.counts == {"benign": 306, "malignant": 256}
    assert [layout.counts for layout in card.every_layout[1:]] == [{"unlabelled": 562}]
    assert not card.verified
