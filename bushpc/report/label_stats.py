"""Label probabilities → numbers: label metrics with intervals, differences of arms, ROC, confusion.

Label metrics belong to a set of images, so a bootstrap can't average values of single images as in `stats`. Instead,
each image of a resample counts as often as its patient was drawn. Resamples are those of `stats`; undefined figures are
None.
"""

from __future__ import annotations

import math
import typing as t

import numpy as np
import pandas as pd
import scipy.stats

from bushpc.metrics.label import LabelSet, pair_score
from bushpc.metrics.registry import LABEL_METRICS, label_metrics, weighted_label_metrics
from bushpc.report.per_image import PROB_COLUMNS
from bushpc.report.stats import Interval, percentiles, resamples
from bushpc.sample import LABELS


class DeLong(t.NamedTuple):
    """DeLong's test of the AUCs of two arms on the same images, two-sided, with the 95 % interval of the difference.

    low, high, p: None if no test is possible; `reason` says why.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    reason: str | None


class McNemar(t.NamedTuple):
    """McNemar's exact test of two arms on the same images, two-sided.

    better, worse: images that only the arm, or only its baseline, labels correctly; the test uses only these. p: None
    without any.
    """

    better: int
    worse: int
    p: float | None


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a label and label probabilities."""
    return rows[rows["label"].isin(LABELS) & rows[list(PROB_COLUMNS)].notna().all(axis=1)]


def point_values(rows: pd.DataFrame) -> dict[str, float | None]:
    """The label metrics of all rows together, by LABEL_METRICS; None if undefined."""
    found = label_metrics(*_arrays(rows))
    return {name: None if math.isnan(found[name]) else found[name] for name in LABEL_METRICS}


def label_intervals(rows: pd.DataFrame) -> dict[str, Interval | None]:
    """The same with percentile bootstrap intervals over patients."""
    values = point_values(rows)
    bounds = _bounds(rows, (_label_set(rows),), lambda value_RM: value_RM)
    return {
        name: None if (value := values[name]) is None else Interval(value, *bounds[m])
        for m, name in enumerate(LABEL_METRICS)
    }


def label_differences(rows: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, Interval | None]:
    """`rows` minus `baseline`, which have the same images in the same order; both use the same resamples."""
    ours, theirs = point_values(rows), point_values(baseline)
    both = (_label_set(rows), _label_set(baseline))
    bounds = _bounds(rows, both, lambda ours_RM, theirs_RM: ours_RM - theirs_RM)
    found: dict[str, Interval | None] = {}
    for m, name in enumerate(LABEL_METRICS):
        a, b = ours[name], theirs[name]
        found[name] = None if a is None or b is None else Interval(a - b, *bounds[m])
    return found


def mcnemar(rows: pd.DataFrame, baseline: pd.DataFrame) -> McNemar:
    """Whether one of two arms labels more images correctly; both have the same images in the same order."""
    ours_N, theirs_N = right(rows), right(baseline)
    better, worse = int((ours_N & ~theirs_N).sum()), int((theirs_N & ~ours_N).sum())
    p = float(scipy.stats.binomtest(better, better + worse).pvalue) if better + worse else None
    return McNemar(better, worse, p)


def delong(rows: pd.DataFrame, baseline: pd.DataFrame) -> DeLong:
    """Whether the AUCs of two arms differ; both have the same images, of two labels or more, in the same order.

    DeLong, DeLong and Clarke-Pearson (1988), clustered by patient as by Obuchowski (1997), because scans of one patient
    are not independent. AUC is the mean over labels, one against all others, and so is the influence of an image. With
    two labels the variance is Obuchowski's, and with one scan per patient DeLong's. A bootstrap is no alternative: its
    p is at least 1 / resamples, and Holm multiplies that by the number of tests of a large grid. The models are taken
    as given: the variance between trainings is not included.
    """
    (ours_NL, label_N), (theirs_NL, _) = _arrays(rows), _arrays(baseline)
    difference = label_metrics(ours_NL, label_N)["label_auc"] - label_metrics(theirs_NL, label_N)["label_auc"]
    patient_N, patients = pd.factorize(rows["patient"])
    there_PL, sum_PL = np.zeros((len(patients), len(LABELS)), bool), np.zeros((len(patients), len(LABELS)))
    there_PL[patient_N, label_N] = True
    np.add.at(sum_PL, (patient_N, label_N), _influence(ours_NL, label_N) - _influence(theirs_NL, label_N))
    patients_L = there_PL.sum(axis=0)
    if (patients_L == 1).any():
        return DeLong(difference, None, None, None, "a label is of one patient alone")
    # n / (n - 1) as in a sample variance: n of the patients with a label, and of all for what two labels share.
    spare, spare_L = 1 / (len(patients) - 1), 1 / np.maximum(patients_L - 1, 1)
    variance = (1 + spare) * (sum_PL.sum(axis=1) ** 2).sum() + ((spare_L - spare) * (sum_PL**2).sum(axis=0)).sum()
    error = math.sqrt(variance)
    if error <= 1e-12:  # rounding, as in `corrected_t`
        return DeLong(difference, None, None, None, "the AUCs have no variance, as of arms that rank images alike")
    half = error * float(scipy.stats.norm.ppf(0.975))
    p = 2 * float(scipy.stats.norm.sf(abs(difference) / error))
    return DeLong(difference, difference - half, difference + half, p, None)


