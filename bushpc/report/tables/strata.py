"""The table of results by lesion length."""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass, replace

from bushpc.report.published import grid_sentence
from bushpc.report.summary import Summary
from bushpc.report.table import NOTHING, Number, RowData, Table
from bushpc.report.tables.common import (
    METHOD,
    bold_note,
    folds_phrase,
    metric_columns,
    number,
    ours,
    published,
    published_numbers,
)
from bushpc.report.tables.notes import grid_notes

_EN_DASH = "\u2013"


@dataclass(frozen=True, kw_only=True)
class ByLength(RowData):
    """A method with its figures. figures: by stratum and metric."""

    label: str
    figures: t.Mapping[str, t.Mapping[str, Number]]


def strata_table(summary: Summary) -> Table | None:
    """Dice and IoU by lesion length for each entry, the paper's table below."""
    results = summary.results
    if not results:
        return None
    counts = [{name: stratum.n for name, stratum in result.arm.strata[result.source].items()} for result in results]
    same_lesions = all(count == counts[0] for count in counts)
    metrics = list(next(iter(results[0].arm.strata[results[0].source].values())).metrics)
    if not metrics:  # the models give labels alone
        return None
    strata = list(counts[0])
    columns = [METHOD]
    for name, n in counts[0].items():
        over = f"{name.replace('-', _EN_DASH)} px" + (f" (n = {n})" if same_lesions else "")
        columns += [
            replace(column, key=f"{name}_{column.key}", of=functools.partial(_figure, name, column.key))
            for column in metric_columns(summary, metrics, over=over)
        ]
    if summary.several:
        group = f"{ours(summary)}, images of all complete folds together"
    else:
        group = f"{ours(summary)}, images of {folds_phrase(summary.arms[0])} together"
    rows = [
        ByLength(
            label=result.label,
            figures={
                name: {metric: number(figure) for metric, figure in stratum.metrics.items()}
                for name, stratum in result.arm.strata[result.source].items()
            },
            group=group,
            ranked=result.ranked,
        )
        for result in results
    ]
    notes = [
        "Length is the longest side of the lesion's bounding box in pixels of the original image"
        + ("; n counts the lesions here." if same_lesions else "; arms that miss folds have fewer lesions.")
        + " Figures are means over images.",
        *grid_notes(summary, metrics),
        bold_note(summary),
    ]
    paper = published(summary, "strata")
    if paper:
        rows += [
            ByLength(
                label=method,
                figures={name: published_numbers(paper, figures.get(name, {}), metrics) for name in strata},
                group=paper.heading,
                quoted=True,
            )
            for method, figures in paper.rows.items()
        ]
        notes.append(
            "The paper does not define its length nor print its n; its rows were not computed here. "
            + f"{paper.note} {grid_sentence(paper)}".strip()
        )
    return Table.of("strata", "Results by lesion length", columns, rows, notes)


def _figure(stratum: str, metric: str, row: ByLength) -> Number:
    return row.figures[stratum].get(metric, NOTHING)
