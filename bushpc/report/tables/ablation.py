"""The ablation table: a grid's rows by what they switch or set, with the paper's figures."""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass, replace

from bushpc.metrics.registry import LABEL_METRICS, TWO_CLASS
from bushpc.report.published import PARAMETERS, PublishedTable, grid_sentence, tables_of
from bushpc.report.summary import ArmSummary, Summary
from bushpc.report.table import Column, Number, Table, Value
from bushpc.report.tables.common import (
    FOLDS,
    METHOD,
    Scores,
    bold_note,
    folds_count,
    is_transposed,
    metric_columns,
    numbers,
    ours,
    published,
    published_numbers,
    same_folds,
)
from bushpc.report.tables.notes import grid_notes, has_grid, paper_note
from bushpc.report.tables.transposed import short, shown_setting, transposed_table

_MOST_BESIDE = 3  # metrics of a paper that fit to the right of as many of ours


@dataclass(frozen=True, kw_only=True)
class Ablated(Scores):
    """A row of a grid, or of the paper's table.

    settings: what it switches or sets. parameters: how many the model has, as text.
    paper, paper_parameters: the paper's figures of the same row, where they stand to the right of ours.
    """

    settings: t.Mapping[str, t.Any]
    parameters: str = "—"
    paper: t.Mapping[str, Number]
    paper_parameters: str = "—"


def ablation_table(summary: Summary) -> Table | None:
    """A grid's rows by what they switch or set, in the shape of the paper's table. The paper's figures stand to the
    right of ours where there are few (XBusNet's Table 4), below them where there are many (hybrid attention's Table 2).
    """
    settings = list(summary.arms[0].settings)
    if summary.kind != "grid" or not settings or summary.rivals:
        return None
    paper = published(summary, "ablation")
    theirs = _by_row(summary, paper, settings)
    paper = paper if theirs else None
    metrics = _ablation_metrics(summary, settings)
    if is_transposed(summary):
        return transposed_table(
            summary,
            name="ablation",
            caption=summary.title,
            metrics=metrics,
            paper=paper,
            notes=_ablation_notes(summary, paper, metrics, beside=False),
            settings=settings,
        )
    printed = [metric for metric in metrics if paper and metric in paper.metrics] or metrics
    beside = paper is not None and len(printed) <= _MOST_BESIDE
    switches = all(isinstance(arm.settings[key], bool) for arm in summary.arms for key in settings)
    paper_counts = paper is not None and PARAMETERS in paper.metrics
    columns = (
        # Rows of switches need no name, other rows do.
        replace(METHOD, only_if=not switches or (paper is not None and not beside)),
        *(
            Column(key=key, header=short(key), numeric=False, of=functools.partial(_setting_of, key))
            for key in settings
        ),
        replace(FOLDS, only_if=len(printed) <= _MOST_BESIDE or not same_folds(summary)),
        Column(
            key=PARAMETERS,
            header="Parameters",
            of=lambda row: row.parameters,
            only_if=any(arm.parameters for arm in summary.arms) or (paper_counts and not beside),
        ),
        *metric_columns(summary, metrics, over=ours(summary) if beside or not paper else None),
        *(_paper_columns(summary, paper, printed, paper_counts) if paper and beside else ()),
    )
    rows = [*_our_rows(summary, paper, theirs, metrics, beside=beside)]
    if paper:
        rows += _paper_rows(summary, paper, theirs, metrics, beside=beside, switches=switches)
    return Table.of("ablation", summary.title, columns, rows, _ablation_notes(summary, paper, metrics, beside))


def _setting_of(key: str, row: Ablated) -> Value:
    return shown_setting(row.settings.get(key))


def _paper_columns(summary: Summary, paper: PublishedTable, metrics: list[str], counts: bool) -> list[Column]:
    return [
        Column(
            key=f"paper_{PARAMETERS}",
            header="Parameters",
            over=paper.name,
            of=lambda row: row.paper_parameters,
            only_if=counts,
        ),
        *(
            Column(
                key=f"paper_{column.key}",
                header=column.header,
                over=paper.name,
                of=functools.partial(_paper_figure, column.key),
            )
            for column in metric_columns(summary, metrics)
        ),
    ]


