"""Promises of ISIC 2018: every photograph has its outline, and what else lies in the folders is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bushpc.errors import DataError
from bushpc.shards.manifest import read_image, read_mask

IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
KEYS = ["ISIC_0000000", "ISIC_0000001", "ISIC_0016072"]
SIZES = [(30, 20), (20, 30), (33, 25)]
COUNTS = {"unlabelled": 3}


@pytest.fixture
def isic(raw_of):
    raw = raw_of("isic2018")
    for key, size in zip(KEYS, SIZES, strict=True):
        raw.image(f"{IMAGES}/{key}.jpg", "RGB", size)
        raw.mask(f"{MASKS}/{key}_segmentation.png", "L", size=size)
        raw.image(f"{IMAGES}/{key}_superpixels.png", "RGB", size)
    for part in (IMAGES, MASKS):
        (raw.folder / part / "ATTRIBUTION.txt").write_text("who")
        (raw.folder / part / "LICENSE.txt").write_text("what")
    return raw


def test_every_photograph_is_packed_with_its_outline_and_nothing_else_is(isic):
    manifest = isic.pack(COUNTS)
    assert [record.key for record in manifest.records] == KEYS
    assert manifest.mask_classes == ["lesion"]
    assert len(manifest.sources) == 6
    for record, size in zip(manifest.records, SIZES, strict=True):
        assert (record.width, record.height) == size
        assert record.label == "unlabelled"
        with Image.open(isic.folder / IMAGES / f"{record.key}.jpg") as file:
            assert np.array_equal(read_image(isic.shards, record), np.asarray(file))
        with Image.open(isic.folder / MASKS / f"{record.key}_segmentation.png") as file:
            assert np.array_equal(read_mask(isic.shards, record), np.asarray(file) == 255)


def without_a_mask(folder):
    (folder / MASKS / "ISIC_0000001_segmentation.png").unlink()


def without_an_image(folder):
    (folder / IMAGES / "ISIC_0016072.jpg").unlink()


def of_another_size(folder):
    Image.fromarray(np.full((20, 20), 255, np.uint8)).save(folder / MASKS / "ISIC_0000001_segmentation.png")


def with_grey_edges(folder):
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(folder / MASKS / "ISIC_0000000_segmentation.png")


def empty(folder):
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / MASKS / "ISIC_0000000_segmentation.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_mask, f"{IMAGES}/ISIC_0000001.jpg has no mask"),
        (without_an_image, f"{MASKS}/ISIC_0016072_segmentation.png is the mask of no image"),
        (of_another_size, r"ISIC_0000001.jpg has 20x30 pixels, its mask .*ISIC_0000001_segmentation.png has 20x20"),
        (
            with_grey_edges,
            r"ISIC_0000000_segmentation.png has pixels of value 90; masks of this dataset use only 0, 255",
        ),
        (empty, r"'ISIC_0000000' has a lesion but an empty mask .*ISIC_0000000_segmentation.png"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_packed(isic, damage, message):
    damage(isic.folder)
    with pytest.raises(DataError, match=message):
        isic.pack(COUNTS, excerpt=True)
    assert isic.packed_nothing()


def test_a_folder_of_another_dataset_is_refused(raw_of):
    raw = raw_of("isic2018")
    raw.image("images/001.jpg")
    with pytest.raises(DataError, match="is not the folder of isic2018"):
        raw.pack({}, excerpt=True)
