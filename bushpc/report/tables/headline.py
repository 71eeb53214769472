"""Tables of the overall result: mean ± SD over folds with interval and test, for the page and for a terminal."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from bushpc.metrics.registry import LABEL_METRICS, METRICS
from bushpc.report.published import PublishedTable
from bushpc.report.summary import Summary
from bushpc.report.summary.comparison_records import Difference, ImageTest
from bushpc.report.summary.records import Bounds
from bushpc.report.table import Column, Table
from bushpc.report.tables.common import (
    FOLDS,
    METHOD,
    TestedScores,
    folds_count,
    interval_columns,
    is_transposed,
    metric_columns,
    numbers,
    published,
    published_numbers,
    same_folds,
    titled,
)
from bushpc.report.tables.notes import against, headline_group, headline_notes, tests_of, threshold
from bushpc.report.tables.transposed import interval_of, transposed_table


@dataclass(frozen=True, kw_only=True)
class Headline(TestedScores):
    """bounds: 95 % interval of the headline metric. test: of it against the baseline."""

    bounds: Bounds | None = None


def headline_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means for each entry with its interval, p and effect size; the paper's table below."""
    if not summary.results:
        return None
    paper = None if summary.rivals else published(summary, "overall")  # their own table has the paper's rows
    notes = headline_notes(summary, paper)
    if is_transposed(summary):
        return transposed_table(
            summary,
            name="headline",
            caption=f"Results at {threshold(summary)} on validation images",
            metrics=summary.shown_metrics,
            paper=paper,
            notes=notes,
        )
    metric, tests = summary.headline_metric, tests_of(summary)
    interval, versus = f"{titled(metric)}, 95 % interval", f"{titled(metric)} vs baseline"
    columns = (
        METHOD,
        replace(FOLDS, only_if=not same_folds(summary)),
        *metric_columns(summary),
        *interval_columns(lambda row: row.bounds, key=f"{metric}_ci95", over=interval),
        Column(
            key=f"{metric}_effect",
            header="r",
            over=versus,
            of=lambda row: row.effect,
            only_if=summary.comparisons is not None,
        ),
        Column(key=f"{metric}_p_holm", header="p (Holm)", over=versus, of=lambda row: row.p, only_if=bool(tests)),
    )
    rows = [*_headlines(summary, tests), *_published_headlines(summary, paper)]
    return Table.of("headline", _task(summary), columns, rows, notes)


def _headlines(summary: Summary, tests: dict[str, ImageTest | Difference]) -> t.Iterator[Headline]:
    group = headline_group(summary)
    for result in summary.results:
        yield Headline(
            label=result.label,
            folds=folds_count(result.arm),
            figures=numbers(result.figures, summary.shown_metrics),
            bounds=interval_of(result, summary.headline_metric),
            test=tests.get(result.label),
            group=group,
            ranked=result.ranked,
        )
    for arm in summary.arms:
        if summary.several and not arm.sources:
            yield Headline(label=arm.label, folds=folds_count(arm), figures={}, group=group, ranked=False)


def _published_headlines(summary: Summary, paper: PublishedTable | None) -> t.Iterator[Headline]:
    if paper:
        for name, row in paper.rows.items():
            figures = published_numbers(paper, row, summary.shown_metrics)
            yield Headline(label=name, figures=figures, group=paper.heading, quoted=True)


def _task(summary: Summary) -> str:
    tested = set(summary.tested_metrics)
    if not tested:
        return "Classification of validation images"
    if all(METRICS[metric].of == "pixels" for metric in tested):
        return "Validation images as the model itself scores them"
    return f"Segmentation at {threshold(summary)} on validation images"


def overview_table(summary: Summary) -> Table | None:
    """The same for a terminal, which has no room for every column; None for one arm, whose folds are shown there."""
    if not summary.several:
        return None
    tests = tests_of(summary)
    tested = bool(tests or summary.tested_metrics)
    metrics = _few(summary)
    rows = [
        Headline(
            label=result.label,
            folds=folds_count(result.arm),
            figures=numbers(result.figures, metrics),
            test=tests.get(result.label),
            ranked=result.ranked,
        )
        for result in summary.results
    ]
    caption = f"{summary.title}: mean ± SD over folds"
    if tested:
        caption += f"; p (Holm) of {titled(summary.headline_metric)} against {against(summary)}"
    columns = (
        METHOD,
        FOLDS,
        *metric_columns(summary, metrics, over=""),
        Column(key="p", header="p", of=lambda row: row.p, only_if=tested),
    )
    return Table.of("overview", caption, columns, rows)


def _few(summary: Summary) -> list[str]:
    """Metrics for where there is room for few: one a task, then more of what is tested."""
    label = [metric for metric in summary.shown_metrics if metric in LABEL_METRICS]
    tested = [metric for metric in summary.tested_metrics if metric in summary.shown_metrics]
    tested.sort(key=lambda metric: metric != summary.headline_metric)
    return [*label[: 1 if tested else 2], *tested[: 1 if label else 2]]
