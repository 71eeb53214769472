"""The table of calibration."""

from __future__ import annotations

from dataclasses import dataclass

from bushpc.report.content.common import (
    FOLDS,
    METHOD,
    Summary,
    bold_note,
    figure,
    folds_count,
    lines,
)
from bushpc.report.tables import Column, Entry, Number, Table


@dataclass(frozen=True, kw_only=True)
class Calibrated(Entry):
    label: str
    folds: str
    ece: Number
    mean_probability: Number
    lesion_share: Number
    pixels: int


def calibration_table(summary: Summary) -> Table | None:
    """Expected calibration error of each entry whose folds were all evaluated with bins."""
    rows = [
        Calibrated(
            label=line.label,
            folds=folds_count(line.arm),
            ece=figure(found["ece"]),
            mean_probability=Number(found["mean_probability"]),
            lesion_share=Number(found["lesion_share"]),
            pixels=found["pixels"],
            ranked=line.ranked,
        )
        for line in lines(summary)
        if (found := (line.arm["calibration"] or {}).get(line.source))
    ]
    if not rows:
        return None
    columns = (
        METHOD,
        FOLDS,
        Column(key="ece", header="ECE", better="low", of=lambda row: row.ece),
        Column(key="mean_probability", header="Mean probability", of=lambda row: row.mean_probability),
        Column(key="lesion_share", header="Share of lesion pixels", of=lambda row: row.lesion_share),
        Column(key="pixels", header="Pixels", of=lambda row: row.pixels),
    )
    notes = (
        "ECE: expected calibration error over 15 equal bins of the predicted probability, mean ± SD over folds. "
        "Most pixels are background, on which every model is sure and right, so it is small; compare arms with it.",
        "A mean probability above the share of lesion pixels means that too much is called lesion.",
        bold_note(summary),
    )
    return Table.of("calibration", "Calibration of the predicted probabilities, over pixels", columns, rows, notes)
