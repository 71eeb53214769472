"""Tables of prompt sources: every arm under each of them, and what the ground-truth prompt gains."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from bushpc.metrics.registry import METRICS
from bushpc.report.content.common import (
    FOLDS,
    Scores,
    Summary,
    bold_note,
    bounds,
    figure,
    figures_of,
    folds_count,
    folds_phrase,
    listed,
    metric_columns,
    same_folds,
    several,
    titled,
)
from bushpc.report.tables import Column, Number, Row, Table


@dataclass(frozen=True, kw_only=True)
class Prompted(Scores):
    """An arm under one prompt source. difference, effect, p: of the headline metric against the headline source."""

    difference: Number
    effect: Number
    p: Number


def sources_table(summary: Summary) -> Table | None:
    """Every arm under every prompt source, where arms were evaluated under more than the one they are judged by."""
    if not several(summary) or all(len(arm["sources"]) < 2 for arm in summary["arms"]):
        return None
    metric = summary["headline_metric"]
    over = f"{titled(metric)} vs headline"
    columns = (
        Column(key="source", header="Prompts", numeric=False, of=lambda row: row.label),
        replace(FOLDS, only_if=not same_folds(summary)),
        *metric_columns(summary),
        Column(key=f"{metric}_difference", header="difference", over=over, of=lambda row: row.difference),
        Column(key=f"{metric}_effect", header="r", over=over, of=lambda row: row.effect),
        Column(key=f"{metric}_p_holm", header="p (Holm)", over=over, of=lambda row: row.p),
    )
    notes = (
        "Mean ± SD over folds; of one arm the same weights, only the sentence differs.",
        f"Difference: of {titled(metric)} from the source that the arm is judged by, mean over images; r and p: "
        "paired Wilcoxon signed-rank test over images, its rank-biserial correlation, adjusted for all tests of "
        "this table.",
        bold_note(summary, [source for arm in summary["arms"] for source in arm["sources"].values()]),
    )
    return Table.of("sources", "Every arm by prompt source", columns, _prompted(summary), notes)


def _prompted(summary: Summary) -> t.Iterator[Prompted]:
    for arm in summary["arms"]:
        for name, source in arm["sources"].items():
            test = arm["source_tests"].get(name, {})
            yield Prompted(
                label=source["label"],
                folds=folds_count(arm),
                figures=figures_of(arm["metrics"][name], summary["shown_metrics"]),
                difference=Number(test.get("mean")),
                effect=Number(test.get("effect"), decimals=2),
                p=Number(test.get("p_holm"), is_p=True),
                group=arm["label"],
                ranked=not source["uses_ground_truth"],
            )


def difference_table(summary: Summary) -> Table | None:
    """Oracle minus first pass, paired by image, of a run of one arm."""
    arm = summary["arms"][0]
    found = arm["difference"]
    if found is None or several(summary):
        return None
    metrics = [metric for metric in summary["shown_metrics"] if metric in found]
    rows = [
        Row(values=(titled(metric), Number(figure(found[metric]).value), *bounds(found[metric]))) for metric in metrics
    ]
    helped = [
        f"{said} {listed(names)}"
        for said, names in (
            ("Positive", [titled(metric) for metric in metrics if METRICS[metric].more_is_better]),
            ("negative", [titled(metric) for metric in metrics if not METRICS[metric].more_is_better]),
        )
        if names
    ]
    return Table(
        name="difference",
        caption=f"{arm['sources']['oracle']['label']} minus first_pass, paired by image ({folds_phrase(arm)})",
        columns=(
            Column(key="metric", header="Metric", numeric=False),
            Column(key="mean_difference", header="Mean difference"),
            Column(key="ci95_low", header="low", over="95 % interval"),
            Column(key="ci95_high", header="high", over="95 % interval"),
        ),
        rows=tuple(rows),
        notes=(
            f"{found['images']} images of {found['patients']} patients. Percentile bootstrap over patients, "
            f"{found['resamples']} resamples, seed {found['seed']}.",
            f"{', '.join(helped)}: the ground-truth prompt helped. An interval that contains "
            "zero leaves open whether it did.",
        ),
    )
