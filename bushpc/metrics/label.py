"""Label metrics of a set of images: accuracy, F1, AUC and cross-entropy of benign | malignant | normal. Numpy, SciPy.

Prediction.class_prob_BL, Batch.label_B → one number per fold and metric → curves and the report

Everywhere here prob_NL holds class probabilities whose rows sum to 1, and label_N the index of the true class, ≥ 0.
`registry.label_metrics` computes all of them and leaves out images without a label.
"""

from __future__ import annotations

import numpy as np

LEAST_PROB = 1e-7  # smallest argument of the logarithm: a probability that rounded to 0 would make the mean infinite


def accuracy(prob_NL: np.ndarray, label_N: np.ndarray) -> float:
    """Share of images whose most probable class is the true one."""
    return float((prob_NL.argmax(axis=1) == label_N).mean())


def f1(prob_NL: np.ndarray, label_N: np.ndarray) -> float:
    """Mean F1 over the classes that occur among the images or the predictions."""
    predicted_N = prob_NL.argmax(axis=1)
    return float(np.mean([_f1(predicted_N == c, label_N == c) for c in np.union1d(label_N, predicted_N)]))


def auc(prob_NL: np.ndarray, label_N: np.ndarray) -> float:
    """Mean AUC over the classes that occur among the images, one against all others; NaN if there is only one."""
    present = np.unique(label_N)
    if len(present) < 2:
        return float("nan")
    return float(np.mean([binary_auc(prob_NL[:, label], label_N == label) for label in present]))


def cross_entropy(prob_NL: np.ndarray, label_N: np.ndarray) -> float:
    """Mean negative logarithm of the true class' probability."""
    true_class = prob_NL[np.arange(len(label_N)), label_N]
    return float(-np.log(np.clip(true_class, LEAST_PROB, 1.0)).mean())


def binary_auc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties count half (Mann-Whitney)."""
    from scipy.stats import rankdata  # takes 0.3 s to import, and every command imports the list of metrics

    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    ranks = rankdata(score_N)
    return float((ranks[positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _f1(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
    return float(2 * (predicted_N & true_N).sum() / (predicted_N.sum() + true_N.sum()))
