"""Promises of augmentation: keyed by (seed, epoch, sample), image and mask move together, nobody's RNG is touched."""

from __future__ import annotations

import torch

from bushpc.config import AugmentConfig
from bushpc.data.augment import Augment

ALL = AugmentConfig(hflip=0.5, rotate=20.0, zoom=0.1, brightness=0.2, contrast=0.2)
NONE = AugmentConfig(hflip=0.0, rotate=0.0, zoom=0.0, brightness=0.0, contrast=0.0)


def pair():
    mask = torch.zeros(1, 32, 48, dtype=torch.uint8)
    mask[:, 4:12, 5:20] = 1
    return mask.repeat(3, 1, 1) * 200, mask


def test_the_same_key_gives_the_same_pixels_and_another_key_others():
    augment = Augment(ALL)
    first, again, other = (augment(*pair(), key)[0] for key in ((0, 1, "a"), (0, 1, "a"), (0, 2, "a")))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_image_and_mask_move_together():
    image, mask = Augment(AugmentConfig(**{**vars(NONE), "hflip": 1.0}))(*pair(), (0,))
    assert torch.equal(mask, pair()[1].flip(-1))
    assert torch.equal(image, pair()[0].flip(-1))
    for key in range(20):
        image, mask = Augment(AugmentConfig(**{**vars(NONE), "rotate": 30.0}))(*pair(), (key,))
        agreement = ((image[0] > 100) == (mask[0] > 0)).float().mean()
        assert agreement > 0.97


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Augment(ALL)(*pair(), (0, 1, "a"))
    assert torch.equal(torch.rand(3), expected)


def test_masks_stay_binary():
    for key in range(10):
        _, mask = Augment(ALL)(*pair(), (key,))
        assert set(mask.unique().tolist()) <= {0, 1}
