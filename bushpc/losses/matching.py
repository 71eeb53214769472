"""Which points of two persistence diagrams belong together at the least cost; the rest go to the diagonal.

In the coordinates of `bushpc.losses.topology`, m = (birth + death) / 2 and h = |birth - death| / 2, a pair costs
|m - m'| + |h - h'| and a point that goes to the diagonal costs h. Few points are matched exactly, as an assignment.
Of the thousands that pixel noise makes, most pairs need not be looked at:

    cells of a dozen points ─transport between them→ first arcs and prices
    arcs ─POT's network simplex→ plan, cost (never below the optimum), prices ─nearest neighbours→ more arcs, bound

The prices (dual variables) tell which other arcs could lower the cost: for each point those to its nearest neighbours,
once the partner's price counts as one more coordinate of the distance. They also give a bound that no matching is
below. It ends where bound and cost meet, or another round would not pay.
"""

from __future__ import annotations

import functools
import typing as t

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Up to so many pairs of points the assignment is exact: it takes a quarter of a second, and far more above.
EXACT_PAIRS = 1_000_000
# The cost may be so far above the bound, as a share of it.
TOLERANCE = 0.01
# A round that lowered the cost by less than this share was the last one: the bound often comes later than the optimum.
WORTHWHILE = 0.003
# Points of a cell, and the most cells of a diagram: between them all arcs are looked at.
CELL_POINTS, MOST_CELLS = 12, 600
# Arcs that a round adds to a point, and those to its neighbours without prices.
ARCS, NEIGHBOURS = 6, 4


def match(a_N2: Floats, b_M2: Floats) -> tuple[Indices, Indices]:
    """Indices of the matched pairs, of points (m, h), h > 0; a point that is in none goes to the diagonal.

    The cost is the least up to EXACT_PAIRS pairs of points; above, it is near it: up to 0.08 % above in
    benchmarks/2026-11-30_matching, and tests allow 1 %.
    """
    return _exact(a_N2, b_M2) if len(a_N2) * len(b_M2) <= EXACT_PAIRS else _sparse(a_N2, b_M2)


def _exact(a_N2: Floats, b_M2: Floats) -> tuple[Indices, Indices]:
    """Compared with the diagonal, a pair saves 2 min(h, h') - |m - m'|: the assignment that saves most."""
    from scipy.optimize import linear_sum_assignment

    cost_NM = np.subtract.outer(a_N2[:, 0], b_M2[:, 0])
    np.abs(cost_NM, out=cost_NM)
    cost_NM -= np.minimum.outer(2 * a_N2[:, 1], 2 * b_M2[:, 1])
    np.minimum(cost_NM, 0, out=cost_NM)  # the negated savings of each pair
    i, j = linear_sum_assignment(cost_NM)
    saves = cost_NM[i, j] < 0
    return i[saves], j[saves]


def _sparse(a_N2: Floats, b_M2: Floats) -> tuple[Indices, Indices]:
    a, b = _Side(a_N2, np.ones(len(a_N2))), _Side(b_M2, np.ones(len(b_M2)))
    arcs, bound = _first_arcs(a, b)
    last = np.inf
    while True:
        plan = _transport(a, b, arcs)
        nearest, reduced = b.nearest(a.points, ARCS, plan.b_prices)
        bound = max(bound, _bound(a, plan.b_prices, reduced))
        if plan.cost - bound <= TOLERANCE * bound or last - plan.cost < WORTHWHILE * last:
            return plan.pairs
        last = plan.cost
        # An arc can lower the cost only if it costs less than both of its prices together.
        gain = reduced < plan.a_prices[:, None]
        arcs = arcs.with_(np.nonzero(gain)[0], nearest[gain])


