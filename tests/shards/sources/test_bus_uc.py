"""Promises of BUS-UC: class folders give the labels, and what the archive holds twice is read once."""

from __future__ import annotations

import numpy as np
import pytest

from bushpc.errors import DataError
from bushpc.shards.manifest import read_image, read_mask


@pytest.fixture
def bus_uc(raw_of):
    raw = raw_of("bus_uc")
    raw.images = {}
    for label, names in (("Benign", ("0001", "0002")), ("Malignant", ("0319",))):
        for name in names:
            raw.images[f"{label.lower()}_{name}"] = raw.image(f"{label}/images/{name}.png", "RGB")
            raw.mask(f"{label}/masks/{name}.png")
            raw.image(f"All/images/{name}.png")  # the archive's second copy
            raw.mask(f"All/masks/{name}.png")
    return raw


def test_every_class_folder_is_read_and_the_copy_of_all_is_not(bus_uc, labels_of):
    manifest = bus_uc.pack({"benign": 2, "malignant": 1})
    assert labels_of(manifest) == {"benign": 2, "malignant": 1}
    for record in manifest.records:
        assert np.array_equal(read_image(bus_uc.shards, record), bus_uc.images[record.key])
        assert read_mask(bus_uc.shards, record).sum() == 77
        assert record.patient == record.key
    assert len(manifest.sources) == 6


@pytest.mark.parametrize("size", [(31, 20), (29, 21)])
def test_a_mask_of_one_pixel_more_or_less_is_fitted_at_the_right_and_bottom(bus_uc, size):
    bus_uc.mask("Malignant/masks/0319.png", size=size)
    manifest = bus_uc.pack({"benign": 2, "malignant": 1})
    mask_HW = read_mask(bus_uc.shards, manifest.record("malignant_0319"))
    assert mask_HW.shape == (20, 30)
    assert np.argwhere(mask_HW).min(axis=0).tolist() == [5, 8]
    assert mask_HW.sum() == 77


def test_a_doubled_class_folder_is_read_and_missing_masks_are_said_to_be_missing(bus_uc):
    (bus_uc.folder / "Benign").rename(bus_uc.folder / "inner")
    (bus_uc.folder / "Benign").mkdir()
    (bus_uc.folder / "inner").rename(bus_uc.folder / "Benign/Benign")
    assert len(bus_uc.pack({}, excerpt=True).records) == 3
    for path in (bus_uc.folder / "Benign/Benign/masks").iterdir():
        path.unlink()
    (bus_uc.folder / "Benign/Benign/masks").rmdir()
    with pytest.raises(DataError, match=r"(?s)images/0001\.png has no mask.*0002\.png has no mask$"):
        bus_uc.pack({}, excerpt=True)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda raw: (raw.folder / "Benign/masks/0002.png").unlink(), r"Benign/images/0002\.png has no mask"),
        (lambda raw: (raw.folder / "Benign/images/0002.png").unlink(), r"masks/0002\.png is the mask of no image"),
        (lambda raw: (raw.folder / "Malignant").rename(raw.folder / "malign"), r"(?s)malign/ holds.*Malignant/ is"),
        (lambda raw: raw.image("Benign/0003.png"), r"Benign/0003\.png: names must be like images/001\.png"),
        (lambda raw: raw.image("Benign/images/1.png"), r"images/0001\.png and Benign/images/1\.png have one name"),
        (lambda raw: raw.mask("Benign/masks/0001.png", size=(32, 20)), r"30x20 pixels, its mask .*0001\.png has 32x20"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_packed(bus_uc, harm, message):
    harm(bus_uc)
    with pytest.raises(DataError, match=message):
        bus_uc.pack({"benign": 2, "malignant": 1})
    assert bus_uc.packed_nothing()


def test_the_cards_counts_are_the_publishers(card_of):
    card = card_of("bus_uc")
    assert card.counts == {"benign": 358, "malignant": 453}
    assert not card.verified
