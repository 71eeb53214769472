"""Promises of augmentation: keyed by (seed, sample, turn), image and mask move together, nobody's RNG is touched."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from bushpc.config import AugmentConfig, StrengthConfig
from bushpc.data.augment import Augment

FULL = StrengthConfig(benign=1.0, malignant=1.0, normal=1.0)
ALL = AugmentConfig(hflip=0.5, rotate=20.0, zoom=0.1, brightness=0.2, contrast=0.2, strength=FULL, variants=0)
NONE = AugmentConfig(hflip=0.0, rotate=0.0, zoom=0.0, brightness=0.0, contrast=0.0, strength=FULL, variants=0)


def sample(key: str = "a", label: str = "benign"):
    return SimpleNamespace(key=key, label=label)


def pair():
    mask = torch.zeros(1, 32, 48, dtype=torch.uint8)
    mask[:, 4:12, 5:20] = 1
    return mask.repeat(3, 1, 1) * 200, mask


def test_the_same_key_gives_the_same_pixels_and_another_key_others():
    augment = Augment(ALL)
    first, again, turned = (augment(*pair(), sample(), seed=0, turn=turn)[0] for turn in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, turned)
    assert not torch.equal(first, augment(*pair(), sample("b"), seed=0, turn=1)[0])
    assert not torch.equal(first, augment(*pair(), sample(), seed=1, turn=1)[0])


def test_fixed_variants_come_back_in_turn():
    augment = Augment(dataclasses.replace(ALL, variants=3))
    images = [augment(*pair(), sample(), seed=0, turn=turn)[0] for turn in range(6)]
    assert all(torch.equal(images[turn], images[turn + 3]) for turn in range(3))
    assert not any(torch.equal(images[one], images[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("label", ["benign", "unlabelled"])
def test_labels_are_changed_as_strongly_as_they_are_told(label):
    strength = StrengthConfig(benign=0.0, malignant=0.5, normal=1.0)
    augment = Augment(dataclasses.replace(NONE, hflip=1.0, strength=strength))
    changed = {
        name: sum(not torch.equal(augment(*pair(), sample(str(i), name), 0, 0)[1], pair()[1]) for i in range(200))
        for name in (label, "malignant", "normal")
    }
    assert changed[label] == 0
    assert changed["normal"] == 200
    assert 70 < changed["malignant"] < 130
    assert dataclasses.replace(NONE, hflip=1.0, strength=strength).changes
    assert not dataclasses.replace(ALL, strength=StrengthConfig(benign=0, malignant=0, normal=0)).changes


def test_image_and_mask_move_together():
    image, mask = Augment(dataclasses.replace(NONE, hflip=1.0))(*pair(), sample(), 0, 0)
    assert torch.equal(mask, pair()[1].flip(-1))
    assert torch.equal(image, pair()[0].flip(-1))
    for key in range(20):
        image, mask = Augment(dataclasses.replace(NONE, rotate=30.0))(*pair(), sample(str(key)), 0, 0)
        agreement = ((image[0] > 100) == (mask[0] > 0)).float().mean()
        assert agreement > 0.97


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Augment(ALL)(*pair(), sample(), 0, 1)
    assert torch.equal(torch.rand(3), expected)


def test_masks_stay_binary():
    for key in range(10):
        _, mask = Augment(ALL)(*pair(), sample(str(key)), 0, 0)
        assert set(mask.unique().tolist()) <= {0, 1}
