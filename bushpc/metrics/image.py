"""How far two sets of images lie apart by their features, and how far the images of one. NumPy.

features of generated images, features of real ones → FID and KID, where the features are Inception's

An interval is of chance alone, by the jackknife: blocks of whole patients are left out in turn, since images of one
patient are no independent evidence. (A bootstrap draws images twice, which both distances take for a set of less
variety.) It is of the right width for the kernel distance, and up to twice too wide for the Fréchet distance of few
images. It says nothing of the Fréchet distance's bias, which is upwards and the larger the fewer images there are: that
is to be read beside the distance of two real sets of the same sizes. The kernel distance has no bias.
"""

from __future__ import annotations

import typing as t
from collections.abc import Sequence

import numpy as np
import scipy.stats

BLOCKS = 20  # that a set is divided in, at most; more cost time and tell little more
DEGREE, COEFFICIENT = 3, 1.0  # of KID's polynomial kernel
_SEED = 2018
_ROWS = 1024  # of the kernel's matrix at once, which bounds the memory


class Estimate(t.NamedTuple):
    """A figure with its 95 % confidence interval; None where a set is of too few patients to leave some out."""

    value: float
    low: float | None
    high: float | None


def frechet(one_ND: np.ndarray, other_MD: np.ndarray, patients: Sequence[str], others: Sequence[str]) -> Estimate:
    """`frechet_distance` with its interval. patients, others: of the images, one each."""
    one_ND, other_MD = np.asarray(one_ND, float), np.asarray(other_MD, float)
    without_one = [frechet_distance(one_ND[kept], other_MD) for kept in _without(patients)]
    without_other = [frechet_distance(one_ND, other_MD[kept]) for kept in _without(others)]
    return _estimate(frechet_distance(one_ND, other_MD), without_one, without_other)


def frechet_distance(one_ND: np.ndarray, other_MD: np.ndarray) -> float:
    """|m₁ - m₂|² + Tr(C₁ + C₂ - 2 (C₁ C₂)^½) of the Gaussians of two sets (Heusel et al. 2017, eq. 6); no less than 0.

    With A and B the centred features over √(n - 1), C₁ = AᵀA and C₂ = BᵀB, and the last trace is the sum of the
    singular values of A Bᵀ. That holds where there are fewer images than features, too, where a root of C₁ C₂ is
    ill-conditioned, and costs as little as the smaller set is.
    """
    gap_D = one_ND.mean(axis=0) - other_MD.mean(axis=0)
    one_ND, other_MD = _centred(one_ND), _centred(other_MD)
    spread = (one_ND**2).sum() + (other_MD**2).sum()
    if min(len(one_ND), len(other_MD)) > one_ND.shape[1]:
        one_ND, other_MD = (np.asarray(np.linalg.qr(each, mode="r")) for each in (one_ND, other_MD))
    return max(0.0, float(gap_D @ gap_D + spread - 2 * np.linalg.norm(one_ND @ other_MD.T, "nuc")))


def _centred(features_ND: np.ndarray) -> np.ndarray:
    assert len(features_ND) > 1, "a covariance takes two images"
    return (features_ND - features_ND.mean(axis=0)) / np.sqrt(len(features_ND) - 1)


def kernel(one_ND: np.ndarray, other_MD: np.ndarray, patients: Sequence[str], others: Sequence[str]) -> Estimate:
    """The squared maximum mean discrepancy under (x·y / D + 1)³, by its unbiased estimator, with its interval.

    Bińkowski et al. 2018, section 4; KID where the features are Inception's. They average it over subsets, which has
    the same expectation and uses each image less; here it is of all pairs. It may come out a little below 0.
    """
    one_ND, other_MD = np.asarray(one_ND, float), np.asarray(other_MD, float)
    blocks, other_blocks = _blocks(patients), _blocks(others)
    own = _Within.of(one_ND, blocks)
    theirs = _Within.of(other_MD, other_blocks)
    across_GG = _block_sums(one_ND, other_MD, blocks, other_blocks)
    pairs = len(one_ND) * len(other_MD)
    left_N, left_M = len(one_ND) - np.bincount(blocks), len(other_MD) - np.bincount(other_blocks)
    value = own.mean + theirs.mean - 2 * across_GG.sum() / pairs
    across, across_N, across_M = across_GG.sum(), across_GG.sum(axis=1), across_GG.sum(axis=0)
    without_one = own.means_without() + theirs.mean - 2 * (across - across_N) / (left_N * len(other_MD)).clip(1)
    without_other = theirs.means_without() + own.mean - 2 * (across - across_M) / (left_M * len(one_ND)).clip(1)
    return _estimate(float(value), without_one[left_N > 1], without_other[left_M > 1])


