"""Label metrics of a set of images: accuracy, F1, AUC and cross-entropy of benign | malignant | normal. Numpy, SciPy.

Prediction.class_prob_BL, Batch.label_B → numbers of a fold → curves and the report
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

LEAST_PROB = 1e-7  # within the logarithm: a probability that rounded to 0 would make the mean infinite


def label_metrics(prob_NL: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """`label_accuracy`, `label_f1`, `label_auc` and `label_ce` of N images; NaN where one is not defined.

    prob_NL: floats, rows sum to 1. label_N: index of the true class, -1 where there is none; those are left out.
    F1 is the mean over the classes that occur among the images or the predictions, AUC the mean over the classes
    that occur among the images, one against all others;
    it is NaN where all images have one class. CE is the mean negative logarithm of the true class' probability.
    """
    prob_NL, label_N = np.asarray(prob_NL, float), np.asarray(label_N)
    prob_NL, label_N = prob_NL[label_N >= 0], label_N[label_N >= 0]
    if not len(label_N):
        return dict.fromkeys(("label_accuracy", "label_f1", "label_auc", "label_ce"), float("nan"))
    predicted_N = prob_NL.argmax(axis=1)
    true_class = prob_NL[np.arange(len(label_N)), label_N]
    present = np.unique(label_N)
    aucs = [auc(prob_NL[:, label], label_N == label) for label in present] if len(present) > 1 else []
    return {
        "label_accuracy": float((predicted_N == label_N).mean()),
        "label_f1": float(np.mean([_f1(predicted_N == c, label_N == c) for c in np.union1d(present, predicted_N)])),
        "label_auc": float(np.mean(aucs)) if aucs else float("nan"),
        "label_ce": float(-np.log(np.clip(true_class, LEAST_PROB, 1.0)).mean()),
    }


def auc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties half (Mann-Whitney)."""
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    ranks = rankdata(score_N)
    return float((ranks[positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _f1(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
    return float(2 * (predicted_N & true_N).sum() / (predicted_N.sum() + true_N.sum()))
