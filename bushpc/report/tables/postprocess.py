"""Table of post-processing: what was chosen for each fold on the other folds, and the figures before and after."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bushpc.metrics.registry import METRICS
from bushpc.report.summary import Summary
from bushpc.report.table import Column, Number, RowData, Table
from bushpc.report.tables.common import lower_is_better, without_grid
from bushpc.runs.chosen import Chosen, FoldChoice

_SIDES = ("plain", "chosen")


@dataclass(frozen=True, kw_only=True)
class Choice(RowData):
    """A fold, or the mean over all. figures: (metric, plain | chosen) → number."""

    label: str
    rule: str
    figures: dict[tuple[str, str], Number]


def postprocess_table(summary: Summary) -> Table | None:
    """One row per fold of each arm for which a post-processing was chosen, then the mean over folds."""
    arms = [(arm.label, arm.postprocess) for arm in summary.arms if arm.postprocess]
    if not arms:
        return None
    measured = {name for _, chosen in arms for fold in chosen.folds for name in fold.plain}
    metrics = [name for name in summary.shown_metrics if name in measured]
    columns = [
        Column(key="fold", header="Fold", numeric=False, of=lambda row: row.label),
        Column(key="rule", header="Chosen on the other folds", numeric=False, of=lambda row: row.rule),
        *(
            Column(
                key=f"{metric}_{which}",
                header=header,
                over=f"{without_grid(metric)}, {METRICS[metric].grid} grid",
                of=functools.partial(_figure, (metric, which)),
            )
            for metric in metrics
            for which, header in (("plain", "plain"), ("chosen", "after"))
        ),
    ]
    rows = [row for label, chosen in arms for row in _rows(label if summary.several else "", chosen, metrics)]
    return Table.of("postprocess", "Post-processing of masks", columns, rows, _notes(summary, arms, metrics))


def _figure(key: tuple[str, str], row: Choice) -> Number:
    return row.figures[key]


def _rows(group: str, chosen: Chosen, metrics: list[str]) -> Iterator[Choice]:
    for each in chosen.folds:
        figures = {(name, which): Number(_value(each, name, which)) for name in metrics for which in _SIDES}
        yield Choice(label=str(each.fold), rule=each.rule.words, figures=figures, group=group)
    means = {(name, which): Number(_mean(chosen, name, which)) for name in metrics for which in _SIDES}
    yield Choice(label="Mean", rule="—", figures=means, group=group, strong=True)


def _value(fold: FoldChoice, metric: str, which: str) -> float | None:
    return (fold.plain if which == "plain" else fold.chosen).get(metric)


def _mean(chosen: Chosen, metric: str, which: str) -> float | None:
    values = [value for fold in chosen.folds if (value := _value(fold, metric, which)) is not None]
    return float(np.mean(values)) if values else None


def _notes(summary: Summary, arms: list[tuple[str, Chosen]], metrics: list[str]) -> list[str]:
    tried = max(chosen.candidates for _, chosen in arms)
    notes = [
        f"Of {tried} rules, the one with the best mean Dice on the other folds' out-of-fold predictions; plain unless "
        "another is better. No fold has a say in its own rule. Parts touch at sides or corners; sizes are shares of "
        "the image's area.",
        *(
            f"{f'{label}: for' if summary.several else 'For'} new images, chosen on all folds: {chosen.for_all.words}; "
            "`bushpc predict` and exports apply it."
            for label, chosen in arms
        ),
        *lower_is_better(metrics),
    ]
    apart = max(chosen.largest_difference for _, chosen in arms)
    if apart > 1e-4:
        notes.append(
            "Masks come from the kept 8-bit probability maps; the plain Dice of an image differs from the evaluation "
            f"by up to {apart:.4f}."
        )
    return notes