def _influence(prob_NL: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Influence of each image on the AUC, (N,), as a mean over labels.

    For one label, it is DeLong's component of the image minus the AUC, divided by the number of images of its kind. The
    component is the share of images of the other kind that the image is ranked correctly against.
    """
    occurring = np.unique(label_N)
    influence_N = np.zeros(len(label_N))
    for label in occurring:
        score_N, positive_N = prob_NL[:, label], label_N == label
        if len(occurring) == 2:  # as `bushpc.metrics.label.auc`
            score_N = pair_score(prob_NL, int(occurring.sum() - label), int(label))
        # A rank among all less the rank among its kind counts the others below, ties half.
        below_N = scipy.stats.rankdata(score_N)
        for kind_N in (positive_N, ~positive_N):
            below_N[kind_N] -= scipy.stats.rankdata(score_N[kind_N])
        positives, negatives = positive_N.sum(), (~positive_N).sum()
        component_N = np.where(positive_N, below_N / negatives, 1 - below_N / positives)
        auc = component_N[positive_N].mean()
        influence_N += (component_N - auc) / np.where(positive_N, positives, negatives)
    return influence_N / len(occurring)


def right(rows: pd.DataFrame) -> np.ndarray:
    """Whether the most probable label of each image is its label."""
    prob_NL, label_N = _arrays(rows)
    return np.asarray(prob_NL.argmax(axis=1) == label_N)


def confusion_matrix(rows: pd.DataFrame) -> np.ndarray:
    """Counts (L, L): true label by row, most probable label by column."""
    prob_NL, label_N = _arrays(rows)
    counts_LL = np.zeros((len(LABELS), len(LABELS)), int)
    np.add.at(counts_LL, (label_N, prob_NL.argmax(axis=1)), 1)
    return counts_LL


def roc(rows: pd.DataFrame, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the ROC curve of one label against all others: (false positive rate, true positive rate)."""
    order = rows.sort_values(f"prob_{label}", ascending=False, kind="stable")
    positive_N = (order["label"] == label).to_numpy()
    # A threshold cannot pass between images of one probability, so they are one step together.
    last_N = np.append(np.diff(order[f"prob_{label}"]) != 0, True)
    tpr, fpr = (np.append(0, np.cumsum(kind)[last_N] / kind.sum()) for kind in (positive_N, ~positive_N))
    return fpr, tpr


def _arrays(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return rows[list(PROB_COLUMNS)].to_numpy(float), rows["label"].map(LABELS.index).to_numpy(int)


def _label_set(rows: pd.DataFrame) -> LabelSet:
    prob_NL, label_N = _arrays(rows)
    return LabelSet(prob_NL=prob_NL, label_N=label_N)


def _bounds(
    rows: pd.DataFrame, sets: tuple[LabelSet, ...], of: t.Callable[..., np.ndarray]
) -> list[tuple[float | None, float | None]]:
    """Bounds of the interval of each label metric. of: combines the metrics of the sets, each (R, metrics)."""
    patient_N, patients = pd.factorize(rows["patient"])
    weights = (times_RP[:, patient_N] for times_RP in resamples(len(patients)))
    values = [of(*(weighted_label_metrics(labels, weight_RN) for labels in sets)) for weight_RN in weights]
    return percentiles(values, len(LABEL_METRICS))
