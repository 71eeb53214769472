"""The table of results by fold."""

from __future__ import annotations

from bushpc.report.content.common import (
    Line,
    Summary,
    figure,
    folds_phrase,
    lines,
    metric_columns,
    ours,
    printed,
    published,
    several,
)
from bushpc.report.tables import Column, Number, Row, Table


def folds_table(summary: Summary, with_paper: bool = True) -> Table:
    """One row a fold of each entry, missing folds named, then their mean; the paper's fold-wise table below."""
    rows: list[Row] = []
    seen = []
    for line in lines(summary):
        seen.append(line.arm["arm"])
        rows += _fold_rows(summary, line.arm, line, f"{ours(summary)}, {line.label}")
    for arm in summary["arms"]:
        if arm["arm"] not in seen:  # without a complete fold, yet the missing ones must be listed
            group = f"{ours(summary)}, {arm['label']}" if several(summary) else ours(summary)
            rows += _fold_rows(summary, arm, None, group)
    notes = ["Every figure is the mean over the validation images of that fold."]
    if any(arm["complete"] and arm["folds"]["expected"] > 1 for arm in summary["arms"]):
        notes.append("SD is the sample SD over folds (ddof=1).")
    paper = published(summary, "fold_wise") if with_paper else None
    if paper:
        rows += [
            Row(
                values=(name, "—", *printed(paper, figures, summary["shown_metrics"]).values()),
                group=paper.heading,
                strong=name == "Mean",
                quoted=True,
            )
            for name, figures in paper.rows.items()
        ]
        notes.append(f"The paper's mean row is its own. {_same_folds(summary)}")
    if not summary["complete"]:
        notes.append("Missing folds are named and not averaged in.")
    phrases = {folds_phrase(arm) for arm in summary["arms"]}
    return Table(
        name="folds",
        caption=f"Results by fold ({phrases.pop()})" if len(phrases) == 1 else "Results by fold",
        columns=(
            Column(key="fold", header="Fold", numeric=False),
            Column(key="images", header="Images"),
            *metric_columns(summary, ranked=False),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _fold_rows(summary: Summary, arm: Summary, line: Line | None, group: str) -> list[Row]:
    folds, metrics = arm["folds"], summary["shown_metrics"]
    missing = {entry["fold"] for entry in folds["missing"]}
    figures = line.figures() if line else {}
    rows = []
    for fold in sorted({*folds["complete"], *missing}):
        if fold in missing:
            rows.append(Row(values=(f"{fold} (missing)", "—", *(Number(None) for _ in metrics)), group=group))
        else:
            values = (Number(figures[metric]["per_fold"][str(fold)]) for metric in metrics)
            rows.append(Row(values=(str(fold), arm["images"][str(fold)], *values), group=group))
    if line is not None:
        mean = "Mean" if arm["complete"] else f"Mean over {folds_phrase(arm)}"
        means = (Number(figure(figures[metric]).value) for metric in metrics)
        rows.append(Row(values=(mean, sum(arm["images"].values()), *means), group=group, strong=True))
        if any(figures[metric]["sd"] is not None for metric in metrics):
            sds = (Number(figures[metric]["sd"]) for metric in metrics)
            rows.append(Row(values=("SD", "—", *sds), group=group))
    return rows


def _same_folds(summary: Summary) -> str:
    if summary["folds_source"] == "published":
        return "This run used the folds that the paper's authors published, so rows can be compared one by one."
    return "This run used folds of its own, so only the means can be compared, not fold with fold."
