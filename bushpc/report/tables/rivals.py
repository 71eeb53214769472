"""The table of a paper's rivals: what was measured here, and below it what the paper prints, method by method.

A published figure stands in a column only if it is that quantity; rows that are not run say why.
"""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass

from bushpc.report.published import PARAMETERS, PublishedTable, prints_metrics
from bushpc.report.summary import Result, Summary
from bushpc.report.summary.records import RivalLine
from bushpc.report.table import NOTHING, Column, Number, RowData, Table
from bushpc.report.tables.common import (
    METHOD,
    Scores,
    bold_note,
    is_transposed,
    lower_is_better,
    metric_columns,
    numbers,
    published,
    published_numbers,
    why_quoted,
)
from bushpc.report.tables.notes import grid_notes, paper_note

HERE, PAPER, NOT_RUN, NOT_DONE = "here", "paper", "not run", "not done"


@dataclass(frozen=True, kw_only=True)
class Rival(Scores):
    """A method's figures from one source. parameters: of the model that was trained, as text."""

    source: str
    parameters: str = "—"


@dataclass(frozen=True, kw_only=True)
class AcrossRivals(RowData):
    """A metric's row of the transposed table."""

    metric: str
    title: str


def rivals_table(summary: Summary) -> Table | None:
    """Every row of the paper's table in its order: ours, then the paper's; one of them where there is no other."""
    if summary.rivals is None or not summary.results or not prints_metrics(summary.rivals.paper):
        return None
    paper = published(summary, "overall")
    rows = list(_rows(summary, paper))
    caption = f"{summary.title}: every row of the paper's table"
    if is_transposed(summary):
        return _transposed(summary, rows, caption, _notes(summary, paper))
    columns = (
        METHOD,
        Column(key="source", header="Figures", numeric=False, of=lambda row: row.source),
        Column(key=PARAMETERS, header="Parameters", of=lambda row: row.parameters),
        *metric_columns(summary),
    )
    return Table.of("rivals", caption, columns, rows, _notes(summary, paper))


def _rows(summary: Summary, paper: PublishedTable | None) -> t.Iterator[Rival]:
    own = {result.arm.arm: result for result in summary.results}
    assert summary.rivals is not None
    for line in summary.rivals.lines:
        printed = [name for name in line.printed_as if paper and name in paper.rows]
        if line.arm is not None:
            yield _of_arm(summary, line, own.get(summary.arms[line.arm].arm))
        elif not printed:
            yield Rival(label=line.label, source=NOT_RUN, figures={}, ranked=False, quoted=True)
        for name in printed:
            assert paper is not None
            yield Rival(
                label=name,
                source=PAPER,
                figures=published_numbers(paper, paper.rows[name], summary.shown_metrics),
                ranked=False,
                quoted=True,
            )


def _of_arm(summary: Summary, line: RivalLine, result: Result | None) -> Rival:
    assert line.arm is not None
    count = summary.arms[line.arm].parameters
    return Rival(
        label=line.label,
        source=HERE if result else NOT_DONE,
        parameters=f"{count:,}" if count else "—",
        figures=numbers(result.figures, summary.shown_metrics) if result else {},
        ranked=bool(result and result.ranked),
    )


def _transposed(summary: Summary, rivals: list[Rival], caption: str, notes: list[str]) -> Table:
    """A row per metric; for each method a column of ours and one of the paper's, as two tasks have many metrics."""
    columns = [
        Column(key="metric", header="Metric", numeric=False, of=lambda row: row.title),
        *(
            Column(
                key=f"{rival.label} {rival.source}",
                header=rival.source,
                over=rival.label,
                ranked=rival.ranked,
                quoted=rival.quoted,
                of=functools.partial(_figure, rival),
            )
            for rival in rivals
        ),
    ]
    of_metrics = sorted(metric_columns(summary), key=lambda column: column.over)
    rows = [
        AcrossRivals(metric=column.key, title=column.header, group=column.over, better=column.better)
        for column in of_metrics
    ]
    return Table.of("rivals", caption, columns, rows, notes)


def _figure(rival: Rival, row: AcrossRivals) -> Number:
    return rival.figures.get(row.metric, NOTHING)


def _notes(summary: Summary, paper: PublishedTable | None) -> list[str]:
    assert summary.rivals is not None
    notes = [
        "Here: mean ± SD over folds.",
        *lower_is_better(summary.shown_metrics),
        *grid_notes(summary, summary.shown_metrics),
    ]
    if paper:
        notes.append(paper_note(paper, summary.shown_metrics))
    else:
        notes.append(f"The paper prints no figures of {summary.data}, so none stand beside ours.")
    notes += why_quoted((line.label, line.reason) for line in summary.rivals.lines if line.arm is None)
    return [*notes, bold_note(summary, across=is_transposed(summary))]
