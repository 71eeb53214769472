"""Promises of STU: masks of four times the size, with soft edges, fit their images; nothing claims a label."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bushpc.errors import DataError
from bushpc.sample import UNLABELLED
from bushpc.shards.manifest import read_mask


@pytest.fixture
def stu(raw_of):
    """Image 1 has a mask of its own size, image 2 one of four times that with anti-aliased edges."""
    raw = raw_of("stu")
    for number in (1, 2):
        raw.image(f"Hospital/Test_Image_{number}.png", size=(128, 128))
    raw.mask("Hospital/mask_1.png", size=(128, 128), box=(slice(10, 30), slice(40, 80)))
    grey = np.zeros((512, 512), np.uint8)
    grey[100:300, 120:360] = 255
    grey[96:100, 120:360] = 90  # a soft edge, below half: one row of the image
    grey[300:304, 120:360] = 180  # and above half
    Image.fromarray(grey).save(raw.folder / "Hospital/mask_2.png")
    return raw


def test_masks_are_resized_to_their_image_and_thresholded_at_half(stu, labels_of):
    manifest = stu.pack({UNLABELLED: 2})
    assert labels_of(manifest) == {UNLABELLED: 2}
    one, two = (read_mask(stu.shards, record) for record in manifest.records)
    assert [record.key for record in manifest.records] == ["stu_01", "stu_02"]
    assert one.sum() == one[10:30, 40:80].sum() == 800
    expected = np.zeros((128, 128), np.uint8)
    expected[25:76, 30:90] = 1
    assert np.array_equal(two, expected)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("mask_2.png", r"Hospital/Test_Image_2\.png has no mask"),
        ("Test_Image_1.png", r"Hospital/mask_1\.png is the mask of no image"),
    ],
)
def test_a_file_without_its_counterpart_is_named_and_nothing_is_packed(stu, file, message):
    (stu.folder / "Hospital" / file).unlink()
    with pytest.raises(DataError, match=message):
        stu.pack({UNLABELLED: 2})
    assert stu.packed_nothing()


def test_the_cards_counts_are_those_of_the_publication(card_of):
    assert card_of("stu").counts == {UNLABELLED: 42}
