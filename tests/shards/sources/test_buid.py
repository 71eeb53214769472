"""Promises of BUID: BMP images and TIFF masks, spaces in names; pictures of the outlined lesion are no scans."""

from __future__ import annotations

import numpy as np
import pytest

from bushpc.errors import DataError
from bushpc.shards.manifest import read_image, read_mask


@pytest.fixture
def buid(raw_of):
    raw = raw_of("buid")
    raw.images = {}
    for label, number in (("Benign", 1), ("Benign", 10), ("Malignant", 1)):
        name = f"{label}/{number} {label}"
        raw.images[f"{label.lower()}_{number:04d}"] = raw.image(f"{name} Image.bmp", "RGB")
        raw.mask(f"{name} Mask.tif", "1" if number == 10 else "L")
        raw.image(f"{name} Lesion.bmp", "RGB")
    return raw


def test_images_and_masks_of_one_number_and_class_belong_together(buid, labels_of):
    manifest = buid.pack({"benign": 2, "malignant": 1})
    assert labels_of(manifest) == {"benign": 2, "malignant": 1}
    for record in manifest.records:
        assert np.array_equal(read_image(buid.shards, record), buid.images[record.key])
        assert read_mask(buid.shards, record).sum() == 77
    assert len(manifest.sources) == 6


def test_a_missing_class_or_mask_is_named_and_an_excerpt_may_lack_a_class(buid):
    (buid.folder / "Benign/10 Benign Mask.tif").unlink()
    with pytest.raises(DataError, match=r"Benign/10 Benign Image\.bmp has no mask"):
        buid.pack({"benign": 2, "malignant": 1})
    assert buid.packed_nothing()
    for path in (buid.folder / "Benign").iterdir():
        path.unlink()
    (buid.folder / "Benign").rmdir()
    with pytest.raises(DataError, match="class folder Benign/ is missing"):
        buid.pack({"malignant": 1})
    assert [record.key for record in buid.pack({}, excerpt=True).records] == ["malignant_0001"]


def test_a_picture_of_the_other_class_is_named(buid):
    buid.image("Benign/3 Malignant Image.bmp")
    with pytest.raises(DataError, match=r"3 Malignant Image\.bmp: names must be like '1 benign Image\.bmp'"):
        buid.pack({"benign": 2, "malignant": 1})


def test_the_cards_counts_are_the_publishers(card_of):
    assert card_of("buid").counts == {"benign": 109, "malignant": 123}
    assert not card_of("buid").verified
