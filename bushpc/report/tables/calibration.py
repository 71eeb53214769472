"""The table of calibration."""

from __future__ import annotations

from dataclasses import dataclass

from bushpc.report.summary import Summary
from bushpc.report.summary.records import Calibration
from bushpc.report.table import Column, Number, Table
from bushpc.report.tables.common import FOLDS, METHOD, OfResult, bold_note, number


@dataclass(frozen=True, kw_only=True)
class Calibrated(OfResult):
    """An entry whose folds were all evaluated with bins."""

    calibration: Calibration


_COLUMNS = (
    METHOD,
    FOLDS,
    Column(key="ece", header="ECE", better="low", of=lambda row: number(row.calibration.ece)),
    Column(key="mean_probability", header="Mean probability", of=lambda row: Number(row.calibration.mean_probability)),
    Column(key="lesion_share", header="Share of lesion pixels", of=lambda row: Number(row.calibration.lesion_share)),
    Column(key="pixels", header="Pixels", of=lambda row: row.calibration.pixels),
)


def calibration_table(summary: Summary) -> Table | None:
    """Expected calibration error of each entry; None where no evaluation wrote bins."""
    rows = [
        Calibrated(result=result, calibration=calibration, ranked=result.ranked)
        for result in summary.results
        if (calibration := (result.arm.calibration or {}).get(result.source))
    ]
    if not rows:
        return None
    notes = (
        "ECE: expected calibration error over 15 equal bins of the predicted probability, mean ± SD over folds. "
        "Most pixels are background, which every model predicts confidently and correctly, so ECE is small; use it to "
        "compare arms.",
        "A mean probability above the share of lesion pixels means that the model predicts too many lesion pixels.",
        bold_note(summary),
    )
    return Table.of("calibration", "Calibration of the predicted probabilities, over pixels", _COLUMNS, rows, notes)
