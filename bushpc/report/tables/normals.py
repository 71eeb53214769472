"""The table of false alarms on scans without a lesion."""

from __future__ import annotations

from dataclasses import dataclass

from bushpc.report.summary import Summary
from bushpc.report.summary.records import FalseAlarms
from bushpc.report.table import Column, Table
from bushpc.report.tables.common import FOLDS, METHOD, OfResult, bold_note, number


@dataclass(frozen=True, kw_only=True)
class OnNormals(OfResult):
    """An entry on normal scans."""

    alarms: FalseAlarms


_COLUMNS = (
    METHOD,
    FOLDS,
    Column(key="images", header="Normal scans", of=lambda row: row.alarms.n),
    Column(key="fpr", header="FPR", better="low", of=lambda row: number(row.alarms.fpr)),
    Column(
        key="alarmed",
        header="Scans with any predicted pixel",
        better="low",
        of=lambda row: number(row.alarms.alarmed),
    ),
)


def normals_table(summary: Summary) -> Table | None:
    """What models predict on scans without a lesion; None without such scans."""
    rows = [
        OnNormals(result=result, alarms=alarms, ranked=result.ranked)
        for result in summary.results
        if (alarms := result.arm.normals[result.source])
    ]
    if not rows:
        return None
    notes = (
        "Normal scans have no lesion to overlap with, so Dice, IoU and other metrics that need one leave them out; FPR "
        "in other tables covers all images. Mean ± SD over folds.",
        bold_note(summary),
    )
    return Table.of("normals", "False alarms on normal scans", _COLUMNS, rows, notes)
