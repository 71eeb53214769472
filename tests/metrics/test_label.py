"""Label metrics against torchmetrics, and cases worked by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_f1_score,
)

from bushpc.metrics.registry import LABEL_METRICS, label_metrics


@pytest.fixture
def case():
    random = np.random.default_rng(3)
    prob_NL = random.dirichlet([1, 1, 1], 60).round(2) + 0.01  # rounded, so that there are ties
    return prob_NL / prob_NL.sum(1, keepdims=True), random.integers(0, 3, 60)


def test_they_agree_with_torchmetrics(case):
    prob_NL, label_N = case
    metrics = label_metrics(prob_NL, label_N)
    prob, label = torch.tensor(prob_NL), torch.tensor(label_N)
    assert set(metrics) == set(LABEL_METRICS)
    assert metrics["label_accuracy"] == pytest.approx(multiclass_accuracy(prob, label, 3, average="micro").item())
    assert metrics["label_f1"] == pytest.approx(multiclass_f1_score(prob, label, 3, average="macro").item())
    assert metrics["label_auc"] == pytest.approx(multiclass_auroc(prob, label, 3, average="macro").item(), abs=1e-6)
    assert metrics["label_ce"] == pytest.approx(torch.nn.functional.nll_loss(prob.log(), label).item())


def test_a_class_that_no_image_has_is_left_out_of_the_means():
    prob_NL = np.array([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.7, 0.3, 0.0]])
    metrics = label_metrics(prob_NL, np.array([0, 0, 1, 1]))
    assert metrics["label_accuracy"] == 0.75
    assert metrics["label_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert metrics["label_auc"] == pytest.approx(3 / 4)


def test_images_without_a_label_are_left_out(case):
    prob_NL, label_N = case
    more = np.vstack([prob_NL, [[1.0, 0.0, 0.0]]])
    assert label_metrics(more, np.append(label_N, -1)) == label_metrics(prob_NL, label_N)


def test_auc_is_not_defined_with_one_class_and_nothing_is_without_labels():
    one = label_metrics(np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]]), np.array([0, 0]))
    assert np.isnan(one["label_auc"])
    assert one["label_accuracy"] == 1
    assert all(np.isnan(value) for value in label_metrics(np.array([[0.9, 0.1, 0.0]]), np.array([-1])).values())


def test_a_probability_of_nothing_for_the_truth_costs_much_but_not_infinitely():
    assert 10 < label_metrics(np.array([[0.0, 1.0, 0.0]]), np.array([0]))["label_ce"] < 20


def plain_auc(label_N: np.ndarray, score_N: np.ndarray) -> float:
    return float(binary_auroc(torch.tensor(score_N), torch.tensor(label_N).int()))


def test_with_two_labels_auc_is_the_plain_one_of_malignant_given_benign_or_malignant():
    """P(normal) is large for one malignant image: a three-way mean ranks it below, P(M | B or M) above all benign."""
    prob = np.array([[0.60, 0.40, 0.0], [0.70, 0.30, 0.0], [0.02, 0.18, 0.80], [0.30, 0.70, 0.0]])
    label = np.array([0, 0, 1, 1])
    given = prob[:, 1] / (prob[:, 0] + prob[:, 1])
    assert label_metrics(prob, label)["label_auc"] == plain_auc(label, given) == 1.0
    assert np.mean([plain_auc(label == k, prob[:, k]) for k in (0, 1)]) < 1
    draw = np.random.default_rng(0)
    prob, label = draw.dirichlet(np.ones(3), 60), draw.integers(0, 2, 60)
    expected = plain_auc(label, prob[:, 1] / (prob[:, 0] + prob[:, 1]))
    assert label_metrics(prob, label)["label_auc"] == pytest.approx(expected, abs=1e-6)
    assert 0 <= label_metrics(np.eye(3)[[2] * 60], label)["label_auc"] <= 1  # neither benign nor malignant: a tie
