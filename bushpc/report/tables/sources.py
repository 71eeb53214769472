"""Tables of prompt sources: every arm under each of them, and what the ground-truth prompt gains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bushpc.metrics.registry import METRICS
from bushpc.report.summary import Summary
from bushpc.report.summary.records import PooledFigure, RankTest
from bushpc.report.table import NOTHING, Column, Number, RowData, Table
from bushpc.report.tables.common import (
    FOLDS,
    TestedScores,
    bold_note,
    folds_count,
    folds_phrase,
    interval_columns,
    listed,
    metric_columns,
    numbers,
    same_folds,
    titled,
    without_sd,
)
from bushpc.report.tables.notes import grid_notes


@dataclass(frozen=True, kw_only=True)
class Prompted(TestedScores):
    """An arm under one prompt source. test: of the headline metric against the headline source."""

    test: RankTest | None = None

    @property
    def difference(self) -> Number:
        return Number(self.test.mean) if self.test else NOTHING


def sources_table(summary: Summary) -> Table | None:
    """Every arm under every prompt source; None unless an arm was evaluated under more than its headline source."""
    if not summary.several or all(len(arm.sources) < 2 for arm in summary.arms):
        return None
    metric = summary.headline_metric
    over = f"{titled(metric)} vs headline"
    columns = (
        Column(key="source", header="Prompts", numeric=False, of=lambda row: row.label),
        replace(FOLDS, only_if=not same_folds(summary)),
        *metric_columns(summary),
        Column(key=f"{metric}_difference", header="difference", over=over, of=lambda row: row.difference),
        Column(key=f"{metric}_effect", header="r", over=over, of=lambda row: row.effect),
        Column(key=f"{metric}_p_holm", header="p (Holm)", over=over, of=lambda row: row.p),
    )
    notes = (
        "Mean ± SD over folds. The rows of an arm have the same weights and differ in the prompts only.",
        f"Difference: of {titled(metric)} from the arm's headline source, mean over images; r and p: "
        "paired Wilcoxon signed-rank test over images, its rank-biserial correlation, adjusted for all tests of "
        "this table.",
        *grid_notes(summary, summary.shown_metrics),
        bold_note(summary, [source for arm in summary.arms for source in arm.sources.values()]),
    )
    return Table.of("sources", "Every arm by prompt source", columns, _prompted(summary), notes)


def _prompted(summary: Summary) -> Iterator[Prompted]:
    for arm in summary.arms:
        for name, source in arm.sources.items():
            yield Prompted(
                label=source.label,
                folds=folds_count(arm),
                figures=numbers(arm.metrics[name], summary.shown_metrics),
                test=arm.source_tests.get(name),
                group=arm.label,
                ranked=not source.uses_ground_truth,
            )


@dataclass(frozen=True, kw_only=True)
class MetricDifference(RowData):
    """The difference in one metric."""

    metric: str
    difference: PooledFigure


_DIFFERENCE = (
    Column(key="metric", header="Metric", numeric=False, of=lambda row: titled(row.metric)),
    Column(key="mean_difference", header="Mean difference", of=lambda row: without_sd(row.difference)),
    *interval_columns(lambda row: row.difference.bounds),
)


def difference_table(summary: Summary) -> Table | None:
    """Oracle minus first pass, paired by image, of a run of one arm."""
    arm = summary.arms[0]
    if arm.difference is None or summary.several:
        return None
    metrics = [metric for metric in summary.shown_metrics if metric in arm.difference.metrics]
    rows = [MetricDifference(metric=metric, difference=arm.difference.metrics[metric]) for metric in metrics]
    signs = [
        f"{sign} {listed(names)}"
        for sign, names in (
            ("Positive", [titled(metric) for metric in metrics if METRICS[metric].more_is_better]),
            ("negative", [titled(metric) for metric in metrics if not METRICS[metric].more_is_better]),
        )
        if names
    ]
    caption = f"{arm.sources['oracle'].label} minus first_pass, paired by image ({folds_phrase(arm)})"
    notes = (
        f"{arm.difference.images} images of {arm.difference.patients} patients. Percentile bootstrap over patients, "
        f"{arm.difference.resamples} resamples, seed {arm.difference.seed}.",
        f"{', '.join(signs)}: the ground-truth prompt helped. If an interval contains zero, it may not have helped.",
        *grid_notes(summary, metrics),
    )
    return Table.of("difference", caption, _DIFFERENCE, rows, notes)
