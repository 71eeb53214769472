"""Label probabilities → numbers: accuracy, F1, AUC and CE with intervals, what differs between arms, ROC, confusion.

The label metrics are of a set of images, so where `stats` draws means of images anew, this counts every image of a
resample as often as its patient was drawn. Same resamples, same rules: nothing is NaN but None.
"""

from __future__ import annotations

import math
import typing as t

import numpy as np
import pandas as pd
import scipy.stats

from bushpc.metrics.label import LEAST_PROB
from bushpc.metrics.registry import LABEL_METRICS, Metric, label_metrics
from bushpc.report.per_image import PROB_COLUMNS
from bushpc.report.stats import Interval, percentiles, resamples
from bushpc.sample import LABELS


class DeLong(t.NamedTuple):
    """DeLong's test of the AUCs of two arms on the same images, two-sided, with the 95 % interval of the difference.

    low, high, p: None, and `reason` says why, where no test is possible.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    reason: str | None


class McNemar(t.NamedTuple):
    """McNemar's exact test of two arms on the same images, two-sided.

    better, worse: images that only the arm, or only its baseline, labels rightly; the test is of these. p: None where
    there is none.
    """

    better: int
    worse: int
    p: float | None


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a label, and a probability of each: those that can be judged."""
    return rows[rows["label"].isin(LABELS) & rows[list(PROB_COLUMNS)].notna().all(axis=1)]


def point_values(rows: pd.DataFrame) -> dict[str, float | None]:
    """The label metrics of all rows together, by LABEL_METRICS; None where one is not defined."""
    found = label_metrics(*_arrays(rows))
    return {name: None if math.isnan(found[name]) else found[name] for name in LABEL_METRICS}


def label_intervals(rows: pd.DataFrame) -> dict[str, Interval | None]:
    """The same with percentile bootstrap intervals over patients."""
    values = point_values(rows)
    bounds = _bounds(rows, (Weighted(*_arrays(rows)),), lambda value_RM: value_RM)
    return {
        name: None if (value := values[name]) is None else Interval(value, *bounds[m])
        for m, name in enumerate(LABEL_METRICS)
    }


def label_differences(rows: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, Interval | None]:
    """Of `rows` minus those of `baseline`, both of the same images in the same order; the same patients are drawn."""
    ours, theirs = point_values(rows), point_values(baseline)
    both = (Weighted(*_arrays(rows)), Weighted(*_arrays(baseline)))
    bounds = _bounds(rows, both, lambda ours_RM, theirs_RM: ours_RM - theirs_RM)
    found: dict[str, Interval | None] = {}
    for m, name in enumerate(LABEL_METRICS):
        a, b = ours[name], theirs[name]
        found[name] = None if a is None or b is None else Interval(a - b, *bounds[m])
    return found


def mcnemar(rows: pd.DataFrame, baseline: pd.DataFrame) -> McNemar:
    """Whether one of two arms labels more images rightly; both of the same images in the same order."""
    ours_N, theirs_N = right(rows), right(baseline)
    better, worse = int((ours_N & ~theirs_N).sum()), int((theirs_N & ~ours_N).sum())
    p = float(scipy.stats.binomtest(better, better + worse).pvalue) if better + worse else None
    return McNemar(better, worse, p)


