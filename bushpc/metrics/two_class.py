"""Means over the two classes lesion and background, as XBusNet's released evaluation takes them. NumPy.

MaskPair.counts, or the tp, fp, fn, tn of a CSV → one number per image

The background is a class of its own here: its TP are the lesion's TN, its FP the lesion's FN, and the other way round.
On a scan with a small lesion its Dice and IoU are close to 1 whatever was found, so these means lie far above the
lesion's own: a lesion Dice of 0.76 is one of about 0.87 here. They are there to stand beside figures that were taken
this way (`metrics.py` of github.com/rmallina14/XBusNet at d529766), and are compared with no others.

The release calls 2 (FP + FN) the "true negatives" of either class, so its FPR is 0 for a perfect mask and from 1/6 to
1/5 for every other. The release counts p > 0.5 as lesion; here it is p >= threshold, as everywhere. Its Dice of an
empty reference is 0; here all four are NaN then, as the lesion's own.
"""

from __future__ import annotations

import typing as t

import numpy as np

if t.TYPE_CHECKING:
    from bushpc.metrics.mask import Confusion


class Counted(t.Protocol):
    """What has pixel counts: a `MaskPair`, or the columns of a CSV."""

    @property
    def counts(self) -> Confusion: ...


def dice_2class(pair: Counted) -> np.ndarray:
    """Mean of 2 TP / (2 TP + FP + FN) of the lesion and of the background."""
    tp, fp, fn, tn = pair.counts
    wrong = fp + fn
    return _of_lesions(pair, (_share(2 * tp, wrong) + _share(2 * tn, wrong)) / 2)


def iou_2class(pair: Counted) -> np.ndarray:
    """Mean of TP / (TP + FP + FN) of both."""
    tp, fp, fn, tn = pair.counts
    wrong = fp + fn
    return _of_lesions(pair, (_share(tp, wrong) + _share(tn, wrong)) / 2)


def fpr_2class(pair: Counted) -> np.ndarray:
    """Mean of FP / (FP + 2 (FP + FN)) of both."""
    _, fp, fn, _ = pair.counts
    called_tn = 2 * (fp + fn)
    return _of_lesions(pair, (_share(fp, called_tn) + _share(fn, called_tn)) / 2)


def fnr_2class(pair: Counted) -> np.ndarray:
    """Mean of FN / (FN + TP) of both; that of the background is the lesion's FPR."""
    tp, fp, fn, tn = pair.counts
    return _of_lesions(pair, (_share(fn, tp) + _share(fp, tn)) / 2)


def _share(part: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """part / (part + rest); 0 where both are 0, as in the release."""
    part, rest = np.asarray(part, float), np.asarray(rest, float)
    return part / np.where(part + rest > 0, part + rest, 1)


def _of_lesions(pair: Counted, value: np.ndarray) -> np.ndarray:
    return np.where(pair.counts.tp + pair.counts.fn > 0, value, np.nan)
