"""Tables of other datasets, on all images of which every fold's model was scored (`evaluate.external`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bushpc.metrics.registry import LABEL_METRICS
from bushpc.report.published import PublishedTable
from bushpc.report.summary import Result, Summary
from bushpc.report.summary.comparison_records import Difference, ExternalComparison
from bushpc.report.summary.records import OtherDataset, set_or_none
from bushpc.report.table import Column, Number, Table
from bushpc.report.tables.common import (
    FOLDS,
    METHOD,
    OfComparison,
    Scores,
    bold_note,
    effect_number,
    folds_count,
    interval_columns,
    listed,
    metric_columns,
    numbers,
    p_columns,
    published,
    published_numbers,
    titled,
)
from bushpc.report.tables.labels import DELONG_NOTE
from bushpc.report.tables.notes import grid_notes, paper_note


def external_table(summary: Summary) -> Table | None:
    """Mean ± SD over the folds' models of each arm on each other dataset; the paper's figures below each."""
    if not summary.external:
        return None
    paper = published(summary, "external")
    rows: list[Scores] = []
    counts, leaks = [], []
    for name in summary.external:
        scored = _scored_on(summary, name)
        counts.append(f"{scored[0][1].images} images of {name}")
        rows += _rows_on(summary, name, paper)
        if leaking := [result.arm.label for result, data in scored if data.seen_by_generator]:
            leaks.append(
                f"The generator of {listed(leaking)} trained on scans of {name}: these figures are not of unseen "
                "scans, and are neither ranked nor tested."
            )
    notes = [
        f"{', '.join(counts)}. Every fold's model is scored on all of them, and none trained on any. Mean ± SD over "
        "the models: the SD shows how trainings differ, not how images differ. With the headline prompts.",
        *leaks,
        *grid_notes(summary, summary.shown_metrics),
        bold_note(summary),
    ]
    if paper:
        notes.append(paper_note(paper, summary.shown_metrics, ", and are of what it tested on"))
    return Table.of("external", "On other datasets", (METHOD, FOLDS, *metric_columns(summary)), rows, notes)


def _scored_on(summary: Summary, name: str) -> list[tuple[Result, OtherDataset]]:
    """Every arm that was scored on the dataset, under its headline prompts."""
    return [
        (result, result.arm.external[name])
        for result in summary.results
        if result.source == result.arm.headline and name in result.arm.external
    ]


def _rows_on(summary: Summary, name: str, paper: PublishedTable | None) -> Iterator[Scores]:
    for result, data in _scored_on(summary, name):
        yield Scores(
            label=result.arm.label,
            folds=folds_count(result.arm),
            figures=numbers(data.metrics, summary.shown_metrics),
            group=name,
            ranked=result.ranked and not data.seen_by_generator,
        )
    if paper:
        for method, by_dataset in paper.rows.items():
            if name in by_dataset:
                figures = published_numbers(paper, by_dataset[name], summary.shown_metrics)
                yield Scores(label=method, figures=figures, group=f"{name}: {paper.heading}", quoted=True)


@dataclass(frozen=True, kw_only=True)
class ExternalDifference(OfComparison):
    """One arm against the baseline in one metric, on one other dataset."""

    comparison: ExternalComparison
    test: Difference


_COMPARISON = (
    METHOD,
    FOLDS,
    Column(key="images", header="Images", of=lambda row: row.comparison.images),
    Column(key="mean_difference", header="Mean difference", of=lambda row: Number(row.test.mean)),
    *interval_columns(lambda row: row.test.ci95),
    Column(key="effect", header="effect r", of=lambda row: effect_number(row.test.effect)),
    *p_columns(lambda row: row.test),
)


def external_comparison_table(summary: Summary) -> Table | None:
    """Each arm against the baseline on the images of each other dataset."""
    if summary.external_comparisons is None:
        return None
    compared = summary.external_comparisons.rows
    rows = [
        ExternalDifference(comparison=row, test=row.metrics[metric], group=f"{name}: {titled(metric)}")
        for name in summary.external
        for metric in [*summary.tested_metrics, *LABEL_METRICS]
        for row in compared
        if row.data == name and metric in row.metrics
    ]
    notes = (
        "Each image counts once, with its mean metric over the folds' models, or for classification with the mean of "
        "their probabilities. So these are differences between ensembles.",
        "Interval: paired percentile bootstrap over patients, of AUC by DeLong's test. p: of masks the paired "
        "Wilcoxon signed-rank test over images, of accuracy McNemar's exact test, of AUC DeLong's; F1 and CE have "
        "their intervals. p (Holm): adjusted for all tests of this table.",
        *([DELONG_NOTE] if any("label_auc" in row.metrics for row in compared) else []),
        *(
            f"{row.label} on {row.data}: no {titled(metric)} test, {reason}."
            for row in compared
            for metric, test in row.metrics.items()
            if (reason := set_or_none(test.reason))
        ),
    )
    caption = f"On other datasets, against {summary.external_comparisons.against}"
    return Table.of("external_comparisons", caption, _COMPARISON, rows, notes)
