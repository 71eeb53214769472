"""Tables of the labels that models give, how arms differ in them, and false alarms on scans without a lesion."""

from __future__ import annotations

from dataclasses import dataclass

from bushpc.metrics.registry import LABEL_METRICS
from bushpc.report.content.common import (
    FOLDS,
    METHOD,
    Summary,
    bold_note,
    bounds,
    figure,
    folds_count,
    lines,
    metric_columns,
    titled,
)
from bushpc.report.content.comparisons import common_folds
from bushpc.report.tables import Column, Entry, Number, Row, Table

_TESTED = "label_auc"  # with a p beside its difference
_CHANCE = 0.5  # AUC of guessing, whatever the labels' shares

DELONG_NOTE = (
    "AUC: DeLong's test of two AUCs on the same images, two-sided, with patients as the unit (Obuchowski 1997), as "
    "several scans of one patient are no independent evidence. It takes the models as they are: how far trainings "
    "differ is in the SD over folds."
)


def labels_table(summary: Summary) -> Table | None:
    """Label metrics of all images of an entry together, each with its interval; None where no model gives labels."""
    entries = [(line, found) for line in lines(summary) if (found := line.arm["labels"][line.source])]
    if not entries:
        return None
    metrics = [name for name in LABEL_METRICS if any(found[name] for _, found in entries)]
    columns = [METHOD, FOLDS, Column(key="images", header="Images")]
    for column in metric_columns(summary, metrics, over=""):
        columns += [
            Column(key=column.key, header="all", over=column.header, better=column.better),
            Column(key=f"{column.key}_ci95_low", header="low", over=column.header),
            Column(key=f"{column.key}_ci95_high", header="high", over=column.header),
        ]
    rows = [
        Row(
            values=(
                line.label,
                folds_count(line.arm),
                sum(found["images"].values()),
                *(value for name in metrics for value in _with_bounds(found[name])),
            ),
            ranked=line.ranked,
        )
        for line, found in entries
    ]
    first = entries[0][1]
    said = ", ".join(f"{n} {label}" for label, n in first["images"].items() if n)
    return Table(
        name="labels",
        caption="Labels of the images of all folds together, with 95 % intervals",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(
            f"Images: {said}{'' if len(entries) == 1 else ' of the first arm'}. Each is labelled by the fold that did "
            "not train on it; the most probable label counts.",
            "Interval: percentile bootstrap over patients. Folds are other models, whose probabilities need not agree, "
            "so that the AUC of all images together can be below the mean over folds.",
            *(_chance_sentence(line.label, found["label_auc"]) for line, found in entries if found["label_auc"]),
            bold_note(summary),
        ),
    )


def _with_bounds(found: Summary | None) -> tuple[Number, Number, Number]:
    if found is None:
        return Number(None), Number(None), Number(None)
    return (Number(figure(found).value), *bounds(found))


def _chance_sentence(label: str, auc: Summary) -> str:
    value, (low, high) = figure(auc), bounds(auc)
    if low.value is None or high.value is None:
        return f"{label}: AUC {value}, without an interval, so that whether it is above chance (0.5) is open."
    said = (
        "above chance (0.5)"
        if low.value > _CHANCE
        else "below chance (0.5): its labels are worse than guessed ones"
        if high.value < _CHANCE
        else "not shown to differ from chance, as the interval contains 0.5"
    )
    return f"{label}: AUC {value}, 95 % interval {low} to {high}: {said}."


def label_comparison_table(summary: Summary) -> Table | None:
    """Label metrics of each entry against the baseline's on the same images; tests of AUC and accuracy."""
    found = summary["label_comparisons"]
    if found is None:
        return None
    metrics = [name for name in LABEL_METRICS if any(row[name] for row in found["rows"])]
    columns = [METHOD, FOLDS, Column(key="images", header="Images")]
    for name in metrics:
        columns += [
            Column(key=f"{name}_difference", header="difference", over=titled(name)),
            Column(key=f"{name}_ci95_low", header="low", over=titled(name)),
            Column(key=f"{name}_ci95_high", header="high", over=titled(name)),
        ]
        if name == _TESTED:
            columns += [
                Column(key=f"{name}_p", header="p", over=titled(name)),
                Column(key=f"{name}_p_holm", header="p (Holm)", over=titled(name)),
            ]
    over = "Right alone"
    columns += [
        Column(key="better", header="here", over=over),
        Column(key="worse", header="baseline", over=over),
        Column(key="p", header="p", over="McNemar"),
        Column(key="p_holm", header="p (Holm)", over="McNemar"),
    ]
    rows = [
        Row(
            values=(
                row["label"],
                common_folds(row),
                row["images"],
                *(value for name in metrics for value in _difference(name, row[name])),
                row["mcnemar"]["better"],
                row["mcnemar"]["worse"],
                Number(row["mcnemar"]["p"], is_p=True),
                Number(row["mcnemar"]["p_holm"], is_p=True),
            )
        )
        for row in found["rows"]
    ]
    return Table(
        name="label_comparisons",
        caption=f"Labels, against {found['against']}",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(
            "Differences of the metrics of all common images together, with 95 % intervals: of AUC by DeLong's test, "
            "of the others by paired percentile bootstrap over patients. An interval that contains zero leaves open "
            "whether there is a difference.",
            DELONG_NOTE,
            "McNemar's exact test asks whether one of two arms labels more images rightly; it is of the images that "
            "only one of them labels rightly, and takes them as independent. p (Holm): adjusted for all tests of this "
            "table, of AUC and of accuracy.",
            *(
                f"{row['label']}: no AUC test, {auc['reason']}."
                for row in found["rows"]
                if (auc := row[_TESTED]) and auc["reason"]
            ),
        ),
    )


def _difference(name: str, found: Summary | None) -> tuple[Number, ...]:
    found = found or {"mean": None, "ci95": None}
    ps = [Number(found.get(key), is_p=True) for key in ("p", "p_holm")] if name == _TESTED else []
    return (Number(found["mean"]), *(Number(bound) for bound in found["ci95"] or (None, None)), *ps)


@dataclass(frozen=True, kw_only=True)
class FalseAlarms(Entry):
    """alarmed: share of the normal scans with any predicted pixel."""

    label: str
    folds: str
    images: int
    fpr: Number
    alarmed: Number


def normals_table(summary: Summary) -> Table | None:
    """What models see on scans without a lesion; None without such scans."""
    entries = [(line, found) for line in lines(summary) if (found := line.arm["normals"][line.source])]
    if not entries:
        return None
    rows = [
        FalseAlarms(
            label=line.label,
            folds=folds_count(line.arm),
            images=found["n"],
            fpr=figure(found["fpr"]),
            alarmed=figure(found["alarmed"]),
            ranked=line.ranked,
        )
        for line, found in entries
    ]
    columns = (
        METHOD,
        FOLDS,
        Column(key="images", header="Normal scans", of=lambda row: row.images),
        Column(key="fpr", header="FPR", better="low", of=lambda row: row.fpr),
        Column(key="alarmed", header="Scans with any predicted pixel", better="low", of=lambda row: row.alarmed),
    )
    notes = (
        "Normal scans have no lesion to overlap with, so Dice, IoU and what else needs one leave them out; FPR "
        "elsewhere in this report is of all images. Mean ± SD over folds.",
        bold_note(summary),
    )
    return Table.of("normals", "False alarms on normal scans", columns, rows, notes)
