"""Mask metrics of one image at a time, as XBusNet (section 2.4) defines them. Numpy only.

Prediction.prob_BKHW, Batch.mask_BKHW → per-image numbers → the evaluator's CSV
"""

from __future__ import annotations

import typing as t

import numpy as np

EPSILON = 1e-8  # in every denominator, section 2.4


class Confusion(t.NamedTuple):
    """Pixel counts per image, int64, of the shape that is left when height and width are summed over."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


def confusion(prob: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> Confusion:
    """Counts TP, FP, FN, TN of 1{prob >= threshold} against `mask`; the last two axes are height and width.

    prob: floats in [0, 1]. mask: 0 or 1, same shape. A probability that is not a number would compare as
    "no lesion" and score like a prediction; a model that makes one is broken, so it is refused.
    """
    prob, mask = np.asarray(prob), np.asarray(mask)
    assert prob.shape == mask.shape, f"prob {prob.shape} and mask {mask.shape} differ"
    assert np.isfinite(prob).all(), "the probability map holds values that are not finite"
    predicted, actual = prob >= threshold, mask.astype(bool)
    assert (actual == mask).all(), "the mask holds values other than 0 and 1"

    def count(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(pixels.sum(axis=(-2, -1), dtype=np.int64))

    return Confusion(
        tp=count(predicted & actual),
        fp=count(predicted & ~actual),
        fn=count(~predicted & actual),
        tn=count(~predicted & ~actual),
    )


def dice(counts: Confusion) -> np.ndarray:
    """2 TP / (2 TP + FP + FN); NaN without a lesion in the reference, see `mask_metrics`."""
    return _ratio(
        2 * counts.tp,
        2 * counts.tp + counts.fp + counts.fn,
        defined=counts.tp + counts.fn > 0,
    )


def iou(counts: Confusion) -> np.ndarray:
    """TP / (TP + FP + FN); NaN without a lesion in the reference, see `mask_metrics`."""
    return _ratio(counts.tp, counts.tp + counts.fp + counts.fn, defined=counts.tp + counts.fn > 0)


def fpr(counts: Confusion) -> np.ndarray:
    """FP / (FP + TN): the share of the background that is called lesion; NaN without any background."""
    return _ratio(counts.fp, counts.fp + counts.tn, defined=counts.fp + counts.tn > 0)


def fnr(counts: Confusion) -> np.ndarray:
    """FN / (FN + TP): the share of the lesion that is missed; NaN without a lesion in the reference."""
    return _ratio(counts.fn, counts.fn + counts.tp, defined=counts.tp + counts.fn > 0)


def mask_metrics(prob: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> dict[str, np.ndarray]:
    """`dice`, `iou`, `fpr` and `fnr` per image: arrays of the shape that precedes height and width.

    An image whose reference mask is empty has no overlap to measure: with the bare formula the best
    possible prediction (nothing) would score Dice 0 but FNR 0, worst and best at once. Dice, IoU and FNR
    are NaN there, so that an average either leaves the image out on purpose (nanmean) or shows that it
    did not; FPR stays defined and tells about false alarms.
    """
    counts = confusion(prob, mask, threshold)
    return {
        "dice": dice(counts),
        "iou": iou(counts),
        "fpr": fpr(counts),
        "fnr": fnr(counts),
    }


def lesion_length(mask: np.ndarray) -> int:
    """Longest side, in pixels, of the bounding box around all foreground of one H x W mask; 0 if empty.

    The measure behind XBusNet's size strata (Table 2), at whatever resolution the mask is handed in.
    """
    rows, columns = np.nonzero(mask)
    if rows.size == 0:
        return 0
    return int(max(np.ptp(rows), np.ptp(columns))) + 1


def _ratio(numerator: np.ndarray, denominator: np.ndarray, *, defined: np.ndarray) -> np.ndarray:
    return np.where(defined, numerator / (denominator + EPSILON), np.nan)
