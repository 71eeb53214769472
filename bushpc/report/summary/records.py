"""The content of `summary.json` as typed records: every figure of a report, from which tables and page take theirs.

Unless all folds of an arm are complete, `mean`, `sd` and `ci95` are null, and `partial_mean` and `partial_ci95` cover
the complete folds. So a script that collects `mean` over many runs fails on an incomplete run.
"""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from bushpc.errors import DataError

Bounds = tuple[float, float]


class Record(msgspec.Struct, kw_only=True):
    """A part of summary.json. Fields that a file has and the class lacks are ignored; UNSET fields are not written."""


def set_or_none(value: t.Any) -> t.Any:
    """The value of a field that may be UNSET."""
    return None if value is UNSET else value


# --- figures ----------------------------------------------------------------------------------------------------


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


# --- comparisons of arms ----------------------------------------------------------------------------------------


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


class Comparison(Record, kw_only=True):
    """One arm against the baseline. folds: complete in both, of `expected`."""

    label: str
    arm: str
    source: str
    folds: list[int]
    expected: int
    images: int
    patients: int
    metrics: dict[str, MetricTests]


class McNemarTest(Record, kw_only=True):
    """better, worse: images that only this arm, or only the baseline, labels correctly."""

    better: int
    worse: int
    p: float | None
    p_holm: float | None = None


class LabelComparison(Record, kw_only=True):
    label: str
    arm: str
    source: str
    folds: list[int]
    expected: int
    images: int
    patients: int
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


# --- the whole --------------------------------------------------------------------------------------------------


class EntryRecord(Record, kw_only=True):
    """A line of the tables: an arm, by position, under one prompt source."""

    arm: int
    source: str
    label: str
    uses_ground_truth: bool


class Result(t.NamedTuple):
    """A line of the tables: an arm under one prompt source.

    ranked: it competes for bold. Results that use the ground truth don't, nor do incomplete arms beside complete ones.
    """

    arm: ArmSummary
    source: str
    label: str
    ranked: bool

    @property
    def figures(self) -> dict[str, Figure]:
        """By metric."""
        return self.arm.metrics[self.source]


class Summary(Record, kw_only=True):
    """All figures of a report. grids: shown metric → grid that its pixels are counted on, see `metrics.registry`."""

    title: str
    kind: str
    data: str
    folds_source: str
    complete: bool
    baseline: str
    shown_metrics: list[str]
    undefined_metrics: list[str]
    tested_metrics: list[str]
    headline_metric: str
    cost: Cost | None
    entries: list[EntryRecord]
    comparisons: Against[Comparison] | None
    label_comparisons: Against[LabelComparison] | None
    external: list[str]
    external_comparisons: Against[ExternalComparison] | None
    friedman: FriedmanTest | None
    arms: list[ArmSummary]
    grids: dict[str, str] = {}

    @property
    def several(self) -> bool:
        """Whether arms are shown side by side."""
        return len(self.arms) > 1

    @property
    def results(self) -> list[Result]:
        """The lines of the tables, in order."""
        found = []
        for entry in self.entries:
            arm = self.arms[entry.arm]
            ranked = (arm.complete or not self.several) and not entry.uses_ground_truth
            found.append(Result(arm, entry.source, entry.label, ranked))
        return found

    def plain(self) -> dict[str, t.Any]:
        """The content of summary.json, of JSON types only. A single arm's figures are at the top level too."""
        content = msgspec.to_builtins(self)
        for place, key in _with_metrics(content):
            place[key] = {
                name: value
                for field, content_of in place[key].items()
                for name, value in (content_of if field == "metrics" else {field: content_of}).items()
            }
        return {**(content["arms"][0] if len(self.arms) == 1 else {}), **content}

    def to_json(self) -> str:
        return json.dumps(self.plain(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_summary(path: Path) -> Summary:
    """A summary.json of this or an older version. Raises: DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for place, key in _with_metrics(content):
            fields = place[key]
            place[key] = {name: value for name, value in fields.items() if name in _FIXED} | {
                "metrics": {name: value for name, value in fields.items() if name not in _FIXED}
            }
        return msgspec.convert(content, Summary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # msgspec's are ValueErrors
        raise DataError(f"{path} is not a readable summary ({error}). Write it again: bushpc report RUN") from error


# Fields of the records that have their metrics beside them; no metric has such a name.
_FIXED = {
    field.name
    for record in (Stratum, PooledLabels, SourceDifference, LabelComparison)
    for field in msgspec.structs.fields(record)
}


def _with_metrics(content: dict[str, t.Any]) -> list[tuple[t.Any, t.Any]]:
    """(container, key) of every record whose metrics are written beside its other fields, not one level below."""
    places: list[tuple[t.Any, t.Any]] = []
    for arm in content["arms"]:
        places += [(strata, name) for strata in arm["strata"].values() for name in strata]
        places += [(arm["labels"], source) for source, labels in arm["labels"].items() if labels]
        places += [(arm, "difference")] if arm["difference"] else []
    rows = (content["label_comparisons"] or {"rows": []})["rows"]
    return [*places, *((rows, i) for i in range(len(rows)))]
