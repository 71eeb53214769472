"""Tables of other datasets, on all of whose images every fold's model was scored (`evaluate.external`)."""

from __future__ import annotations

from bushpc.metrics.registry import LABEL_METRICS
from bushpc.report.content.common import (
    FOLDS,
    METHOD,
    Scores,
    Summary,
    bold_note,
    figures_of,
    folds_count,
    lines,
    listed,
    metric_columns,
    printed,
    published,
    titled,
)
from bushpc.report.content.comparisons import common_folds
from bushpc.report.content.labels import DELONG_NOTE
from bushpc.report.tables import Column, Number, Row, Table


def external_table(summary: Summary) -> Table | None:
    """Mean ± SD over the folds' models of each arm on each other dataset; the paper's figures below each."""
    if not summary["external"]:
        return None
    shown = summary["shown_metrics"]
    paper = published(summary, "external")
    rows: list[Scores] = []
    counts, leaks = [], []
    for name in summary["external"]:
        judged = [line for line in lines(summary) if line.source == line.arm["headline"]]
        found = [(line, line.arm["external"][name]) for line in judged if name in line.arm["external"]]
        counts.append(f"{found[0][1]['images']} images of {name}")
        rows += [
            Scores(
                label=line.arm["label"],
                folds=folds_count(line.arm),
                figures=figures_of(there["metrics"], shown),
                group=name,
                ranked=line.ranked and not there["seen_by_generator"],
            )
            for line, there in found
        ]
        if leaking := [line.arm["label"] for line, there in found if there["seen_by_generator"]]:
            leaks.append(
                f"The generator of {listed(leaking)} trained on scans of {name}: these figures are not of unseen "
                "scans, and are neither ranked nor tested."
            )
        quoted = {said: figures[name] for said, figures in (paper.rows if paper else {}).items() if name in figures}
        rows += [
            Scores(label=said, figures=printed(paper, figures, shown), group=f"{name}: {paper.heading}", quoted=True)
            for said, figures in quoted.items()
            if paper
        ]
    notes = [
        f"{', '.join(counts)}. Every fold's model is scored on all of them, and none trained on any: mean ± SD over "
        "the models, which says how far trainings differ and not how far images do. Under the headline prompts.",
        *leaks,
        bold_note(summary),
    ]
    if paper:
        notes.append(f"The paper's rows were not computed here, and are of what it tested on: {paper.citation}.")
    return Table.of("external", "On other datasets", (METHOD, FOLDS, *metric_columns(summary)), rows, notes)


def external_comparison_table(summary: Summary) -> Table | None:
    """Each arm against the baseline on the images of each other dataset."""
    found = summary["external_comparisons"]
    if found is None:
        return None
    rows = [
        Row(
            values=(
                row["label"],
                common_folds(row),
                row["images"],
                Number(test["mean"]),
                *(Number(bound) for bound in test["ci95"] or (None, None)),
                Number(test.get("effect"), decimals=2),
                Number(test.get("p"), is_p=True),
                Number(test.get("p_holm"), is_p=True),
            ),
            group=f"{name}: {titled(metric)}",
        )
        for name in summary["external"]
        for metric in [*summary["tested_metrics"], *LABEL_METRICS]
        for row in found["rows"]
        if row["data"] == name and (test := row["metrics"].get(metric))
    ]
    return Table(
        name="external_comparisons",
        caption=f"On other datasets, against {found['against']}",
        columns=(
            METHOD,
            FOLDS,
            Column(key="images", header="Images"),
            Column(key="mean_difference", header="Mean difference"),
            Column(key="ci95_low", header="low", over="95 % interval"),
            Column(key="ci95_high", header="high", over="95 % interval"),
            Column(key="effect", header="effect r"),
            Column(key="p", header="p"),
            Column(key="p_holm", header="p (Holm)"),
        ),
        rows=tuple(rows),
        notes=(
            "An image counts once, with the mean over the folds' models of its metric; of classification with the mean "
            "of their probabilities, so that these are differences of the models together.",
            "Interval: paired percentile bootstrap over patients, of AUC by DeLong's test. p: of masks the paired "
            "Wilcoxon signed-rank test over images, of accuracy McNemar's exact test, of AUC DeLong's; F1 and CE have "
            "their intervals. p (Holm): adjusted for all tests of this table.",
            *([DELONG_NOTE] if any("label_auc" in row["metrics"] for row in found["rows"]) else []),
            *(
                f"{row['label']} on {row['data']}: no {titled(metric)} test, {test['reason']}."
                for row in found["rows"]
                for metric, test in row["metrics"].items()
                if test.get("reason")
            ),
        ),
    )
