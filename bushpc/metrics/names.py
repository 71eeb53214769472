"""The metrics by name: what config may ask for, evaluation writes and the report shows. One list for all of them.

config `evaluate.metrics` → evaluate: a column of per_image.csv each → report: a column of the tables each
"""

from __future__ import annotations

import typing as t


class Metric(t.NamedTuple):
    """One metric. title: as a table's head says it. unit: "mm", "px" or "". low, high: the values it can take."""

    title: str
    unit: str
    more_is_better: bool
    low: float
    high: float


INFINITE = float("inf")

# Of one image each: of generators, which compute them themselves (`Prediction.scores`).
SCORE_METRICS = {
    "denoising_mse": Metric("Denoising MSE", "", False, 0.0, INFINITE),
    "reconstruction_mse": Metric("Reconstruction MSE", "", False, 0.0, INFINITE),
}

# Of one image each: `mask_metrics`, `surface_metrics` and `betti_error`; and those.
IMAGE_METRICS = {
    "dice": Metric("Dice", "", True, 0.0, 1.0),
    "iou": Metric("IoU", "", True, 0.0, 1.0),
    "fpr": Metric("FPR", "", False, 0.0, 1.0),
    "fnr": Metric("FNR", "", False, 0.0, 1.0),
    "sensitivity": Metric("Sensitivity", "", True, 0.0, 1.0),
    "specificity": Metric("Specificity", "", True, 0.0, 1.0),
    "precision": Metric("Precision", "", True, 0.0, 1.0),
    "accuracy": Metric("Pixel accuracy", "", True, 0.0, 1.0),
    "bce": Metric("BCE", "", False, 0.0, INFINITE),
    "hd95_mm": Metric("HD95", "mm", False, 0.0, INFINITE),
    "hd95_px": Metric("HD95", "px", False, 0.0, INFINITE),
    "nsd_mm": Metric("NSD, tolerance in mm", "", True, 0.0, 1.0),
    "nsd_px": Metric("NSD, tolerance in px", "", True, 0.0, 1.0),
    "betti_error": Metric("Betti error", "", False, 0.0, INFINITE),
    **SCORE_METRICS,
}
# Every per_image.csv has these, whatever else was asked for.
ALWAYS = ("dice", "iou", "fpr", "fnr")

# Of a set of images: `label_metrics`.
LABEL_METRICS = {
    "label_accuracy": Metric("Accuracy", "", True, 0.0, 1.0),
    "label_f1": Metric("F1", "", True, 0.0, 1.0),
    "label_auc": Metric("AUC", "", True, 0.0, 1.0),
    "label_ce": Metric("CE", "", False, 0.0, INFINITE),
}

METRICS = IMAGE_METRICS | LABEL_METRICS
