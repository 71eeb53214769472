"""The 2-class means are those of XBusNet's released evaluation, on masks worked by hand and against torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_f1_score,
    multiclass_jaccard_index,
    multiclass_recall,
)

from bushpc.metrics.mask import MaskPair
from bushpc.metrics.registry import METRICS, metric_of_counts

NAMES = ("dice_2class", "iou_2class", "fpr_2class", "fnr_2class")


def measured(prob: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    pair = MaskPair(prob=prob, mask=mask)
    return {name: float(METRICS[name].function(pair)) for name in NAMES}


def test_a_case_worked_by_hand() -> None:
    """4 x 4 pixels: lesion of 4, found 3 of them and 1 beside. TP 3, FP 1, FN 1, TN 11."""
    mask = np.zeros((4, 4), int)
    mask[:2, :2] = 1
    prob = mask.astype(float)
    prob[0, 0], prob[3, 3] = 0, 1
    found = measured(prob, mask)
    assert found["dice_2class"] == pytest.approx((6 / 8 + 22 / 24) / 2)
    assert found["iou_2class"] == pytest.approx((3 / 5 + 11 / 13) / 2)
    assert found["fpr_2class"] == pytest.approx((1 / (1 + 4) + 1 / (1 + 4)) / 2)  # "tn" is 2 (1 + 1)
    assert found["fnr_2class"] == pytest.approx((1 / 4 + 1 / 12) / 2)


def test_they_are_macro_means_of_two_classes_and_the_fpr_of_any_imperfect_mask_is_from_a_sixth_to_a_fifth() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        mask = (draw.random((12, 12)) < draw.uniform(0.05, 0.6)).astype(int)
        mask[0, 0] = 1
        prob = np.where(draw.random((12, 12)) < draw.uniform(0.02, 0.5), 1 - mask, mask).astype(float)
        prob[5, 5] = 1 - mask[5, 5]
        found = measured(prob, mask)
        two = (torch.from_numpy(prob.astype(int)).flatten(), torch.from_numpy(mask).flatten())
        for name, library in (
            ("dice_2class", multiclass_f1_score(*two, num_classes=2, average="macro")),
            ("iou_2class", multiclass_jaccard_index(*two, num_classes=2, average="macro")),
            ("fnr_2class", 1 - multiclass_recall(*two, num_classes=2, average="macro")),
        ):
            assert found[name] == pytest.approx(float(library), abs=1e-6)
        assert 1 / 6 - 1e-9 <= found["fpr_2class"] <= 1 / 5 + 1e-9


def test_a_perfect_mask_has_no_error_and_an_empty_reference_no_figure() -> None:
    mask = np.eye(3)
    assert list(measured(mask, mask).values()) == [1, 1, 0, 0]
    assert np.isnan(list(measured(mask, 0 * mask).values())).all()


def test_they_follow_from_the_counts_of_a_csv() -> None:
    counts = (np.array([3, 0]), np.array([1, 2]), np.array([1, 0]), np.array([11, 14]))
    assert metric_of_counts("dice_2class", *counts) == pytest.approx([(6 / 8 + 22 / 24) / 2, np.nan], nan_ok=True)
