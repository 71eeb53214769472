"""Mask metrics of one image at a time: overlap as XBusNet (section 2.4) defines it, surface distances, topology.

Prediction.prob_BKHW, Batch.mask_BKHW → `MaskPair` → one number per image and metric → the evaluator's CSV

An image whose reference mask is empty has no overlap to measure: with the bare formula the best possible prediction
(nothing) would score Dice 0 but FNR 0, worst and best at once. Dice, IoU, FNR, sensitivity, precision and surface
distances are NaN there, so an average either leaves the image out on purpose (nanmean) or shows that it didn't. FPR,
specificity, accuracy, BCE and Betti error stay defined and measure false alarms.
"""

from __future__ import annotations

import functools
import typing as t
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

EPSILON = 1e-8  # in every denominator, section 2.4
LEAST_PROB = 1e-7  # smallest argument of the logarithm: one pixel of probability 0 would make the mean infinite

# Unit of distances: millimetres, pixels of the original image, or of the square image that the network reads.
Spacing = t.Literal["mm", "px", "network px"]


class Confusion(t.NamedTuple):
    """Pixel counts per image, int64; the shape is that of the mask without height and width."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


class Surfaces(t.NamedTuple):
    """hd95: 95th percentile of the Hausdorff distance. nsd: normalised surface distance (surface Dice)."""

    hd95: float
    nsd: float


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskPair:
    """A probability map and its reference mask, from which every mask metric is computed; the last axes are H and W.

    What several metrics need is computed once. Surface distances and topology need a single image.

    prob: floats in [0, 1]. mask: 0 or 1, same shape.
    threshold: a pixel is lesion where the probability is at least this.
    pixel: height and width of a pixel by unit; a unit that is not known for this image is missing.
    tolerance: of the surface Dice, by unit.
    """

    prob: np.ndarray
    mask: np.ndarray
    threshold: float = 0.5
    pixel: Mapping[Spacing, tuple[float, float]] = field(default_factory=dict)
    tolerance: Mapping[Spacing, float] = field(default_factory=dict)

    @functools.cached_property
    def counts(self) -> Confusion:
        return confusion(self.prob, self.mask, self.threshold)

    def surfaces(self, unit: Spacing) -> Surfaces:
        """NaN where the size of a pixel is not known in this unit."""
        if unit not in self._surfaces:
            pixel, nan = self.pixel.get(unit), float("nan")
            self._surfaces[unit] = (
                surface_metrics(self.prob, self.mask, pixel, self.tolerance[unit], self.threshold)
                if pixel
                else Surfaces(nan, nan)
            )
        return self._surfaces[unit]

    @functools.cached_property
    def _surfaces(self) -> dict[Spacing, Surfaces]:
        return {}


def confusion(prob: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> Confusion:
    """Counts TP, FP, FN, TN of 1{prob >= threshold} against `mask`; the last two axes are height and width.

    prob: floats in [0, 1]. mask: 0 or 1, same shape. NaN probabilities are rejected: they would compare as "no lesion"
    and score like a prediction, but the model that makes them is broken.
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


def dice(pair: MaskPair) -> np.ndarray:
    """2 TP / (2 TP + FP + FN)."""
    counts = pair.counts
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn, defined=_has_lesion(counts))


def iou(pair: MaskPair) -> np.ndarray:
    """TP / (TP + FP + FN)."""
    counts = pair.counts
    return _ratio(counts.tp, counts.tp + counts.fp + counts.fn, defined=_has_lesion(counts))


def fpr(pair: MaskPair) -> np.ndarray:
    """FP / (FP + TN): share of the background that is called lesion; NaN without any background."""
    counts = pair.counts
    return _ratio(counts.fp, counts.fp + counts.tn, defined=counts.fp + counts.tn > 0)


def fnr(pair: MaskPair) -> np.ndarray:
    """FN / (FN + TP): share of the lesion that is missed."""
    counts = pair.counts
    return _ratio(counts.fn, counts.fn + counts.tp, defined=_has_lesion(counts))


def sensitivity(pair: MaskPair) -> np.ndarray:
    """1 - FNR, also called recall (hybrid attention, eq. 20 to 24, as the three below)."""
    return np.asarray(1 - fnr(pair))


def specificity(pair: MaskPair) -> np.ndarray:
    """1 - FPR."""
    return np.asarray(1 - fpr(pair))


def precision(pair: MaskPair) -> np.ndarray:
    """TP / (TP + FP), 0 where a lesion is there and nothing is predicted."""
    counts = pair.counts
    return _ratio(counts.tp, counts.tp + counts.fp, defined=_has_lesion(counts))


