"""Mask metrics of one image at a time: overlap as XBusNet (section 2.4) defines it, distances of surfaces, topology.

Prediction.prob_BKHW, Batch.mask_BKHW → per-image numbers → the evaluator's CSV
"""

from __future__ import annotations

import typing as t
import warnings

import numpy as np
from scipy import ndimage

EPSILON = 1e-8  # in every denominator, section 2.4
LEAST_PROB = 1e-7  # within the logarithm: one pixel of probability 0 would make the mean infinite


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
    """Overlap metrics per image, by their names in `bushpc.metrics.names`: arrays of the shape before height and width.

    An image whose reference mask is empty has no overlap to measure: with the bare formula the best
    possible prediction (nothing) would score Dice 0 but FNR 0, worst and best at once. Dice, IoU, FNR, sensitivity and
    precision are NaN there, so that an average either leaves the image out on purpose (nanmean) or shows that it
    did not; FPR, specificity, accuracy and BCE stay defined and tell about false alarms. Precision is 0 where a lesion
    is there and nothing is predicted. Sensitivity (recall), precision, specificity and accuracy are the hybrid
    attention paper's eq. 20 to 24; BCE is the mean over pixels of the SAM multi-task paper's eq. 5.
    """
    counts = confusion(prob, mask, threshold)
    missed, alarmed = fnr(counts), fpr(counts)
    pixels = counts.tp + counts.fp + counts.fn + counts.tn
    return {
        "dice": dice(counts),
        "iou": iou(counts),
        "fpr": alarmed,
        "fnr": missed,
        "sensitivity": 1 - missed,
        "specificity": 1 - alarmed,
        "precision": _ratio(counts.tp, counts.tp + counts.fp, defined=counts.tp + counts.fn > 0),
        "accuracy": (counts.tp + counts.tn) / pixels,
        "bce": _bce(np.asarray(prob), np.asarray(mask)),
    }


def surface_metrics(
    prob_HW: np.ndarray,
    mask_HW: np.ndarray,
    pixel: tuple[float, float],
    tolerance: float,
    threshold: float = 0.5,
) -> tuple[float, float]:
    """95th percentile of the Hausdorff distance, and the normalised surface distance (surface Dice), by MONAI.

    pixel: height and width of a pixel, in the unit of `tolerance` and of the result. A lesion of which nothing was
    found has no surface to measure: its distance is the image's diagonal, the worst there is, and its surface Dice 0;
    left out, a model would gain by predicting nothing. Both are NaN where the reference is empty.
    """
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    predicted, actual = np.asarray(prob_HW) >= threshold, np.asarray(mask_HW).astype(bool)
    if not actual.any():
        return float("nan"), float("nan")
    if not predicted.any():
        return float(np.hypot(actual.shape[0] * pixel[0], actual.shape[1] * pixel[1])), 0.0
    y_pred, y = (torch.from_numpy(pixels)[None, None].float() for pixels in (predicted, actual))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls itself in a way that it deprecates
        hd95 = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=list(pixel))
        nsd = compute_surface_dice(y_pred, y, [tolerance], include_background=True, spacing=list(pixel))
    return float(hd95), float(nsd)


def betti_error(prob_HW: np.ndarray, mask_HW: np.ndarray, threshold: float = 0.5) -> float:
    """|b0(found) - b0(mask)| + |b1(found) - b1(mask)|: pieces plus holes that are too many or too few.

    Zero where both are empty. It counts and does not locate: a piece at the wrong place costs nothing, and one stray
    pixel as much as a second lesion.
    """
    found, actual = (betti_numbers(pixels) for pixels in (np.asarray(prob_HW) >= threshold, mask_HW))
    return float(sum(abs(ours - theirs) for ours, theirs in zip(found, actual, strict=True)))


def betti_numbers(mask_HW: np.ndarray) -> tuple[int, int]:
    """(b0, b1): pieces and holes of a mask.

    Foreground pixels that touch at a corner are one piece (8-connectivity), background pixels are not (4), so that a
    closed line one pixel wide has an inside; gudhi's complexes of top-dimensional cells and the topology loss count
    alike. Outside of the image is background: what is open to the image's border is no hole.
    """
    padded = np.pad(np.asarray(mask_HW).astype(bool), 1)
    _, pieces = ndimage.label(padded, structure=np.ones((3, 3)))
    _, background = ndimage.label(~padded)
    return int(pieces), int(background) - 1


def _bce(prob: np.ndarray, mask: np.ndarray) -> np.ndarray:
    certain = np.clip(np.where(mask.astype(bool), prob, 1 - prob), LEAST_PROB, 1.0)
    return np.asarray(-np.log(certain, dtype=np.float64).mean(axis=(-2, -1)))


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
