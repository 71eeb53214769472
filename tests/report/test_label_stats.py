"""Label numbers against the metric itself on copies, statsmodels, scikit-learn, torchmetrics and hand-worked cases."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torchmetrics.functional.classification
from sklearn.metrics import roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar

from bushpc.metrics.label import LabelSet
from bushpc.metrics.registry import LABEL_METRICS, label_metrics, weighted_label_metrics
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
    found_RM = weighted_label_metrics(LabelSet(prob_NL=prob_NL, label_N=label_N), weight_RN)
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


def two_labels(scores: list[float], positive: list[bool]) -> pd.DataFrame:
    """One scan a patient, benign or malignant; the AUC of each label is that of the scores."""
    rows = pd.DataFrame({"prob_benign": scores, "prob_malignant": [1 - score for score in scores], "prob_normal": 0.0})
    labels = ["benign" if is_benign else "malignant" for is_benign in positive]
    return rows.assign(label=labels, patient=[f"p{i}" for i in range(len(scores))])


def test_delong_by_hand() -> None:
    positive = [True, True, False, False]
    a, b = two_labels([0.9, 0.6, 0.7, 0.2], positive), two_labels([0.8, 0.3, 0.5, 0.4], positive)
    # AUC 3/4 and 1/2. Components of positives 1, 1/2 less 1, 0; of negatives 1/2, 1 less 1/2, 1/2: variance 1/8 each.
    error = np.sqrt((1 / 8) / 2 + (1 / 8) / 2)
    found = label_stats.delong(a, b)
    assert found.difference == pytest.approx(1 / 4)
    assert (found.low, found.high) == pytest.approx((1 / 4 - 1.959964 * error, 1 / 4 + 1.959964 * error))
    assert found.p == pytest.approx(0.4795, abs=1e-4)  # of z = 0.7071


def test_delong_of_one_scan_a_patient_is_the_formula_of_1988() -> None:
    rng = np.random.default_rng(3)
    positive_N = rng.random(60) < 0.4
    scores = [np.round(rng.random(60) * 0.7 + skill * positive_N, 1) for skill in (0.3, 0.1)]  # with ties
    pairs = [(s[positive_N][:, None], s[~positive_N]) for s in scores]
    wins_2PN = np.stack([(x > y) + 0.5 * (x == y) for x, y in pairs])
    aucs, (_, positives, negatives) = wins_2PN.mean(axis=(1, 2)), wins_2PN.shape
    covariance = np.cov(wins_2PN.mean(axis=2)) / positives + np.cov(wins_2PN.mean(axis=1)) / negatives
    contrast = np.array([1, -1])
    z = contrast @ aucs / np.sqrt(contrast @ covariance @ contrast)
    found = label_stats.delong(*(two_labels(s.tolist(), positive_N.tolist()) for s in scores))
    assert found.difference == pytest.approx(contrast @ aucs)
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(abs(z)))


def test_delong_of_three_labels_and_of_patients_agrees_with_a_jackknife_of_scikit_learn(images) -> None:
    a, b = (pd.concat([images(skill, seed) for seed in (2, 3)], ignore_index=True) for skill in (1.5, 0.5))
    patient_N = np.arange(80) // 2
    a, b = (rows.assign(patient=patient_N) for rows in (a, b))

    def difference(kept_N: np.ndarray) -> float:
        label_N = _arrays(a[kept_N])[1]
        ours, theirs = (roc_auc_score(label_N, _arrays(rows[kept_N])[0], multi_class="ovr") for rows in (a, b))
        return ours - theirs

    left_out = np.array([difference(patient_N != patient) for patient in range(40)])
    error = np.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
    found = label_stats.delong(a, b)
    assert found.difference == pytest.approx(difference(patient_N >= 0))
    assert (found.high - found.low) / (2 * 1.959964) == pytest.approx(error, rel=0.03)


def test_a_scan_that_is_there_twice_is_no_more_evidence_of_an_auc(images) -> None:
    a, b = images(2.0), images(0.2)
    once = label_stats.delong(a, b)
    assert label_stats.delong(*(pd.concat([rows, rows]) for rows in (a, b))) == pytest.approx(once, nan_ok=True)
    back = label_stats.delong(b, a)
    assert (back.difference, back.low, back.high) == pytest.approx((-once.difference, -once.high, -once.low))


def test_where_no_auc_test_is_possible_it_says_why(images) -> None:
    rows = images()
    assert label_stats.delong(rows, rows)[1:] == (
        *(None, None, None),
        "the AUCs have no variance, as of arms that rank images alike",
    )
    assert label_stats.delong(rows.assign(patient="one"), images(2.0)).reason == "a label is of one patient alone"
