"""Promises of matching two persistence diagrams: POT's and gudhi's optimum for few points, close to it for many."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from gudhi.wasserstein import wasserstein_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from bushpc.losses import matching
from bushpc.losses.topology import topological_loss


def points(seed: int, count: int, spread: float = 1.0) -> np.ndarray:
    """Points (m, h), most of them near the diagonal, as noise has them."""
    generator = np.random.default_rng(seed)
    return np.column_stack([spread * generator.normal(size=count), spread * generator.exponential(0.2, count) + 1e-6])


def cost_of(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    assert len(set(i.tolist())) == len(i)
    assert len(set(j.tolist())) == len(j)
    return float(np.abs(a[i] - b[j]).sum() + np.delete(a[:, 1], i).sum() + np.delete(b[:, 1], j).sum())


def gudhis(a: np.ndarray, b: np.ndarray) -> float:
    """The least cost, from births and deaths."""
    first, second = (np.column_stack([x[:, 0] - x[:, 1], x[:, 0] + x[:, 1]]) for x in (a, b))
    return float(wasserstein_distance(first, second, order=1, internal_p=np.inf))


def test_few_points_are_matched_at_the_least_cost() -> None:
    a, b = points(0, 40), points(1, 55)
    assert cost_of(a, b, *matching.match(a, b)) == pytest.approx(gudhis(a, b))


def test_a_pair_that_costs_more_than_the_diagonal_is_left_apart() -> None:
    a, b = np.array([[0.0, 0.1], [5.0, 1.0]]), np.array([[9.0, 0.1], [5.5, 1.0]])
    i, j = matching.match(a, b)
    assert (i.tolist(), j.tolist()) == ([1], [1])


@pytest.mark.parametrize("spread", [1.0, 1.4], ids=["alike", "of more noise"])
def test_many_points_are_matched_within_a_hundredth_of_the_least_cost(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = points(2, 900), points(3, 1000, spread)
    monkeypatch.setattr(matching, "EXACT_PAIRS", 0)
    assert gudhis(a, b) <= cost_of(a, b, *matching.match(a, b)) + 1e-9 <= 1.01 * gudhis(a, b)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_sparse_way_is_right_for_any_number_of_points(n: int, m: int, seed: int, rounded: float) -> None:
    # Rounded coordinates make ties and equal points.
    a, b = points(seed, n), points(seed + 1, m)
    if rounded:
        a, b = (np.maximum(np.round(x / rounded) * rounded, [-np.inf, rounded]) for x in (a, b))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "EXACT_PAIRS", 0)
        found = cost_of(a, b, *matching.match(a, b))
    with_diagonal = np.abs(a[:, None] - b[None]).sum(axis=2)
    costs = np.block([[with_diagonal, a[:, 1:]], [b[:, 1][None], np.zeros((1, 1))]])
    least = ot.emd2(np.append(np.ones(n), m), np.append(np.ones(m), n), costs)
    assert least - 1e-9 <= found <= 1.01 * least + 1e-9


def test_slopes_of_noise_are_those_of_the_exact_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two maps of 80 x 80 pixels have more than a thousand holes each; the exact distance by finite differences."""
    generator = torch.Generator().manual_seed(7)
    a, b, direction = (torch.rand(1, 1, 80, 80, generator=generator) for _ in range(3))
    a.requires_grad_()
    topological_loss(a, b).sum().backward()
    assert a.grad is not None
    slope = float((a.grad * direction).sum())
    monkeypatch.setattr(matching, "EXACT_PAIRS", 10**9)
    step = 2e-5
    with torch.no_grad():
        high, low = (topological_loss(a + sign * step * direction, b).item() for sign in (1, -1))
    assert slope == pytest.approx((high - low) / (2 * step), rel=0.05)