def accuracy(pair: MaskPair) -> np.ndarray:
    """Share of pixels that are right."""
    counts = pair.counts
    return np.asarray((counts.tp + counts.tn) / (counts.tp + counts.fp + counts.fn + counts.tn))


def bce(pair: MaskPair) -> np.ndarray:
    """Binary cross-entropy, mean over pixels (SAM multi-task, eq. 5)."""
    prob, mask = np.asarray(pair.prob), np.asarray(pair.mask)
    certain = np.clip(np.where(mask.astype(bool), prob, 1 - prob), LEAST_PROB, 1.0)
    return np.asarray(-np.log(certain, dtype=np.float64).mean(axis=(-2, -1)))


def hd95_mm(pair: MaskPair) -> float:
    return pair.surfaces("mm").hd95


def hd95_px(pair: MaskPair) -> float:
    return pair.surfaces("px").hd95


def hd95_network_px(pair: MaskPair) -> float:
    """In pixels of the grid that the masks are on, which few readers can place: a network's pixel has no fixed size.

    For figures that were taken so. hd95_px is the same distance in pixels of the original image.
    """
    pixel = (1.0, 1.0)
    return surface_metrics(pair.prob, pair.mask, pixel, 0.0, pair.threshold).hd95


def nsd_mm(pair: MaskPair) -> float:
    return pair.surfaces("mm").nsd


def nsd_px(pair: MaskPair) -> float:
    return pair.surfaces("px").nsd


def surface_metrics(
    prob_HW: np.ndarray,
    mask_HW: np.ndarray,
    pixel: tuple[float, float],
    tolerance: float,
    threshold: float = 0.5,
) -> Surfaces:
    """Surface distances of one mask, by MONAI.

    If nothing of a lesion was found, there is no surface to measure. Its distance is then the image's diagonal, the
    worst possible, and its surface Dice 0. If it were left out, a model would gain by predicting nothing. Both are NaN
    where the reference is empty.

    pixel: height and width of a pixel, in the unit of `tolerance` and of the result.
    """
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    predicted, actual = np.asarray(prob_HW) >= threshold, np.asarray(mask_HW).astype(bool)
    if not actual.any():
        return Surfaces(float("nan"), float("nan"))
    if not predicted.any():
        return Surfaces(float(np.hypot(actual.shape[0] * pixel[0], actual.shape[1] * pixel[1])), 0.0)
    y_pred, y = (torch.from_numpy(pixels)[None, None].float() for pixels in (predicted, actual))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls itself in a way that it deprecates
        hd95 = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=list(pixel))
        nsd = compute_surface_dice(y_pred, y, [tolerance], include_background=True, spacing=list(pixel))
    return Surfaces(float(hd95), float(nsd))


def betti_error(pair: MaskPair) -> float:
    """|b0(found) - b0(mask)| + |b1(found) - b1(mask)|: pieces plus holes that are too many or too few.

    Zero where both masks are empty. It counts but doesn't locate: a piece in the wrong place costs nothing, and one
    stray pixel costs as much as a second lesion.
    """
    found, actual = (betti_numbers(pixels) for pixels in (np.asarray(pair.prob) >= pair.threshold, pair.mask))
    return float(sum(abs(ours - theirs) for ours, theirs in zip(found, actual, strict=True)))


def betti_numbers(mask_HW: np.ndarray) -> tuple[int, int]:
    """(b0, b1): pieces and holes of a mask.

    Foreground is 8-connected: pixels that touch at a corner are one piece. Background is 4-connected, so a closed line
    one pixel wide has an inside. gudhi's complexes of top-dimensional cells and the topology loss count the same way.
    Outside of the image is background, so a gap that is open to the image's border is no hole.
    """
    from scipy import ndimage  # takes 0.1 s to import, and every command imports the list of metrics

    padded = np.pad(np.asarray(mask_HW).astype(bool), 1)
    _, pieces = ndimage.label(padded, structure=np.ones((3, 3)))
    _, background = ndimage.label(~padded)
    return int(pieces), int(background) - 1


def lesion_length(mask: np.ndarray) -> int:
    """Longest side, in pixels, of the bounding box around all foreground of one H x W mask; 0 if empty.

    XBusNet's size strata (Table 2) use this measure. Pixels are those of the given mask.
    """
    rows, columns = np.nonzero(mask)
    if rows.size == 0:
        return 0
    return int(max(np.ptp(rows), np.ptp(columns))) + 1


def _has_lesion(counts: Confusion) -> np.ndarray:
    return np.asarray(counts.tp + counts.fn > 0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, *, defined: np.ndarray) -> np.ndarray:
    return np.where(defined, numerator / (denominator + EPSILON), np.nan)
