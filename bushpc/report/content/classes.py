"""The table of results by mask class."""

from __future__ import annotations

import typing as t
from dataclasses import replace

from bushpc.metrics.registry import IMAGE_METRICS
from bushpc.report.content.common import (
    FOLDS,
    METHOD,
    Scores,
    Summary,
    bold_note,
    classes_of,
    figures_of,
    folds_count,
    lines,
    lower_is_better,
    metric_columns,
    printed,
    published,
    same_folds,
)
from bushpc.report.content.notes import coverage, headline_group, threshold
from bushpc.report.published import PublishedTable
from bushpc.report.tables import Table


def classes_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means of each entry for each mask class by itself; the paper's table below each."""
    classes = classes_of(summary)
    metrics = [metric for metric in summary["shown_metrics"] if metric in IMAGE_METRICS]
    if not classes or not metrics:
        return None
    paper = published(summary, "by_class")
    columns = (METHOD, replace(FOLDS, only_if=not same_folds(summary)), *metric_columns(summary, metrics, over=""))
    rows = [row for name in classes for row in _of_class(summary, name, metrics, paper)]
    caption = f"Results by mask class at {threshold(summary)} on validation images"
    return Table.of("classes", caption, columns, rows, _class_notes(summary, classes, metrics, paper))


def _of_class(summary: Summary, name: str, metrics: list[str], paper: PublishedTable | None) -> t.Iterator[Scores]:
    for line in lines(summary):
        yield Scores(
            label=line.label,
            folds=folds_count(line.arm),
            figures=figures_of(line.arm["by_class"][line.source].get(name, {}), metrics),
            group=f"{name}: {headline_group(summary)}",
            ranked=line.ranked,
        )
    for method, figures in paper.rows.items() if paper else ():
        assert paper is not None
        shown = printed(paper, figures.get(name, {}), metrics)
        yield Scores(label=method, figures=shown, group=f"{name}: {paper.heading}", quoted=True)


def _class_notes(
    summary: Summary, classes: list[str], metrics: list[str], paper: PublishedTable | None
) -> t.Iterator[str]:
    yield from lower_is_better(metrics)
    for name in classes:
        of_class = [(line.arm, line.arm["by_class"][line.source].get(name, {})) for line in lines(summary)]
        yield from (f"{name}: {said}" for said in coverage(metrics, of_class, name))
    if not summary["complete"]:
        yield "Folds are missing: there these are means over the complete ones only, without SD, and no final result."
    if paper:
        yield f"The paper's rows were not computed here: {paper.citation}."
    yield bold_note(summary)
