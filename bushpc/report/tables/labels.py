"""Tables of the labels that models give, and of how arms differ in them."""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass

from bushpc.metrics.registry import LABEL_METRICS
from bushpc.report.summary import Summary
from bushpc.report.summary.comparison_records import Difference, LabelComparison
from bushpc.report.summary.records import PooledFigure, PooledLabels
from bushpc.report.table import Column, Number, Table
from bushpc.report.tables.common import (
    FOLDS,
    METHOD,
    OfComparison,
    OfResult,
    bold_note,
    interval_columns,
    metric_columns,
    number,
    p_columns,
    p_number,
    titled,
)

_TESTED = "label_auc"  # with a p beside its difference
_CHANCE = 0.5  # AUC of guessing, whatever the labels' shares

DELONG_NOTE = (
    "AUC: DeLong's test of two AUCs on the same images, two-sided, with patients as the unit (Obuchowski 1997), as "
    "several scans of one patient are not independent. It takes the models as given; the variance between trainings is "
    "in the SD over folds."
)


@dataclass(frozen=True, kw_only=True)
class Labelled(OfResult):
    """An entry whose model gives labels."""

    labels: PooledLabels


def labels_table(summary: Summary) -> Table | None:
    """Label metrics of all images of an entry together, each with its interval; None where no model gives labels."""
    rows = [
        Labelled(result=result, labels=labels, ranked=result.ranked)
        for result in summary.results
        if (labels := result.arm.labels[result.source])
    ]
    if not rows:
        return None
    metrics = [name for name in LABEL_METRICS if any(row.labels.metrics.get(name) for row in rows)]
    columns = [METHOD, FOLDS, Column(key="images", header="Images", of=lambda row: sum(row.labels.images.values()))]
    for column in metric_columns(summary, metrics, over=""):
        columns += [
            Column(
                key=column.key,
                header="all",
                over=column.header,
                better=column.better,
                of=functools.partial(_pooled_number, column.key),
            ),
            *interval_columns(
                functools.partial(_pooled_bounds, column.key), key=f"{column.key}_ci95", over=column.header
            ),
        ]
    counts = ", ".join(f"{n} {label}" for label, n in rows[0].labels.images.items() if n)
    notes = (
        f"Images: {counts}{'' if len(rows) == 1 else ' of the first arm'}. Each is labelled by the fold that did "
        "not train on it, with its most probable label.",
        "Interval: percentile bootstrap over patients. The folds' models may be scaled differently, so the AUC of all "
        "images together can be below the mean over folds.",
        *(_chance_sentence(row.label, auc) for row in rows if (auc := row.labels.metrics.get("label_auc"))),
        bold_note(summary),
    )
    caption = "Labels of the images of all folds together, with 95 % intervals"
    return Table.of("labels", caption, columns, rows, notes)


def _pooled_number(metric: str, row: Labelled) -> Number:
    return number(row.labels.metrics.get(metric))


def _pooled_bounds(metric: str, row: Labelled) -> t.Sequence[float] | None:
    figure = row.labels.metrics.get(metric)
    return figure.bounds if figure else None


def _chance_sentence(label: str, auc: PooledFigure) -> str:
    value = number(auc)
    if auc.bounds is None:
        return f"{label}: AUC {value}, without an interval, so it may or may not be above chance (0.5)."
    low, high = auc.bounds
    verdict = (
        "above chance (0.5)"
        if low > _CHANCE
        else "below chance (0.5): worse than guessing"
        if high < _CHANCE
        else "not shown to differ from chance, as the interval contains 0.5"
    )
    return f"{label}: AUC {value}, 95 % interval {Number(low)} to {Number(high)}: {verdict}."


@dataclass(frozen=True, kw_only=True)
class LabelDifferences(OfComparison):
    """One arm against the baseline."""

    comparison: LabelComparison

    def difference(self, metric: str) -> Difference | None:
        return self.comparison.metrics.get(metric)


def label_comparison_table(summary: Summary) -> Table | None:
    """Label metrics of each entry against the baseline's on the same images; tests of AUC and accuracy."""
    if summary.label_comparisons is None:
        return None
    rows = [LabelDifferences(comparison=row) for row in summary.label_comparisons.rows]
    metrics = [name for name in LABEL_METRICS if any(row.difference(name) for row in rows)]
    columns = [METHOD, FOLDS, Column(key="images", header="Images", of=lambda row: row.comparison.images)]
    for name in metrics:
        columns += _difference_columns(name)
    right_alone = "Right alone"
    columns += [
        Column(key="better", header="here", over=right_alone, of=lambda row: row.comparison.mcnemar.better),
        Column(key="worse", header="baseline", over=right_alone, of=lambda row: row.comparison.mcnemar.worse),
        *p_columns(lambda row: row.comparison.mcnemar, over="McNemar"),
    ]
    notes = (
        "Differences of the metrics of all common images together, with 95 % intervals: of AUC by DeLong's test, "
        "of the others by paired percentile bootstrap over patients. If an interval contains zero, there may be "
        "no difference.",
        DELONG_NOTE,
        "McNemar's exact test asks whether one of two arms labels more images correctly; it uses the images that "
        "only one of them labels correctly, and takes them as independent. p (Holm): adjusted for all tests of this "
        "table, of AUC and of accuracy.",
        *(
            f"{row.label}: no AUC test, {auc.reason}."
            for row in rows
            if (auc := row.difference(_TESTED)) and auc.reason
        ),
    )
    return Table.of("label_comparisons", f"Labels, against {summary.label_comparisons.against}", columns, rows, notes)


def _difference_columns(metric: str) -> list[Column]:
    over = titled(metric)
    columns = [
        Column(
            key=f"{metric}_difference", header="difference", over=over, of=functools.partial(_difference_number, metric)
        ),
        *interval_columns(functools.partial(_difference_bounds, metric), key=f"{metric}_ci95", over=over),
    ]
    if metric == _TESTED:
        columns += [
            Column(key=f"{metric}_p", header="p", over=over, of=lambda row: _auc_p(row, "p")),
            Column(key=f"{metric}_p_holm", header="p (Holm)", over=over, of=lambda row: _auc_p(row, "p_holm")),
        ]
    return columns


def _difference_number(metric: str, row: LabelDifferences) -> Number:
    difference = row.difference(metric)
    return Number(difference.mean if difference else None)


def _difference_bounds(metric: str, row: LabelDifferences) -> t.Sequence[float] | None:
    difference = row.difference(metric)
    return difference.ci95 if difference else None


def _auc_p(row: LabelDifferences, which: t.Literal["p", "p_holm"]) -> Number:
    auc = row.difference(_TESTED)
    return p_number((auc.p if which == "p" else auc.p_holm) if auc else None)
