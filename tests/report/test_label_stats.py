"""Label numbers against the metric itself on copies, statsmodels, torchmetrics and hand-worked cases."""

import numpy as np
import pandas as pd
import pytest
import torch
import torchmetrics.functional.classification
from statsmodels.stats.contingency_tables import mcnemar

from bushpc.metrics.label import label_metrics
from bushpc.metrics.names import LABEL_METRICS
from bushpc.report import label_stats, stats
from bushpc.sample import LABELS


@pytest.fixture
def images():
    """Makes 40 labelled rows with ties in their probabilities; `skill` as in two_tasks."""

    def make(skill: float = 1.0, seed: int = 0) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        label_N = rng.integers(3, size=40)
        score_NL = np.round(rng.normal(size=(40, 3)) + skill * np.eye(3)[label_N], 1)
        prob_NL = np.exp(score_NL) / np.exp(score_NL).sum(axis=1, keepdims=True)
        rows = pd.DataFrame(prob_NL, columns=[f"prob_{label}" for label in LABELS])
        return rows.assign(label=[LABELS[label] for label in label_N], patient=[f"p{i // 2}" for i in range(40)])

    return make


def _arrays(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return rows[[f"prob_{label}" for label in LABELS]].to_numpy(), rows["label"].map(LABELS.index).to_numpy()


def test_an_image_that_counts_twice_is_an_image_that_is_there_twice(images) -> None:
    rows = images()
    rng = np.random.default_rng(1)
    weight_RN = np.vstack([np.ones(40), rng.integers(0, 4, size=(20, 40))])
    weight_RN[-1] *= (rows["label"] != "normal").to_numpy()  # a resample may lack a label
    weight_RN[-2] *= (rows["label"] == "benign").to_numpy()  # or have one only, and then no AUC
    prob_NL, label_N = _arrays(rows)
    found_RM = label_stats.Weighted(prob_NL, label_N)(weight_RN)
    for weight_N, found_M in zip(weight_RN.astype(int), found_RM, strict=True):
        copies = np.repeat(np.arange(40), weight_N)
        expected = label_metrics(prob_NL[copies], label_N[copies])
        assert found_M == pytest.approx([expected[name] for name in LABEL_METRICS], nan_ok=True)
    assert np.isnan(found_RM[-2, list(LABEL_METRICS).index("label_auc")])


def test_an_interval_holds_what_is_measured_and_a_single_patient_has_none(images) -> None:
    rows = images()
    for name, (value, low, high) in label_stats.label_intervals(rows).items():
        assert value == label_metrics(*_arrays(rows))[name]
        assert low < value < high
    assert label_stats.label_intervals(rows.assign(patient="one"))["label_auc"][1:] == (None, None)
    one_label = rows[rows["label"] == "benign"]
    assert label_stats.label_intervals(one_label)["label_auc"] is None
    assert label_stats.label_intervals(one_label)["label_accuracy"] is not None


def test_the_interval_of_accuracy_is_that_of_any_other_mean(images) -> None:
    rows = images()
    found = label_stats.label_intervals(rows)["label_accuracy"]
    as_mean = rows.assign(dice=label_stats.right(rows).astype(float))
    assert tuple(found) == pytest.approx(tuple(stats.intervals(as_mean, ["dice"])["dice"]))


def test_an_arm_does_not_differ_from_itself_and_turning_the_arms_turns_the_sign(images) -> None:
    a, b = images(2.0), images(0.2)
    assert set(label_stats.label_differences(a, a).values()) == {(0.0, 0.0, 0.0)}
    there, back = label_stats.label_differences(a, b), label_stats.label_differences(b, a)
    for name in LABEL_METRICS:
        assert tuple(there[name]) == pytest.approx(
            (-back[name].mean, -back[name].high, -back[name].low),
        )
    assert there["label_auc"].low > 0


def test_mcnemar_matches_statsmodels_and_without_a_difference_there_is_no_test(images) -> None:
    a, b = images(2.0), images(0.2)
    right_a, right_b = label_stats.right(a), label_stats.right(b)
    table = [[(x & y).sum() for y in (right_b, ~right_b)] for x in (right_a, ~right_a)]
    found = label_stats.mcnemar(a, b)
    assert (found.better, found.worse) == (table[0][1], table[1][0])
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert label_stats.mcnemar(a, a) == (0, 0, None)


@pytest.mark.parametrize("label", LABELS)
def test_roc_curve_and_confusion_match_torchmetrics(images, label: str) -> None:
    rows = images()
    fpr, tpr = label_stats.roc(rows, label)
    truth = torch.tensor((rows["label"] == label).to_numpy().astype(int))
    scores = torch.tensor(rows[f"prob_{label}"].to_numpy())
    expected = torchmetrics.functional.classification.binary_roc(scores, truth)
    assert fpr == pytest.approx(expected[0].numpy())
    assert tpr == pytest.approx(expected[1].numpy())
    prob_NL, label_N = _arrays(rows)
    matrix = torchmetrics.functional.classification.multiclass_confusion_matrix(
        torch.tensor(prob_NL), torch.tensor(label_N), num_classes=3
    )
    assert label_stats.confusion_matrix(rows).tolist() == matrix.tolist()


def test_images_without_a_label_or_an_answer_are_not_judged(images) -> None:
    rows = images()
    rows.loc[0, "label"] = "unlabelled"
    rows.loc[1, "prob_benign"] = np.nan
    assert label_stats.labelled(rows).index.tolist() == list(range(2, 40))
