"""Promises of augmentation: keyed by (seed, sample, turn), image and mask move together, nobody's RNG is touched."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from bushpc.config import AugmentConfig, StrengthConfig
from bushpc.data.augment import Augment
from bushpc.dist import keyed_seed

METHODS = ("one_warp", "torchvision")
USUAL = {"hflip": 0.5, "rotate": 20.0, "zoom": 0.1, "brightness": 0.2, "contrast": 0.2}


def augment(method: str, **settings) -> Augment:
    return Augment(AugmentConfig(method=method, **settings))


def sample(key: str = "a", label: str = "benign"):
    return SimpleNamespace(key=key, label=label)


def pair():
    mask = torch.zeros(1, 48, 48, dtype=torch.uint8)
    mask[:, 14:22, 15:30] = 1
    return mask.repeat(3, 1, 1) * 200, mask


@pytest.mark.parametrize("method", METHODS)
def test_the_same_key_gives_the_same_pixels_and_another_key_others(method):
    usual = augment(method, **USUAL)
    first, again, turned = (usual(*pair(), sample(), seed=0, turn=turn)[0] for turn in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, turned)
    assert not torch.equal(first, usual(*pair(), sample("b"), seed=0, turn=1)[0])
    assert not torch.equal(first, usual(*pair(), sample(), seed=1, turn=1)[0])


@pytest.mark.parametrize("method", METHODS)
def test_fixed_variants_come_back_in_turn(method):
    usual = augment(method, **USUAL, variants=3)
    images = [usual(*pair(), sample(), seed=0, turn=turn)[0] for turn in range(6)]
    assert all(torch.equal(images[turn], images[turn + 3]) for turn in range(3))
    assert not any(torch.equal(images[one], images[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("label", ["benign", "unlabelled"])
def test_labels_are_changed_as_strongly_as_they_are_told(method, label):
    strength = StrengthConfig(benign=0.0, malignant=0.5, normal=1.0)
    flip = augment(method, hflip=1.0, strength=strength)
    changed = {
        name: sum(not torch.equal(flip(*pair(), sample(str(i), name), 0, 0)[1], pair()[1]) for i in range(200))
        for name in (label, "malignant", "normal")
    }
    assert changed[label] == 0
    assert changed["normal"] == 200
    assert 70 < changed["malignant"] < 130
    config = AugmentConfig(hflip=1.0, strength=strength)
    assert config.changes
    assert not dataclasses.replace(config, strength=StrengthConfig(benign=0, malignant=0, normal=0)).changes


@pytest.mark.parametrize("method", METHODS)
def test_image_and_mask_move_together(method):
    image, mask = augment(method, hflip=1.0)(*pair(), sample(), 0, 0)
    assert torch.equal(mask, pair()[1].flip(-1))
    assert torch.equal(image, pair()[0].flip(-1))
    turned = augment(method, rotate=30.0)
    for key in range(20):
        image, mask = turned(*pair(), sample(str(key)), 0, 0)
        assert ((image[0] > 100) == (mask[0] > 0)).float().mean() > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generator_is_left_alone(method):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    augment(method, **USUAL)(*pair(), sample(), 0, 1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", METHODS)
def test_masks_stay_binary(method):
    usual = augment(method, **USUAL)
    for key in range(10):
        _, mask = usual(*pair(), sample(str(key)), 0, 0)
        assert set(mask.unique().tolist()) <= {0, 1}


def test_a_run_from_before_there_were_methods_draws_the_pixels_it_drew_then():
    """The config of such a run states no method."""
    image, mask = pair()
    steps = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomAffine(20.0, scale=(0.9, 1.1)),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
        ]
    )
    for turn in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(7, "augment", turn, "a"))
            expected = steps(tv_tensors.Image(image), tv_tensors.Mask(mask))
        drawn = Augment(AugmentConfig(**USUAL))(image, mask, sample(), 7, turn)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, expected, strict=True))
