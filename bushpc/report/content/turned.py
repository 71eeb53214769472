"""The turned table: one row per metric and one column per method, for models of two tasks."""

from __future__ import annotations

from collections.abc import Sequence

from bushpc.metrics.registry import LABEL_METRICS
from bushpc.report.content.common import (
    Line,
    Summary,
    bounds,
    figure,
    folds_count,
    lines,
    metric_columns,
    ours,
    printed,
    same_folds,
)
from bushpc.report.published import PublishedTable
from bushpc.report.tables import Column, Number, Row, Table, Value


def turned_table(
    summary: Summary,
    *,
    name: str,
    caption: str,
    metrics: list[str],
    paper: PublishedTable | None,
    notes: list[str],
    settings: Sequence[str] = (),
) -> Table:
    """A row a metric by task, a column an entry, then the paper's. settings: that stand above the metrics."""
    entries: list[tuple[str, Summary, Line | None]] = [(line.label, line.arm, line) for line in lines(summary)]
    evaluated = {arm["arm"] for _, arm, _ in entries}
    # Without a complete fold, yet a column that is not there would not be missed.
    entries += [(arm["label"], arm, None) for arm in summary["arms"] if arm["arm"] not in evaluated]
    alone = entries[0][2] if len(entries) == 1 else None
    own = f"{ours(summary)}, mean{' ± SD' if summary['complete'] else ''} over folds"
    columns = [Column(key="metric", header="Metric", numeric=False)]
    columns += [
        Column(key=label, header=label, over=own, ranked=line is not None and line.ranked) for label, _, line in entries
    ]
    if alone:
        columns += [
            Column(key=f"ci95_{end}", header=end, over="95 % interval", ranked=False) for end in ("low", "high")
        ]
    quoted = paper.rows if paper else {}
    columns += [
        Column(key=f"paper_{said}", header=said, over=paper.heading, quoted=True)
        for said in quoted
        if paper is not None
    ]

    empty: list[Value] = ["", ""] if alone else []
    rows = [
        Row(
            values=(
                short(key),
                *(shown_setting(arm["settings"][key]) for _, arm, _ in entries),
                *empty,
                *(shown_setting(figures[key]) if key in figures else "" for figures in quoted.values()),
            ),
            group="Settings",
        )
        for key in settings
    ]
    if not same_folds(summary):
        counts = (folds_count(arm) for _, arm, _ in entries)
        rows.append(Row(values=("Folds", *counts, *empty, *[""] * len(quoted))))
    for column in sorted(metric_columns(summary, metrics), key=lambda column: column.over):
        rows.append(
            Row(
                values=(
                    column.header,
                    *(figure(line.figures()[column.key]) if line else Number(None) for _, _, line in entries),
                    *(interval_of(alone, column.key) if alone else ()),
                    *(printed(paper, figures, [column.key])[column.key] for figures in quoted.values() if paper),
                ),
                group=column.over,
                better=column.better,
            )
        )
    return Table(name=name, caption=caption, columns=tuple(columns), rows=tuple(rows), notes=tuple(notes))


def interval_of(line: Line, metric: str) -> tuple[Number, Number]:
    """Of a label metric of all images together, and of the mean over images of another."""
    labels = line.arm["labels"][line.source] or {}
    found = labels.get(metric) if metric in LABEL_METRICS else line.figures()[metric]
    return bounds(found or {})


def shown_setting(value: object) -> Value:
    return value if isinstance(value, bool) else "—" if value is None else str(value)


def short(key: str) -> str:
    """`model.lfe` → LFE: papers name their parts in capitals; a longer name is left as it is written."""
    name = key.rpartition(".")[2]
    return name.upper() if len(name) <= 4 else name
