"""Promises of BUSC: the part with masks is read, without labels; the part for classification is not."""

from __future__ import annotations

import pytest

from bushpc.errors import DataError
from bushpc.shards.manifest import read_mask


@pytest.fixture
def busc(raw_of):
    raw = raw_of("busc")
    for name in ("1", "2"):
        raw.image(f"Segmentation/images/{name}.png")
        raw.mask(f"Segmentation/masks/{name}.png")
        raw.image(f"Classification/benign/{name}.png")
    return raw


def test_scans_have_masks_and_no_labels(busc, labels_of):
    manifest = busc.pack({"unlabelled": 2})
    assert labels_of(manifest) == {"unlabelled": 2}
    assert [read_mask(busc.shards, record).sum() for record in manifest.records] == [77, 77]
    assert [record.key for record in manifest.records] == ["unlabelled_0001", "unlabelled_0002"]


def test_the_first_release_without_masks_is_rejected(raw_of):
    raw = raw_of("busc")
    raw.image("originals/benign/1.bmp")
    with pytest.raises(DataError, match=r"is not the folder of busc: it has no file Segmentation/images"):
        raw.pack({"unlabelled": 1})


def test_the_cards_counts_are_the_publishers(card_of):
    assert card_of("busc").counts == {"unlabelled": 250}
    assert not card_of("busc").verified
