"""A run's validation results → what the gallery shows of each scan beside its data: Dice, and the predicted outline.

Every scan is validated once, in the fold that holds it out, so a cross-validation has a result for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bushpc.errors import DataError
from bushpc.report.gallery import Value
from bushpc.report.pictures import predicted_mask
from bushpc.report.results import Arm, Run
from bushpc.runs.layout import RunDir
from bushpc.shards.card import MOST_MASK_CLASSES
from bushpc.shards.split import read_fold_numbers


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """fields: name → key → value, the folds of the run among them. arms: whose predictions are outlined."""

    name: str
    fields: Mapping[str, Mapping[str, Value]]
    arms: Sequence[Arm]
    fold_by_key: Mapping[str, int]

    @property
    def outlines(self) -> list[str]:
        """What the outlines are called: the first mask class as each arm predicts it."""
        return [f"predicted by {arm.label}" for arm in self.arms]

    def add_to(self, mask_HW: np.ndarray, key: str, classes: int) -> np.ndarray:
        """The mask with the predictions in the bits above its classes; without one where there is no prediction."""
        for bit, arm in enumerate(self.arms, classes):
            try:
                predicted_HW = predicted_mask(arm, key, self.fold_by_key[key], mask_HW.shape)
            except (DataError, KeyError):  # not every scan is validated, and maps may have been deleted
                continue
            mask_HW = mask_HW | predicted_HW.astype(np.uint8) << bit
        return mask_HW


def results_of(run: Run, classes: int) -> RunResults:
    """classes: number of the data's mask classes; outlines of so many arms are shown as leave 8 in total.

    Raises: DataError if no fold is complete.
    """
    arms = [arm for arm in run.arms if arm.per_image is not None]
    if not arms:
        raise DataError(
            f"{run.path}: no fold is complete, so there are no results to show. See: bushpc status {run.path}"
        )
    file = RunDir(run.path).folds
    folds = read_fold_numbers(file) if file.exists() else {}
    fields: dict[str, dict[str, Value]] = {"fold": {}}
    for arm in arms:
        rows = arm.rows(arm.headline)
        name = f"Dice of {arm.label}" if len(run.arms) > 1 else "Dice"
        fields[name] = {
            key: None if math.isnan(dice) else dice for key, dice in zip(rows["key"], rows["dice"], strict=True)
        }
        folds |= dict(zip(rows["key"], rows["fold"].tolist(), strict=True))
    fields["fold"] |= folds
    return RunResults(name=run.path.name, fields=fields, arms=arms[: MOST_MASK_CLASSES - classes], fold_by_key=folds)
