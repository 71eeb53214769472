"""Typed records of `summary.json`: figures, and everything about one arm.

Unless all folds of an arm are complete, `mean`, `sd` and `ci95` are null, and `partial_mean` and `partial_ci95` cover
the complete folds. So a script that collects `mean` over many runs fails on an incomplete run.
"""

from __future__ import annotations

import typing as t

import msgspec
from msgspec import UNSET, UnsetType

from bushpc.runs.chosen import Chosen

Bounds = tuple[float, float]


class Record(msgspec.Struct, kw_only=True):
    """A part of summary.json. Fields that a file has and the class lacks are ignored; UNSET fields are not written."""


def set_or_none(value: t.Any) -> t.Any:
    """The value of a field that may be UNSET."""
    return None if value is UNSET else value


class Mean(Record, kw_only=True):
    """A mean over images."""

    mean: float | None
    partial_mean: float | None

    @property
    def value(self) -> float | None:
        """The mean, or of an incomplete arm the partial one."""
        return self.mean if self.partial_mean is None else self.partial_mean


class Figure(Mean, kw_only=True):
    """Mean and SD over folds, with the value of each fold; None in `per_fold` if no image of the fold has one.

    ci95, partial_ci95: of the mean over images; UNSET where no table shows an interval. images: that have the metric;
    UNSET for label metrics.
    """

    sd: float | None
    ci95: Bounds | UnsetType | None = UNSET
    partial_ci95: Bounds | UnsetType | None = UNSET
    per_fold: dict[str, float | None]
    images: int | UnsetType = UNSET

    @property
    def bounds(self) -> Bounds | None:
        """The 95 % interval, or of an incomplete arm the partial one."""
        return set_or_none(self.ci95) or set_or_none(self.partial_ci95)


class PooledFigure(Mean, kw_only=True):
    """A figure of the images of all folds together, with its interval."""

    ci95: Bounds | None
    partial_ci95: Bounds | None

    @property
    def bounds(self) -> Bounds | None:
        return self.ci95 or self.partial_ci95


# --- a paper's table of rivals ---


class RivalLine(Record, kw_only=True):
    """A method. arm: by position; None for one that is only quoted, for this reason. printed_as: the paper's names."""

    label: str
    arm: int | None
    printed_as: list[str]
    reason: str = ""


class Rivals(Record, kw_only=True):
    """The methods of a paper's tables, in their order. paper: as its files in `report.published` begin."""

    paper: str
    lines: list[RivalLine]


# --- one arm ----------------------------------------------------------------------------------------------------


class SyntheticScans(Record, kw_only=True):
    """The synthetic scans that an arm trained on. sha256: of their manifest, by fold. real: whether real ones train."""

    ratio: float
    real: bool
    sha256: dict[str, str]


class MissingFold(Record, kw_only=True):
    cell: str
    fold: int
    reason: str


class Folds(Record, kw_only=True):
    source: str
    expected: int
    complete: list[int]
    missing: list[MissingFold]


class Source(Record, kw_only=True):
    """A prompt source that the arm was evaluated under."""

    label: str
    uses_ground_truth: bool


class Stratum(Record, kw_only=True):
    """Lesions of one range of lengths. n: how many."""

    n: int
    metrics: dict[str, Mean]


class FalseAlarms(Record, kw_only=True):
    """Of normal scans. alarmed: share of them with any predicted pixel."""

    n: int
    fpr: Figure
    alarmed: Figure


class PooledLabels(Record, kw_only=True):
    """Label metrics of the images of all folds together. images: by label. confusion: label by row, prediction by
    column. metrics: None where a metric is not defined.
    """

    images: dict[str, int]
    patients: int
    confusion: list[list[int]]
    metrics: dict[str, PooledFigure | None]


class OtherDataset(Record, kw_only=True):
    """Results on another dataset. seen_by_generator: the generator of the arm's synthetic scans trained on it."""

    images: int
    patients: int
    seen_by_generator: bool
    metrics: dict[str, Figure]


class Calibration(Record, kw_only=True):
    ece: Figure
    mean_probability: float
    lesion_share: float
    pixels: int


class SourceDifference(Record, kw_only=True):
    """One prompt source minus another, paired by image. of: which ones, in words."""

    of: str
    images: int
    patients: int
    resamples: int
    seed: int
    metrics: dict[str, PooledFigure]


class RankTest(Record, kw_only=True):
    """Wilcoxon's signed-rank test of paired differences; a positive effect is an improvement."""

    mean: float | None
    p: float | None
    effect: float | None
    n: int
    zeros: int
    reason: str | None
    p_holm: float | None = None


class Cost(Record, kw_only=True):
    """As `costs.Cost`, with the goodput."""

    cells: int
    attempts: int
    replayed_steps: int
    gpu_hours: float
    core_hours: float | None
    energy_kwh: float | None
    seconds: dict[str, float]
    goodput: float | None


class ArmSummary(Record, kw_only=True):
    """Everything about one arm. By prompt source: metrics, by_class, strata, normals, labels, calibration.

    image_size: edge, in pixels, of the square images that its network reads; None if no config says it.
    tta: its test-time augmentation, `evaluate.tta`. postprocess: see `runs.chosen`; None if none was chosen, or of
    other weights (postprocess_is_old).
    """

    arm: str
    label: str
    run: str
    model: str
    settings: dict[str, t.Any]
    parameters: int | None
    complete: bool
    synthetic: SyntheticScans | None
    folds: Folds
    headline: str
    threshold: float
    sources: dict[str, Source]
    images: dict[str, int]
    metrics: dict[str, dict[str, Figure]]
    mask_classes: list[str]
    by_class: dict[str, dict[str, dict[str, Figure]]]
    strata: dict[str, dict[str, Stratum]]
    normals: dict[str, FalseAlarms | None]
    labels: dict[str, PooledLabels | None]
    external: dict[str, OtherDataset]
    tolerance: dict[str, float]
    calibration: dict[str, Calibration] | None
    difference: SourceDifference | None
    source_tests: dict[str, RankTest]
    cost: Cost | None
    image_size: int | None = None
    tta: str = "none"
    postprocess: Chosen | None = None
    postprocess_is_old: bool = False
