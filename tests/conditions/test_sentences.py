"""Promises of prompts: the wording follows the facts, deterministically, and the first pass sees no mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from bushpc.conditions.sentences import (
    FROM_MASK,
    FirstPass,
    SizeBins,
    attribute_prompt,
    centroid,
    largest_component,
    spatial_prompt,
)
from bushpc.errors import DataError

BINS = SizeBins(low=0.2, high=0.4)


def disc(height, width, c_y, c_x, radius):
    y, x = np.mgrid[:height, :width]
    return (y - c_y) ** 2 + (x - c_x) ** 2 <= radius**2


def test_the_centroid_is_that_of_image_moments():
    mask = np.random.default_rng(0).random((31, 47)) > 0.7
    c_y, c_x = ndimage.center_of_mass(mask)
    assert centroid(mask) == pytest.approx((c_x, c_y))


@pytest.mark.parametrize(
    ("c_y", "c_x", "place"),
    [(20, 20, "upper inner"), (20, 80, "upper outer"), (80, 20, "lower inner"), (80, 80, "lower outer")],
)
def test_the_quadrant_is_where_the_lesion_is(c_y, c_x, place):
    assert f"in the {place} quadrant" in spatial_prompt(disc(100, 100, c_y, c_x, 10), BINS)


@pytest.mark.parametrize(("radius", "word"), [(5, "small"), (15, "medium"), (30, "large")])
def test_the_size_word_follows_the_bins(radius, word):
    assert spatial_prompt(disc(100, 100, 50, 50, radius), BINS).startswith(f"a {word} lesion")


@pytest.mark.parametrize(
    ("radius", "wrong"),
    [(5, "large"), (30, "small"), (12, "large"), (22, "small")],  # sizes 0.09, 0.53, and 0.21 and 0.39 between the bins
)
def test_a_wrong_size_is_the_farthest_word_in_the_oracles_sentence(radius, wrong):
    mask = disc(100, 100, 50, 50, radius)
    oracle, falsified = spatial_prompt(mask, BINS).split(), FROM_MASK["wrong_size"](mask, BINS).split()
    assert oracle[1] != falsified[1] == wrong
    assert oracle[2:] == falsified[2:]


@pytest.mark.parametrize("c_y", [20, 80])
@pytest.mark.parametrize("c_x", [20, 80])
def test_a_wrong_quadrant_is_the_one_where_the_rotated_lesion_would_be(c_y, c_x):
    mask = disc(101, 101, c_y, c_x, 15)
    assert FROM_MASK["wrong_quadrant"](mask, BINS) == spatial_prompt(mask[::-1, ::-1], BINS)


def test_there_is_nothing_to_falsify_without_a_lesion():
    assert {prompt(np.zeros((9, 9), bool), BINS) for prompt in FROM_MASK.values()} == {""}


def test_size_bins_cut_the_training_part_into_thirds():
    shares = np.linspace(0.01, 0.3, 99)
    bins = SizeBins.from_training(list(shares), (1 / 3, 2 / 3))
    words = [bins.word(share) for share in shares]
    assert [words.count(word) for word in ("small", "medium", "large")] == [33, 33, 33]


def test_no_training_lesion_is_an_error():
    with pytest.raises(DataError, match="at least one mask"):
        SizeBins.from_training([0.0, 0.0], (0.3, 0.6))


def test_the_first_pass_takes_the_largest_component_above_tau():
    prob = np.zeros((100, 100))
    prob[disc(100, 100, 20, 20, 12)] = 0.31
    prob[disc(100, 100, 80, 80, 6)] = 0.99
    assert FirstPass(bins=BINS, tau=0.30)(prob) == "a medium lesion in the upper inner quadrant of the breast"
    assert FirstPass(bins=BINS, tau=0.50)(prob) == "a small lesion in the lower outer quadrant of the breast"
    assert FirstPass(bins=BINS, tau=0.995)(prob) == ""


@given(st.integers(0, 2**32 - 1))
def test_the_largest_component_is_scipys_largest(seed):
    mask = np.random.default_rng(seed).random((12, 12)) > 0.6
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
    assert largest_component(mask).sum() == (max(sizes) if count else 0)


def test_attributes_are_spoken_and_missing_ones_left_out():
    full = {"shape": "irregular", "margin": "not circumscribed - angular&indistinct", "birads": "4c"}
    assert attribute_prompt(full) == "irregular shape, not circumscribed angular and indistinct margin, BI-RADS 4c"
    assert attribute_prompt({**full, "margin": None}) == "irregular shape, BI-RADS 4c"
    assert attribute_prompt({}) == ""