class _Side:
    """Points (m, h) of one diagram, each standing for `weights` equal ones."""

    def __init__(self, points: Floats, weights: Floats) -> None:
        self.points, self.weights = points, weights

    def nearest(self, to: Floats, count: int, prices: Floats | float = 0.0) -> tuple[Indices, Floats]:
        """For each point of `to`, the `count` points here of the least distance less price, and these differences."""
        from scipy.spatial import KDTree

        prices = np.broadcast_to(prices, len(self.points))
        highest = prices.max()
        tree = KDTree(np.column_stack([self.points, highest - prices]))
        distance, index = tree.query(np.column_stack([to, np.zeros(len(to))]), min(count, len(self.points)), p=1)
        shape = len(to), -1
        return index.reshape(shape), distance.reshape(shape) - highest

    @functools.cached_property
    def cell(self) -> Indices:
        """The cell of each point: columns of equally many points by m, cut by h."""
        count = len(self.points)
        per_cell = max(CELL_POINTS, count // MOST_CELLS)
        columns = max(1, round((count / per_cell) ** 0.5))
        column, cell = np.empty(count, int), np.empty(count, int)
        column[np.argsort(self.points[:, 0], kind="stable")] = np.arange(count) * columns // count
        cell[np.lexsort((self.points[:, 1], column))] = np.arange(count) // per_cell
        return cell

    def in_cells(self) -> _Side:
        """The means of the cells' points."""
        weights = np.bincount(self.cell, self.weights).astype(np.float64)
        sums = [np.bincount(self.cell, self.weights * by_axis) for by_axis in self.points.T]
        return _Side(np.column_stack(sums) / weights[:, None], weights)


class _Arcs:
    """Pairs of points that may be matched, each once, and cheaper than sending both to the diagonal."""

    def __init__(self, a: _Side, b: _Side, keys: Indices) -> None:
        self._a, self._b, self._keys = a, b, keys
        self.i, self.j = np.divmod(keys, len(b.points))
        self.costs = self._costs(self.i, self.j)

    def _costs(self, i: Indices, j: Indices) -> Floats:
        costs: Floats = np.abs(self._a.points[i] - self._b.points[j]).sum(axis=1)
        return costs

    def with_(self, i: Indices, j: Indices) -> _Arcs:
        """These, and those of them that save anything."""
        saves = self._costs(i, j) < self._a.points[i, 1] + self._b.points[j, 1]
        keys = i[saves].astype(np.int64) * len(self._b.points) + j[saves]
        return _Arcs(self._a, self._b, np.union1d(self._keys, keys))


class _Plan(t.NamedTuple):
    """A cheapest transport along given arcs; its prices are at most h, the price of the diagonal."""

    cost: float
    pairs: tuple[Indices, Indices]
    a_prices: Floats
    b_prices: Floats


def _transport(a: _Side, b: _Side, arcs: _Arcs) -> _Plan:
    """The diagonal is one more point on either side, which takes and gives as much as the other side has."""
    import ot
    from scipy.sparse import coo_array

    n, m = len(a.points), len(b.points)
    rows = np.concatenate([arcs.i, np.arange(n), np.full(m + 1, n)])
    columns = np.concatenate([arcs.j, np.full(n, m), np.arange(m + 1)])
    costs = np.concatenate([arcs.costs, a.points[:, 1], b.points[:, 1], [0.0]])
    moved, log = ot.emd(
        np.append(a.weights, b.weights.sum()),
        np.append(b.weights, a.weights.sum()),
        coo_array((costs, (rows, columns)), shape=(n + 1, m + 1)),
        numItermax=10**9,
        log=True,
        center_dual=False,
    )
    moved = moved.tocoo()
    pairs = (moved.data > 0) & (moved.row < n) & (moved.col < m)
    # Prices are known up to a number that one side gains and the other loses: the diagonal's are 0.
    shift = log["v"][m]
    return _Plan(
        float(log["cost"]),
        (moved.row[pairs].astype(np.int64), moved.col[pairs].astype(np.int64)),
        log["u"][:n] + shift,
        log["v"][:m] - shift,
    )


def _first_arcs(a: _Side, b: _Side) -> tuple[_Arcs, float]:
    """Arcs to start from, and a bound: those between cells that exchange points, and to neighbours."""
    cells_a, cells_b = a.in_cells(), b.in_cells()
    everywhere = np.indices((len(cells_a.points), len(cells_b.points))).reshape(2, -1)
    none = np.empty(0, np.int64)
    plan = _transport(cells_a, cells_b, _Arcs(cells_a, cells_b, none).with_(*everywhere))
    # The cells' prices become the points' own: what the cheapest cell leaves.
    b_prices = np.minimum(b.points[:, 1], cells_a.nearest(b.points, 1, plan.a_prices)[1][:, 0])
    cheapest, reduced = b.nearest(a.points, ARCS, b_prices)
    arcs = _Arcs(a, b, none).with_(*_members(plan.pairs, a.cell, b.cell))
    for index in (cheapest, b.nearest(a.points, NEIGHBOURS)[0]):
        arcs = arcs.with_(np.repeat(np.arange(len(index)), index.shape[1]), index.ravel())
    index = a.nearest(b.points, NEIGHBOURS)[0]
    arcs = arcs.with_(index.ravel(), np.repeat(np.arange(len(index)), index.shape[1]))
    return arcs, _bound(a, b_prices, reduced)


def _bound(a: _Side, b_prices: Floats, reduced: Floats) -> float:
    """What no matching is below: the prices of one side, and of each point of the other the least that they leave it.

    reduced: costs to the nearest points of the priced side less their prices, the least first.
    """
    return float(np.minimum(a.points[:, 1], reduced[:, 0]).sum() + b_prices.sum())


def _members(cells: tuple[Indices, Indices], a_cell: Indices, b_cell: Indices) -> tuple[Indices, Indices]:
    """All pairs of a point in the one cell and a point in the other, for each pair of cells."""
    order_a, order_b = np.argsort(a_cell, kind="stable"), np.argsort(b_cell, kind="stable")
    size_a, size_b = np.bincount(a_cell)[cells[0]], np.bincount(b_cell)[cells[1]]
    begin_a = np.searchsorted(a_cell[order_a], cells[0])
    begin_b = np.searchsorted(b_cell[order_b], cells[1])
    pair = np.repeat(np.arange(len(size_a)), size_a * size_b)
    nth = np.arange(len(pair)) - np.repeat(np.cumsum(size_a * size_b) - size_a * size_b, size_a * size_b)
    return order_a[begin_a[pair] + nth // size_b[pair]], order_b[begin_b[pair] + nth % size_b[pair]]