def _paper_figure(metric: str, row: Ablated) -> Number:
    return row.paper[metric]


def _our_rows(
    summary: Summary, paper: PublishedTable | None, theirs: dict[str, str], metrics: list[str], *, beside: bool
) -> t.Iterator[Ablated]:
    own = {result.arm.arm: result for result in summary.results}
    for arm in summary.arms:
        result = own.get(arm.arm)
        row = paper.rows.get(theirs.get(arm.arm, ""), {}) if paper and beside else {}
        yield Ablated(
            label=arm.label,
            settings=arm.settings,
            folds=folds_count(arm),
            parameters=_count(arm.parameters),
            figures=numbers(result.figures, metrics) if result else {},
            paper=published_numbers(paper, row, metrics) if paper and beside else {},
            paper_parameters=_count(row.get(PARAMETERS)),
            group="" if beside or not paper else ours(summary),
            ranked=bool(result and result.ranked),
        )


def _paper_rows(
    summary: Summary,
    paper: PublishedTable,
    theirs: dict[str, str],
    metrics: list[str],
    *,
    beside: bool,
    switches: bool,
) -> t.Iterator[Ablated]:
    """The paper's rows; where its figures stand to the right of ours, only those that none of ours has."""
    matched = {theirs[arm.arm]: arm.settings for arm in summary.arms if arm.arm in theirs}
    for name, row in paper.rows.items():
        if beside and not (switches and name not in matched):
            continue
        figures = published_numbers(paper, row, metrics)
        yield Ablated(
            label=name,
            settings={**matched.get(name, {}), **row},
            parameters="—" if beside else _count(row.get(PARAMETERS)),
            figures={} if beside else figures,
            paper=figures,
            paper_parameters=_count(row.get(PARAMETERS)),
            group="" if beside else paper.heading,
            ranked=False,
            quoted=True,
        )


def _ablation_notes(summary: Summary, paper: PublishedTable | None, metrics: list[str], beside: bool) -> list[str]:
    notes = ["Mean ± SD over folds.", *grid_notes(summary, metrics), bold_note(summary, across=is_transposed(summary))]
    if paper and beside:
        source = f"{paper.name}: {paper.printed}, not computed here: {paper.citation}. {paper.note}".strip()
        notes.append(f"{source} {grid_sentence(paper)}" if has_grid(metrics) else source)
    elif paper:
        notes.append(paper_note(paper, metrics))
    return notes


def _ablation_metrics(summary: Summary, settings: list[str]) -> list[str]:
    """What the paper's table of these rows prints, whatever its dataset; else what is tested, and of labels all."""
    shown = summary.shown_metrics
    tables = [table for arm in summary.arms for table in tables_of(arm.model, "ablation")]
    shapes = [table for table in tables if _by_row(summary, table, settings)]
    printed = shapes[0].metrics if shapes else ()
    lesions = [metric.removesuffix(TWO_CLASS) for metric in printed]  # the lesion's own before its mean with another
    shape = [metric for metric in dict.fromkeys([*lesions, *printed]) if metric in shown]
    return shape or [metric for metric in shown if metric in LABEL_METRICS or metric in summary.tested_metrics]


def _by_row(summary: Summary, paper: PublishedTable | None, settings: list[str]) -> dict[str, str]:
    """Our arm → the paper's row that names it or else has the same settings; settings that neither states are equal."""
    matches = {}
    for name, row in paper.rows.items() if paper else ():
        for arm in summary.arms:
            if arm.arm in _named(row) or _has_settings_of(row, arm, settings):
                matches[arm.arm] = name
    return matches


def _named(row: t.Mapping[str, t.Any]) -> list[str]:
    """The names that a paper's row has in our grids."""
    names = row.get("row", [])
    return [names] if isinstance(names, str) else names


def _has_settings_of(row: t.Mapping[str, t.Any], arm: ArmSummary, settings: list[str]) -> bool:
    states_any = any(key in row for key in settings)
    return states_any and all(row.get(key) == arm.settings[key] for key in settings)


def _count(parameters: int | None) -> str:
    return f"{parameters:,}" if parameters else "—"
