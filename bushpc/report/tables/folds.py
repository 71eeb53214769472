"""The table of results by fold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bushpc.report.published import grid_sentence
from bushpc.report.summary import ArmSummary, Result, Summary
from bushpc.report.table import Column, Number, Table, Value
from bushpc.report.tables.common import (
    Scores,
    folds_phrase,
    metric_columns,
    ours,
    published,
    published_numbers,
    without_sd,
)
from bushpc.report.tables.notes import grid_notes


@dataclass(frozen=True, kw_only=True)
class FoldScores(Scores):
    """A fold, or the mean or SD of all. images: how many it validates on."""

    images: Value = "—"


def folds_table(summary: Summary, with_paper: bool = True) -> Table:
    """One row per fold of each entry, with missing folds named, then their mean; the paper's fold-wise table below."""
    rows: list[FoldScores] = []
    for result in summary.results:
        rows += _fold_rows(summary, result.arm, result, f"{ours(summary)}, {result.label}")
    evaluated = {result.arm.arm for result in summary.results}
    for arm in summary.arms:
        if arm.arm not in evaluated:  # without a complete fold, but its missing ones must be listed
            group = f"{ours(summary)}, {arm.label}" if summary.several else ours(summary)
            rows += _fold_rows(summary, arm, None, group)
    notes = ["Every figure is the mean over the validation images of that fold."]
    notes += grid_notes(summary, summary.shown_metrics)
    if any(arm.complete and arm.folds.expected > 1 for arm in summary.arms):
        notes.append("SD is the sample SD over folds (ddof=1).")
    paper = published(summary, "fold_wise") if with_paper else None
    if paper:
        rows += [
            FoldScores(
                label=name,
                figures=published_numbers(paper, figures, summary.shown_metrics),
                group=paper.heading,
                strong=name == "Mean",
                quoted=True,
            )
            for name, figures in paper.rows.items()
        ]
        notes.append(f"The paper's mean row is quoted, not computed. {_same_folds_as_paper(summary)}")
        notes.append(f"{paper.note} {grid_sentence(paper)}".strip())
    if not summary.complete:
        notes.append("Missing folds are listed and not averaged.")
    phrases = {folds_phrase(arm) for arm in summary.arms}
    caption = f"Results by fold ({phrases.pop()})" if len(phrases) == 1 else "Results by fold"
    columns = (
        Column(key="fold", header="Fold", numeric=False, of=lambda row: row.label),
        Column(key="images", header="Images", of=lambda row: row.images),
        *metric_columns(summary, ranked=False),
    )
    return Table.of("folds", caption, columns, rows, notes)


def _fold_rows(summary: Summary, arm: ArmSummary, result: Result | None, group: str) -> Iterator[FoldScores]:
    metrics = summary.shown_metrics
    figures = result.figures if result else {}
    missing = {fold.fold for fold in arm.folds.missing}
    for fold in sorted({*arm.folds.complete, *missing}):
        if fold in missing:
            yield FoldScores(label=f"{fold} (missing)", figures={}, group=group)
        else:
            values = {metric: Number(figures[metric].per_fold[str(fold)]) for metric in metrics}
            yield FoldScores(label=str(fold), images=arm.images[str(fold)], figures=values, group=group)
    if result is None:
        return
    yield FoldScores(
        label="Mean" if arm.complete else f"Mean over {folds_phrase(arm)}",
        images=sum(arm.images.values()),
        figures={metric: without_sd(figures[metric]) for metric in metrics},
        group=group,
        strong=True,
    )
    if any(figures[metric].sd is not None for metric in metrics):
        sds = {metric: Number(figures[metric].sd) for metric in metrics}
        yield FoldScores(label="SD", figures=sds, group=group)


def _same_folds_as_paper(summary: Summary) -> str:
    if summary.folds_source == "published":
        return (
            "The folds are those that the paper's authors published: a fold's row here and there is of the same scans, "
            "and its figures can be compared where they are the same quantity."
        )
    return "These folds are not the paper's, so only the means can be compared."
