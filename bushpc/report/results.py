"""The results of a run in memory: its arms, their cells, and the frames of each cell. Read by `read_run`."""

from __future__ import annotations

import typing as t
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from bushpc.conditions import Variant
from bushpc.runs.chosen import Chosen
from bushpc.runs.goodput import Attempt, Goodput
from bushpc.runs.layout import CellDir
from bushpc.runs.run_record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The content of `metrics.jsonl`: one value per step. If a resume repeated steps, the later lines count.

    loss, dice: training loss and validation Dice, indexed by step.
    unreadable: number of lines that are not complete JSON, as a kill in the middle of a write leaves them.
    """

    loss: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    dice: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    unreadable: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One fold of an arm. If the cell is incomplete, `per_image` is None and `reason` says why.

    per_image: one row per key and prompt source, with the columns of the file and one for every image metric and label
    probability; NaN if the evaluation wrote none or it is undefined. With several mask classes, an image metric is the
    mean over the classes, and each class has a column of its own, see `of_class`.
    calibration: rows of `calibration.csv`; None if the evaluation wrote none.
    external: dataset of `evaluate.external` → rows in the same form; empty while the cell is incomplete.
    step, parameters: from `DONE`; None while the cell is incomplete, or if `DONE` doesn't have them.
    goodput: how its time was spent; None before its first start.
    trained_in: folder of the cell that trained these weights, "" if it is this one.
    config: text of the cell's composed config, None if it was never written.
    settings: the config, `train.lr` → value, with defaults for missing settings; empty if it can't be read.
    """

    name: str
    fold: int
    hash: str
    folder: CellDir
    per_image: pd.DataFrame | None
    calibration: pd.DataFrame | None
    external: dict[str, pd.DataFrame]
    reason: str | None
    curve: Curve
    step: int | None
    parameters: int | None
    attempts: Sequence[Attempt]
    goodput: Goodput | None
    trained_in: str
    config: str | None
    settings: dict[str, t.Any]

    @property
    def complete(self) -> bool:
        return self.per_image is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """What gets one result: a cross-validation, or a row of a grid.

    run: the record of its run. name: unique within the report. label: as shown. given: the settings that its grid row
    states. cells: in order of fold.
    variants: the evaluation variants that its run declares, by name, in the order in which they are shown.
    sources: names of the variants that were evaluated, in that order; empty if no cell is complete.
    headline: the prompt source of the arm's main result.
    threshold: pixels with at least this probability count as lesion; 0.5 in the paper (2.4).
    metrics: names of the metrics to show, in order (`evaluate.metrics`, on the grids of `evaluate.resolution`).
    tta: its test-time augmentation (`evaluate.tta`).
    chosen: its post-processing, by `bushpc postprocess`; None if there is none, or one of other weights.
    choice_is_old: whether there is one of other weights.
    classes: names of the mask classes that were measured separately; empty if the data has only one.
    tolerance: of the normalised surface distance, for nsd_mm and nsd_px, if the config states it.
    generator_saw: datasets of `evaluate.external` on which the generator of its synthetic scans trained.
    per_image: rows of all complete cells, None if there is none.
    """

    run: RunRecord
    name: str
    label: str
    model: str
    given: dict[str, t.Any]
    cells: list[Cell]
    variants: dict[str, Variant]
    sources: list[str]
    headline: str
    threshold: float
    metrics: tuple[str, ...]
    tta: str
    chosen: Chosen | None
    choice_is_old: bool
    classes: tuple[str, ...]
    tolerance: dict[str, float]
    generator_saw: frozenset[str]
    per_image: pd.DataFrame | None

    def source_label(self, source: str) -> str:
        """The label of a prompt source; if the only one is `none`, the model takes no prompts."""
        return "no prompts" if self.sources == ["none"] else self.variants[source].label

    def uses_ground_truth(self, source: str) -> bool:
        """Whether its conditions come from the mask to be predicted; such results never compete with others."""
        return self.variants[source].uses_ground_truth

    @property
    def complete_cells(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.complete]

    @property
    def missing_cells(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.complete]

    @property
    def complete(self) -> bool:
        return not self.missing_cells

    def rows(self, source: str) -> pd.DataFrame:
        """Per-image rows of one prompt source. Only for arms with a complete cell."""
        assert self.per_image is not None, "an arm without a complete cell has no prompt sources"
        return self.per_image[self.per_image["prompts"] == source]

    @property
    def calibration(self) -> pd.DataFrame | None:
        """Rows of all complete cells with their fold; None unless every complete cell has them."""
        frames = [
            cell.calibration.assign(fold=cell.fold) for cell in self.complete_cells if cell.calibration is not None
        ]
        return pd.concat(frames, ignore_index=True) if frames and len(frames) == len(self.complete_cells) else None

    @property
    def external(self) -> dict[str, pd.DataFrame]:
        """Dataset → rows of all complete cells, for datasets that all of them have; `fold` is that of the model."""
        cells = self.complete_cells
        names = [name for name in (cells[0].external if cells else ()) if all(name in cell.external for cell in cells)]
        return {name: pd.concat([cell.external[name] for cell in cells], ignore_index=True) for name in names}


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run folder, read and checked. record: its run.json. baseline: the arm that others are compared with."""

    path: Path
    record: RunRecord
    arms: list[Arm]
    baseline: Arm
