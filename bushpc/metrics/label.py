"""Label metrics of a set of images: accuracy, F1, AUC and cross-entropy of benign | malignant | normal. Numpy alone.

Prediction.class_prob_BL, Batch.label_B → `LabelSet` → one number per fold and metric → curves and the report

A metric is a function of a `LabelSet` and of weights: how often each image counts. Weights of 1 give the metric itself;
the report's bootstrap gives the counts of 500 resamples at a time. So a metric has one definition, and its intervals
take no longer than its values.

Shapes: N images, L labels, R weightings.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

LEAST_PROB = 1e-7  # smallest argument of the logarithm: a probability that rounded to 0 would make the mean infinite


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelSet:
    """Predictions for images that all have a label, and what several metrics need of them.

    prob_NL: class probabilities; rows sum to 1. label_N: index of the true class, ≥ 0.
    """

    prob_NL: np.ndarray
    label_N: np.ndarray

    @property
    def once_1N(self) -> np.ndarray:
        """The weights that count every image once."""
        return np.ones((1, len(self.label_N)))

    @functools.cached_property
    def predicted_N(self) -> np.ndarray:
        """The most probable class."""
        return np.asarray(self.prob_NL.argmax(axis=1))

    @functools.cached_property
    def _pairs_NK(self) -> np.ndarray:
        labels = self.prob_NL.shape[1]
        return np.eye(labels * labels)[self.label_N * labels + self.predicted_N]

    @functools.cached_property
    def rankings(self) -> list[Ranking]:
        """Of the classes that occur among the images, each against all others."""
        return [Ranking(self.prob_NL[:, label], self.label_N == label) for label in np.unique(self.label_N)]

    @functools.cached_property
    def pair_rankings(self) -> dict[tuple[int, int], Ranking]:
        """Of every two classes a and b that occur, by P(b | a or b); other images need a weight of 0."""
        pairs = itertools.combinations(map(int, np.unique(self.label_N)), 2)
        return {(a, b): Ranking(pair_score(self.prob_NL, a, b), self.label_N == b) for a, b in pairs}

    def mean(self, value_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
        """Weighted mean of a value of each image, (R,)."""
        # A single sum in numpy's order gives exactly `value_N.mean()`; many are faster as a matrix product.
        sum_R = (weight_RN * value_N).sum(axis=1) if len(weight_RN) == 1 else weight_RN @ value_N
        return np.asarray(sum_R / weight_RN.sum(axis=1))

    def confusion(self, weight_RN: np.ndarray) -> np.ndarray:
        """Weighted counts (R, L, L): true class by row, most probable class by column."""
        labels = self.prob_NL.shape[1]
        return np.asarray((weight_RN @ self._pairs_NK).reshape(-1, labels, labels))


def pair_score(prob_NL: np.ndarray, a: int, b: int) -> np.ndarray:
    """P(b | a or b) of each image, which a third class does not move; 1/2 where both are 0."""
    both_N = prob_NL[:, a] + prob_NL[:, b]
    return np.divide(prob_NL[:, b], both_N, out=np.full(len(both_N), 0.5), where=both_N > 0)


class Ranking:
    """The images in order of one class' probability."""

    def __init__(self, score_N: np.ndarray, positive_N: np.ndarray) -> None:
        self.order_N = np.argsort(score_N, kind="stable")
        self.positive_N = positive_N[self.order_N].astype(float)
        # The first of every group of equal scores.
        self.starts = np.flatnonzero(np.append(True, np.diff(score_N[self.order_N]) != 0))

    def auc(self, weight_RN: np.ndarray) -> np.ndarray:
        """Area under the ROC curve, (R,): how often a positive scores above a negative, ties count half (Mann-Whitney).

        NaN if a weighting has no positives or no negatives.
        """
        sorted_RN = weight_RN[:, self.order_N]
        positive_RG = np.add.reduceat(sorted_RN * self.positive_N, self.starts, axis=1)
        negative_RG = np.add.reduceat(sorted_RN, self.starts, axis=1) - positive_RG
        below_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
        pairs_R = positive_RG.sum(axis=1) * negative_RG.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray((positive_RG * below_RG).sum(axis=1) / pairs_R)


def accuracy(labels: LabelSet, weight_RN: np.ndarray) -> np.ndarray:
    """Share of images whose most probable class is the true one."""
    return labels.mean(labels.predicted_N == labels.label_N, weight_RN)


def f1(labels: LabelSet, weight_RN: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur among the images or the predictions."""
    confusion_RLL = labels.confusion(weight_RN)
    correct_RL = np.diagonal(confusion_RLL, axis1=1, axis2=2)
    with np.errstate(invalid="ignore"):
        return _mean_of_defined(2 * correct_RL / (confusion_RLL.sum(axis=1) + confusion_RLL.sum(axis=2)))


def auc(labels: LabelSet, weight_RN: np.ndarray) -> np.ndarray:
    """Mean AUC over the classes that occur among the images, one against all others; NaN if there is only one.

    Where a weighting has images of two classes alone, it is their plain AUC, of P(b | a or b): the probability of a
    third class, which no image has, then moves no image.
    """
    auc_R = _mean_of_defined(np.stack([ranking.auc(weight_RN) for ranking in labels.rankings], axis=1))
    occurring = np.unique(labels.label_N)
    there_RL = np.stack([weight_RN[:, labels.label_N == label].sum(axis=1) > 0 for label in occurring], axis=1)
    for pair, ranking in labels.pair_rankings.items():
        alone_R = (there_RL == np.isin(occurring, pair)).all(axis=1)
        if alone_R.any():
            auc_R[alone_R] = ranking.auc(weight_RN[alone_R])
    return auc_R


def cross_entropy(labels: LabelSet, weight_RN: np.ndarray) -> np.ndarray:
    """Mean negative logarithm of the true class' probability."""
    true_class_N = labels.prob_NL[np.arange(len(labels.label_N)), labels.label_N]
    return labels.mean(-np.log(np.clip(true_class_N, LEAST_PROB, 1.0)), weight_RN)


def _mean_of_defined(value_RL: np.ndarray) -> np.ndarray:
    defined_RL = ~np.isnan(value_RL)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined_RL, value_RL, 0).sum(axis=1) / defined_RL.sum(axis=1))
