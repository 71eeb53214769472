"""Distances of two sets of images against torchmetrics, closed forms and sums worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from bushpc.metrics.image import frechet, frechet_distance, kernel, mean_pairwise


class AsTheyAre(torch.nn.Module):
    """A feature extractor for torchmetrics that is given the features themselves."""

    num_features = 6

    def forward(self, features):
        return features


def numbered(count):
    return [str(i) for i in range(count)]


@pytest.fixture
def sets():
    random = np.random.default_rng(3)
    return random.normal(size=(40, 6)), random.normal(0.4, 1.5, size=(30, 6))


def test_frechet_distance_agrees_with_torchmetrics(sets):
    one, other = sets
    fid = FrechetInceptionDistance(feature=AsTheyAre()).set_dtype(torch.float64)
    fid.update(torch.tensor(one), real=True)
    fid.update(torch.tensor(other), real=False)
    assert frechet_distance(one, other) == pytest.approx(float(fid.compute()), rel=1e-9)


@pytest.mark.parametrize("images", [5, 400])  # fewer than features, and more
def test_frechet_distance_of_two_gaussians_is_the_closed_form(images):
    """Sets whose sample moments are known exactly: one set, and the same set stretched and shifted."""
    random = np.random.default_rng(0)
    features = random.normal(size=(images, 8))
    scale, shift = 1.7, random.normal(size=8)
    trace = np.trace(np.cov(features, rowvar=False))
    mean = features.mean(axis=0)
    gap = scale * mean + shift - mean
    expected = gap @ gap + (1 - scale) ** 2 * trace
    assert frechet_distance(features, scale * features + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_the_sum_over_pairs_by_hand():
    one, other = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    k_one = (0 / 2 + 1) ** 3  # the only pair of the first set
    k_other = ((2 / 2 + 1) ** 3 + 1 + 1) / 3  # three pairs
    k_across = ((1 / 2 + 1) ** 3 + (2 / 2 + 1) ** 3 + 1 + (2 / 2 + 1) ** 3 + 1 + 1) / 6
    found = kernel(one, other, numbered(2), numbered(3))
    assert found.value == pytest.approx(k_one + k_other - 2 * k_across)


def test_kernel_distance_agrees_with_torchmetrics(sets):
    one, other = sets[0][:30], sets[1]
    kid = KernelInceptionDistance(feature=AsTheyAre(), subsets=1, subset_size=30)  # all of them
    kid.update(torch.tensor(one), real=True)
    kid.update(torch.tensor(other), real=False)
    assert kernel(one, other, numbered(30), numbered(30)).value == pytest.approx(float(kid.compute()[0]), rel=1e-9)


def test_kernel_distance_has_no_bias_and_frechet_distance_of_few_images_does():
    random = np.random.default_rng(1)
    pairs = [(random.normal(size=(12, 6)), random.normal(size=(12, 6))) for _ in range(200)]
    kernels = [kernel(*pair, numbered(12), numbered(12)).value for pair in pairs]
    assert abs(np.mean(kernels)) < 3 * np.std(kernels) / np.sqrt(200)
    assert min(frechet_distance(*pair) for pair in pairs) > 0.5


@pytest.mark.parametrize("distance", [frechet, kernel])
def test_the_interval_is_the_jackknifes(distance):
    """Every patient left out in turn, on both sides, by the formula."""
    random = np.random.default_rng(2)
    one, other = random.normal(size=(9, 4)), random.normal(0.5, size=(8, 4))
    patients, others = ["a", "a", "b", "c", "c", "d", "e", "e", "e"], numbered(8)
    found = distance(one, other, patients, others)

    def left_out(names, without):
        return np.array([without(np.array([name != gone for name in names])) for gone in sorted(set(names))])

    first = left_out(patients, lambda kept: distance(one[kept], other, [""] * kept.sum(), others).value)
    second = left_out(others, lambda kept: distance(one, other[kept], patients, [""] * kept.sum()).value)
    variance = 4 / 5 * ((first - first.mean()) ** 2).sum() + 7 / 8 * ((second - second.mean()) ** 2).sum()
    half = 2.7764451052 * np.sqrt(variance)  # Student's t at 4 degrees of freedom
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


@pytest.mark.parametrize("distance", [frechet, kernel])
def test_images_of_one_patient_give_no_interval(distance):
    random = np.random.default_rng(4)
    found = distance(random.normal(size=(5, 3)), random.normal(size=(6, 3)), ["ann"] * 5, numbered(6))
    assert found.low is None
    assert found.high is None


def test_pairs_of_one_patient_count_for_no_variety():
    value = np.array([[0.0, 100.0, 1.0], [100.0, 0.0, 3.0], [1.0, 3.0, 0.0]])
    assert mean_pairwise(value, ["ann", "ann", "bea"]).value == 2
    assert np.isnan(mean_pairwise(value, ["ann"] * 3).value)
