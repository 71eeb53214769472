"""The table of results by mask class."""

from __future__ import annotations

import typing as t
from dataclasses import replace

from bushpc.metrics.registry import IMAGE_METRICS
from bushpc.report.published import PublishedTable
from bushpc.report.summary import Summary
from bushpc.report.table import Table
from bushpc.report.tables.common import (
    FOLDS,
    METHOD,
    Scores,
    bold_note,
    classes_of,
    folds_count,
    lower_is_better,
    metric_columns,
    numbers,
    published,
    published_numbers,
    same_folds,
)
from bushpc.report.tables.notes import coverage, grid_notes, headline_group, paper_note, threshold


def classes_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means of each entry for each mask class by itself; the paper's table below each."""
    classes = classes_of(summary)
    metrics = [metric for metric in summary.shown_metrics if metric in IMAGE_METRICS]
    if not classes or not metrics:
        return None
    paper = published(summary, "by_class")
    columns = (METHOD, replace(FOLDS, only_if=not same_folds(summary)), *metric_columns(summary, metrics, over=""))
    rows = [row for name in classes for row in _of_class(summary, name, metrics, paper)]
    caption = f"Results by mask class at {threshold(summary)} on validation images"
    return Table.of("classes", caption, columns, rows, _class_notes(summary, classes, metrics, paper))


def _of_class(summary: Summary, name: str, metrics: list[str], paper: PublishedTable | None) -> t.Iterator[Scores]:
    for result in summary.results:
        yield Scores(
            label=result.label,
            folds=folds_count(result.arm),
            figures=numbers(result.arm.by_class[result.source].get(name, {}), metrics),
            group=f"{name}: {headline_group(summary)}",
            ranked=result.ranked,
        )
    if paper:
        for method, by_class in paper.rows.items():
            figures = published_numbers(paper, by_class.get(name, {}), metrics)
            yield Scores(label=method, figures=figures, group=f"{name}: {paper.heading}", quoted=True)


def _class_notes(
    summary: Summary, classes: list[str], metrics: list[str], paper: PublishedTable | None
) -> t.Iterator[str]:
    yield from lower_is_better(metrics)
    yield from grid_notes(summary, metrics)
    for name in classes:
        of_class = [(result.arm, result.arm.by_class[result.source].get(name, {})) for result in summary.results]
        yield from (f"{name}: {sentence}" for sentence in coverage(metrics, of_class, name))
    if not summary.complete:
        yield "Folds are missing: means are over the complete folds, without SD, and not final."
    if paper:
        yield paper_note(paper, metrics)
    yield bold_note(summary)
