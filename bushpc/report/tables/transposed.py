"""The transposed table: one row per metric and one column per method, for models of two tasks."""

from __future__ import annotations

import functools
import typing as t
from collections.abc import Sequence
from dataclasses import dataclass, field

from bushpc.metrics.registry import LABEL_METRICS
from bushpc.report.published import PublishedTable
from bushpc.report.summary import ArmSummary, Result, Summary
from bushpc.report.summary.records import Bounds
from bushpc.report.table import NOTHING, Column, Number, RowData, Table, Value
from bushpc.report.tables.common import (
    bound,
    folds_count,
    metric_columns,
    numbers,
    ours,
    published_numbers,
    same_folds,
)

_ENDS: tuple[tuple[t.Literal[0, 1], str], ...] = ((0, "low"), (1, "high"))


class Method(t.NamedTuple):
    """A column of the table. result: None for an arm without a complete fold, whose column is still shown."""

    label: str
    arm: ArmSummary
    result: Result | None


@dataclass(frozen=True, kw_only=True)
class Across(RowData):
    """A row of the table: its title, and what it says of a method, of an interval and of a paper's row."""

    title: str
    of_method: t.Callable[[Method], Value]
    of_interval: t.Callable[[t.Literal[0, 1]], Value] = field(default=lambda side: "")
    of_paper: t.Callable[[t.Mapping[str, t.Any]], Value] = field(default=lambda figures: "")


def transposed_table(
    summary: Summary,
    *,
    name: str,
    caption: str,
    metrics: list[str],
    paper: PublishedTable | None,
    notes: list[str],
    settings: Sequence[str] = (),
) -> Table:
    """A row per metric, grouped by task; a column per entry, then the paper's. settings: rows above the metrics."""
    methods = [Method(result.label, result.arm, result) for result in summary.results]
    evaluated = {method.arm.arm for method in methods}
    methods += [Method(arm.label, arm, None) for arm in summary.arms if arm.arm not in evaluated]
    only = methods[0].result if len(methods) == 1 else None
    own = f"{ours(summary)}, mean{' ± SD' if summary.complete else ''} over folds"
    columns = [
        Column(key="metric", header="Metric", numeric=False, of=lambda row: row.title),
        *(
            Column(
                key=method.label,
                header=method.label,
                over=own,
                ranked=method.result is not None and method.result.ranked,
                of=functools.partial(_of_method, method),
            )
            for method in methods
        ),
        *(
            Column(
                key=f"ci95_{end}",
                header=end,
                over="95 % interval",
                ranked=False,
                of=functools.partial(_of_interval, side),
                only_if=only is not None,
            )
            for side, end in _ENDS
        ),
        *(
            Column(
                key=f"paper_{title}",
                header=title,
                over=paper.heading,
                quoted=True,
                of=functools.partial(_of_paper, figures),
            )
            for title, figures in (paper.rows.items() if paper else ())
            if paper
        ),
    ]
    rows = [
        *(_setting_row(key) for key in settings),
        *([] if same_folds(summary) else [Across(title="Folds", of_method=lambda method: folds_count(method.arm))]),
        *(
            _metric_row(column, only, paper)
            for column in sorted(metric_columns(summary, metrics), key=lambda column: column.over)
        ),
    ]
    return Table.of(name, caption, columns, rows, notes)


def _of_method(method: Method, row: Across) -> Value:
    return row.of_method(method)


def _of_interval(side: t.Literal[0, 1], row: Across) -> Value:
    return row.of_interval(side)


def _of_paper(figures: t.Mapping[str, t.Any], row: Across) -> Value:
    return row.of_paper(figures)


def _setting_row(key: str) -> Across:
    return Across(
        title=short(key),
        of_method=lambda method: shown_setting(method.arm.settings[key]),
        of_paper=lambda figures: shown_setting(figures[key]) if key in figures else "",
        group="Settings",
    )


def _metric_row(column: Column, only: Result | None, paper: PublishedTable | None) -> Across:
    """column: of the metric, as other tables have it."""
    metric = column.key

    def of_method(method: Method) -> Number:
        return numbers(method.result.figures, [metric])[metric] if method.result else NOTHING

    def of_interval(side: t.Literal[0, 1]) -> Number:
        assert only is not None, "the columns are left out without it"
        return bound(interval_of(only, metric), side)

    def of_paper(figures: t.Mapping[str, t.Any]) -> Number:
        assert paper is not None, "the columns are left out without it"
        return published_numbers(paper, figures, [metric])[metric]

    return Across(
        title=column.header,
        of_method=of_method,
        of_interval=of_interval,
        of_paper=of_paper,
        group=column.over,
        better=column.better,
    )


def interval_of(result: Result, metric: str) -> Bounds | None:
    """Of a label metric over all images together, of other metrics of the mean over images."""
    if metric not in LABEL_METRICS:
        return result.figures[metric].bounds
    labels = result.arm.labels[result.source]
    pooled = labels.metrics.get(metric) if labels else None
    return pooled.bounds if pooled else None


def shown_setting(value: object) -> Value:
    """A setting as tables show it."""
    return value if isinstance(value, bool) else "—" if value is None else str(value)


def short(key: str) -> str:
    """`model.lfe` → LFE, since papers write their parts in capitals; longer names stay as they are."""
    name = key.rpartition(".")[2]
    return name.upper() if len(name) <= 4 else name