def mean_pairwise(value_NN: np.ndarray, patients: Sequence[str]) -> Estimate:
    """The mean of a symmetric measure over the pairs of images of different patients; NaN where there are none."""
    patient_N = np.asarray(patients)
    pair_NN = patient_N[:, None] != patient_N

    def mean(kept: np.ndarray) -> float:
        chosen = value_NN[kept][:, kept][pair_NN[kept][:, kept]]
        return float(chosen.mean()) if chosen.size else float("nan")

    return _estimate(mean(np.ones(len(patients), bool)), [mean(kept) for kept in _without(patients)])


class _Within(t.NamedTuple):
    """The kernel summed over the pairs of different images of one set, by their blocks, and the images of each."""

    sum_GG: np.ndarray
    size_G: np.ndarray

    @classmethod
    def of(cls, features_ND: np.ndarray, blocks: np.ndarray) -> _Within:
        assert len(features_ND) > 1, "a pair takes two images"
        itself_N = _polynomial((features_ND**2).sum(axis=1), features_ND.shape[1])
        sum_GG = _block_sums(features_ND, features_ND, blocks, blocks)
        return cls(sum_GG - np.diag(np.bincount(blocks, itself_N)), np.bincount(blocks))

    @property
    def mean(self) -> float:
        images = self.size_G.sum()
        return float(self.sum_GG.sum() / (images * (images - 1)))

    def means_without(self) -> np.ndarray:
        """The mean with each block left out in turn."""
        left_G = self.size_G.sum() - self.size_G
        sum_G = self.sum_GG.sum() - 2 * self.sum_GG.sum(axis=1) + np.diag(self.sum_GG)
        return sum_G / (left_G * (left_G - 1)).clip(1)


def _block_sums(one_ND: np.ndarray, other_MD: np.ndarray, blocks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The kernel of every pair, summed over each block of one set and each of the other."""
    sum_GG = np.zeros((blocks.max() + 1, others.max() + 1))
    member_MG = np.eye(others.max() + 1)[others]
    for start in range(0, len(one_ND), _ROWS):
        rows = slice(start, start + _ROWS)
        kernel_RM = _polynomial(one_ND[rows] @ other_MD.T, one_ND.shape[1])
        np.add.at(sum_GG, blocks[rows], kernel_RM @ member_MG)
    return sum_GG


def _polynomial(product: np.ndarray, features: int) -> np.ndarray:
    return (product / features + COEFFICIENT) ** DEGREE


def _blocks(patients: Sequence[str]) -> np.ndarray:
    """The number of the block that each image is in: whole patients, dealt at random, the same every time."""
    names = sorted(set(patients))
    order = np.random.default_rng(_SEED).permutation(len(names))
    block = {name: int(place) % BLOCKS for name, place in zip(names, order, strict=True)}
    return np.array([block[patient] for patient in patients])


def _without(patients: Sequence[str]) -> t.Iterator[np.ndarray]:
    """Which images are kept as each block is left out; nothing where that leaves less than two."""
    blocks = _blocks(patients)
    for block in range(blocks.max() + 1):
        if (blocks != block).sum() > 1:
            yield blocks != block


def _estimate(value: float, *left_out: Sequence[float] | np.ndarray) -> Estimate:
    """value: with nothing left out. left_out: of each set, the values with each of its blocks left out in turn."""
    fewest = min(map(len, left_out))
    if fewest < 2:
        return Estimate(value, None, None)
    # Of sets that are independent of each other (Efron 1982, chapter 3).
    variance = sum((len(each) - 1) * np.var(each) for each in left_out)
    half = float(scipy.stats.t.ppf(0.975, fewest - 1) * np.sqrt(variance))
    return Estimate(value, value - half, value + half)