def delong(rows: pd.DataFrame, baseline: pd.DataFrame) -> DeLong:
    """Whether the AUCs of two arms differ; both of the same images, of two labels or more, in the same order.

    DeLong, DeLong and Clarke-Pearson (1988), clustered by patient as by Obuchowski (1997), as scans of one patient are
    no independent evidence. AUC is the mean over labels, one against all others, and so is what an image counts for;
    with two labels the variance is Obuchowski's, and with one scan a patient it is DeLong's. Chosen before a bootstrap,
    whose p cannot be less than one in its resamples, which Holm multiplies by the tests of a large grid. The models
    are taken as they are: how far trainings differ is no part of it.
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
    """How far each image moves the AUC, (N,): of each label DeLong's component of the image less the AUC, over the
    images of its kind; mean over labels. The component is the share of the other kind that the image is right about.
    """
    occurring = np.unique(label_N)
    influence_N = np.zeros(len(label_N))
    for label in occurring:
        score_N, positive_N = prob_NL[:, label], label_N == label
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


class Weighted:
    """The label metrics of images that count more than once, for many weightings at a time.

    With weights of 1 it gives what `label_metrics` does, and with counts what that gives for copies.

    The four metrics below have a fast formula. Any other is computed from copies of the images, one weighting at a
    time, which takes minutes for a large dataset.
    """

    def __init__(self, prob_NL: np.ndarray, label_N: np.ndarray) -> None:
        self.prob_NL, self.label_N = prob_NL, label_N
        images = np.arange(len(label_N))
        predicted_NL = prob_NL.argmax(axis=1)[:, None] == np.arange(prob_NL.shape[1])
        true_NL = label_N[:, None] == np.arange(prob_NL.shape[1])
        self.right_N = predicted_NL[images, label_N].astype(float)
        self.ce_N = -np.log(np.clip(prob_NL[images, label_N], LEAST_PROB, 1.0))
        self.hits_NL = (predicted_NL & true_NL).astype(float)
        self.either_NL = predicted_NL.astype(float) + true_NL
        self.rankings = [_Ranking(prob_NL[:, c], true_NL[:, c]) for c in range(prob_NL.shape[1]) if true_NL[:, c].any()]

    def __call__(self, weight_RN: np.ndarray) -> np.ndarray:
        """(R, metrics) in the order of LABEL_METRICS. weight_RN: how often each image counts."""
        size_R = weight_RN.sum(axis=1)
        with np.errstate(invalid="ignore"):
            f1_RL = 2 * (weight_RN @ self.hits_NL) / (weight_RN @ self.either_NL)
        auc_RL = np.stack([ranking(weight_RN) for ranking in self.rankings], axis=1)
        by_name = {
            "label_accuracy": weight_RN @ self.right_N / size_R,
            "label_f1": _mean_of_defined(f1_RL),
            "label_auc": _mean_of_defined(auc_RL),
            "label_ce": weight_RN @ self.ce_N / size_R,
        }
        others = {
            name: self._of_copies(metric, weight_RN) for name, metric in LABEL_METRICS.items() if name not in by_name
        }
        return np.stack([(by_name | others)[name] for name in LABEL_METRICS], axis=1)

    def _of_copies(self, metric: Metric, weight_RN: np.ndarray) -> np.ndarray:
        assert metric.function is not None, "a metric of labels is computed here"
        copies = (np.repeat(np.arange(len(self.label_N)), weight_N.astype(int)) for weight_N in weight_RN)
        return np.array([metric.function(self.prob_NL[each], self.label_N[each]) for each in copies])


class _Ranking:
    """AUC of one label against all others (Mann-Whitney): how often a positive scores above a negative, ties half."""

    def __init__(self, score_N: np.ndarray, positive_N: np.ndarray) -> None:
        self.order_N = np.argsort(score_N, kind="stable")
        self.positive_N = positive_N[self.order_N].astype(float)
        # The first of every group of equal scores.
        self.starts = np.flatnonzero(np.append(True, np.diff(score_N[self.order_N]) != 0))

    def __call__(self, weight_RN: np.ndarray) -> np.ndarray:
        sorted_RN = weight_RN[:, self.order_N]
        positive_RG = np.add.reduceat(sorted_RN * self.positive_N, self.starts, axis=1)
        negative_RG = np.add.reduceat(sorted_RN, self.starts, axis=1) - positive_RG
        below_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
        pairs_R = positive_RG.sum(axis=1) * negative_RG.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray((positive_RG * below_RG).sum(axis=1) / pairs_R)


def _mean_of_defined(value_RL: np.ndarray) -> np.ndarray:
    defined_RL = ~np.isnan(value_RL)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined_RL, value_RL, 0).sum(axis=1) / defined_RL.sum(axis=1))


def _arrays(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return rows[list(PROB_COLUMNS)].to_numpy(float), rows["label"].map(LABELS.index).to_numpy(int)


def _bounds(
    rows: pd.DataFrame, sides: tuple[Weighted, ...], of: t.Callable[..., np.ndarray]
) -> list[tuple[float | None, float | None]]:
    patient_N, patients = pd.factorize(rows["patient"])
    weights = (times_RP[:, patient_N] for times_RP in resamples(len(patients)))
    return percentiles([of(*(side(weight_RN) for side in sides)) for weight_RN in weights], len(LABEL_METRICS))
