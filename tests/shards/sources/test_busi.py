"""Promises of BUSI: masks of every mode and number become one, and a file without its counterpart is named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bushpc.errors import DataError
from bushpc.shards.manifest import read_image, read_mask

LABELS = {"benign": 3, "malignant": 1, "normal": 1}


@pytest.fixture
def busi(raw_of):
    """Modes and numbers of masks as in the real folder: 1-bit, grey, RGB, RGBA; two and three masks an image."""
    raw = raw_of("busi")
    modes = {"benign (1)": "RGB", "benign (2)": "L", "benign (10)": "RGBA", "malignant (1)": "L", "normal (1)": "L"}
    raw.images = {name: raw.image(f"{name.split()[0]}/{name}.png", mode) for name, mode in modes.items()}
    for name, mode in (("benign (1)", "1"), ("benign (2)", "L"), ("benign (10)", "RGB"), ("malignant (1)", "RGBA")):
        raw.mask(f"{name.split()[0]}/{name}_mask.png", mode)
    raw.mask("benign/benign (10)_mask_1.png", "L", box=(slice(0, 3), slice(0, 4)))
    raw.mask("benign/benign (10)_mask_2.png", "1", box=(slice(15, 18), slice(20, 29)))
    raw.mask("normal/normal (1)_mask.png", "1", box=None)
    return raw


def test_every_scan_has_the_union_of_its_masks_whatever_their_mode(busi, labels_of):
    manifest = busi.pack(LABELS)
    assert labels_of(manifest) == LABELS
    one = np.zeros((20, 30), np.uint8)
    one[5:12, 8:19] = 1
    three = one.copy()
    three[0:3, 0:4] = three[15:18, 20:29] = 1
    masks = {record.key: read_mask(busi.shards, record) for record in manifest.records}
    assert {key: mask.sum() for key, mask in masks.items()} == {
        "benign_0001": 77, "benign_0002": 77, "benign_0010": 77 + 12 + 27, "malignant_0001": 77, "normal_0001": 0,
    }  # fmt: skip
    assert np.array_equal(masks["benign_0010"], three)
    assert np.array_equal(masks["malignant_0001"], one)
    assert len(manifest.sources) == 5 + 7


def test_colour_images_keep_their_colours_and_every_image_is_a_patient(busi):
    manifest = busi.pack(LABELS)
    for key, name in (("benign_0001", "benign (1)"), ("malignant_0001", "malignant (1)")):
        record = manifest.record(key)
        assert np.array_equal(read_image(busi.shards, record), busi.images[name])
        assert record.patient == key


def without(file):
    return lambda busi: (busi.folder / file).unlink()


def renamed(file, new):
    return lambda busi: (busi.folder / file).rename(busi.folder / new)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without("benign/benign (2)_mask.png"), r"benign/benign \(2\)\.png has no mask"),
        (without("benign/benign (10).png"), r"benign/benign \(10\)_mask\.png is the mask of no image"),
        (renamed("normal", "Normal"), r"(?s)Normal/ holds images but is not a class.*class folder normal/ is missing"),
        (renamed("benign/benign (2).png", "benign/benign 2.png"), r"benign/benign 2\.png: names must be like"),
        (renamed("benign/benign (2).png", "benign/malignant (2).png"), r"malignant \(2\)\.png: names must be like"),
        (lambda busi: busi.mask("normal/normal (1)_mask.png"), r"normal_0001' is normal but has lesion pixels"),
        (lambda busi: busi.mask("malignant/malignant (1)_mask.png", box=None), r"'malignant_0001' .* empty mask"),
        (lambda busi: busi.mask("benign/benign (2)_mask.png", size=(9, 7), box=(0, 0)),
         r"benign/benign \(2\)\.png has 30x20 pixels, its mask benign/benign \(2\)_mask\.png has 9x7"),
        (lambda busi: (busi.folder / "benign/benign (1).png").write_bytes(b"none"),
         r"benign \(1\)\.png is not a readable PNG"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_packed(busi, harm, message):
    harm(busi)
    with pytest.raises(DataError, match=message):
        busi.pack(LABELS)
    assert not busi.shards.exists() or busi.packed_nothing()


def test_the_pixel_identical_pair_with_opposite_labels_stays_two_samples(busi):
    """Known of the real dataset (benign (433) = malignant (145)): the audit finds it, the packer keeps it."""
    with Image.open(busi.folder / "benign/benign (1).png") as picture:
        picture.save(busi.folder / "malignant/malignant (1).png")
    manifest = busi.pack(LABELS)
    one, other = (read_image(busi.shards, manifest.record(key)) for key in ("benign_0001", "malignant_0001"))
    assert np.array_equal(one, other)


def test_the_cards_counts_are_those_of_the_publication(card_of):
    card = card_of("busi")
    assert card.counts == {"benign": 437, "malignant": 210, "normal": 133}
    assert card.files["*/* (*)_mask*.png"] == 780 + 17 + 1
    assert not card.verified


def test_an_excerpt_may_lack_a_class(busi):
    for path in (busi.folder / "normal").iterdir():
        path.unlink()
    (busi.folder / "normal").rmdir()
    assert len(busi.pack({}, excerpt=True).records) == 4
