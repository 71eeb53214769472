"""Typed records of `summary.json`: how arms differ."""

from __future__ import annotations

import typing as t

from msgspec import UNSET, UnsetType

from bushpc.report.summary.records import Bounds, Record


class Difference(Record, kw_only=True):
    """Difference from the baseline over all common images. UNSET where there is no test of the metric."""

    mean: float
    ci95: Bounds | None
    partial_ci95: Bounds | None
    p: float | UnsetType | None = UNSET
    effect: float | UnsetType | None = UNSET
    n: int | UnsetType = UNSET
    zeros: int | UnsetType = UNSET
    reason: str | UnsetType | None = UNSET
    p_holm: float | UnsetType | None = UNSET

    @property
    def tested(self) -> bool:
        """Whether the metric has a test."""
        return self.p is not UNSET


class ImageTest(Record, kw_only=True):
    """The same over the images of all common folds, with the interval of the mean difference."""

    mean: float | None
    ci95: Bounds | None
    p: float | None
    effect: float | None
    n: int
    zeros: int
    reason: str | None
    images: int
    p_holm: float | None = None


class FoldTest(Record, kw_only=True):
    """Nadeau and Bengio's corrected resampled t-test of fold means."""

    mean: float | None
    ci95: Bounds | None
    t: float | None
    df: int | None
    p: float | None
    reason: str | None
    p_holm: float | None = None


class MetricTests(Record, kw_only=True):
    images: ImageTest
    folds: FoldTest


class Compared(Record, kw_only=True):
    """One arm against the baseline. folds: complete in both, of `expected`."""

    label: str
    arm: str
    source: str
    folds: list[int]
    expected: int
    images: int
    patients: int


class Comparison(Compared, kw_only=True):
    metrics: dict[str, MetricTests]


class McNemarTest(Record, kw_only=True):
    """better, worse: images that only this arm, or only the baseline, labels correctly."""

    better: int
    worse: int
    p: float | None
    p_holm: float | None = None


class LabelComparison(Compared, kw_only=True):
    metrics: dict[str, Difference | None]
    mcnemar: McNemarTest


class ExternalComparison(Record, kw_only=True):
    """data: the other dataset."""

    label: str
    arm: str
    data: str
    folds: list[int]
    expected: int
    images: int
    metrics: dict[str, Difference]


Row = t.TypeVar("Row")


class Against(Record, t.Generic[Row], kw_only=True):
    """Comparisons with one baseline. against: its label."""

    against: str
    rows: list[Row]


class FriedmanTest(Record, kw_only=True):
    """Friedman's test of all arms with Nemenyi's p of each pair, of the headline metric."""

    metric: str
    labels: list[str]
    folds: list[int]
    images: int
    chi2: float | None
    p: float | None
    ranks: list[float]
    nemenyi: list[list[float]] | None
    reason: str | None
