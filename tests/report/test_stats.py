"""The report's numbers against scipy, scikit-posthocs, statsmodels, torchmetrics,
closed forms and hand-worked cases.
"""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torchmetrics.functional.classification
from statsmodels.stats.multitest import multipletests

from bushpc.report import stats


def test_an_image_counts_once_in_its_fold_and_a_fold_once_in_the_mean(rows_with_dice) -> None:
    rows = rows_with_dice(0, {"first_pass": [0.2, 0.4]}) + rows_with_dice(1, {"first_pass": [0.9, 0.9, 0.9, 0.9]})
    means = stats.fold_means(pd.DataFrame(rows))["dice"]
    assert means.to_dict() == {0: pytest.approx(0.3), 1: pytest.approx(0.9)}
    assert stats.mean_and_sd(list(means))[0] == pytest.approx(0.6)  # the mean over all six images would be 0.7


def test_sd_is_the_sample_sd_and_one_fold_has_none() -> None:
    assert stats.mean_and_sd([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(np.sqrt(7 / 3)))
    assert stats.mean_and_sd([0.5]) == (0.5, None)


def test_sample_sd_turns_the_papers_folds_into_the_papers_sd() -> None:
    table_3 = {
        "dice": [0.8846, 0.8910, 0.8583, 0.8649, 0.8836],
        "iou": [0.8241, 0.8302, 0.7987, 0.8033, 0.8181],
        "fpr": [0.0984, 0.1280, 0.1077, 0.0857, 0.0771],
        "fnr": [0.0670, 0.0659, 0.0835, 0.0771, 0.0944],
    }
    table_1 = {"dice": 0.014, "iou": 0.013, "fpr": 0.020, "fnr": 0.012}
    assert {metric: round(stats.mean_and_sd(values)[1], 3) for metric, values in table_3.items()} == table_1


def test_strata_hold_110_and_250_below_and_111_and_251_above(row) -> None:
    lengths = [1, 110, 111, 250, 251, 900, 0]  # the last has no lesion
    rows = [row(f"i{i}", 0, dice=i / 10, length_px=length) for i, length in enumerate(lengths)]
    table = stats.stratum_means(pd.DataFrame(rows))
    assert table["n"].to_dict() == {"0-110": 2, "111-250": 2, "250+": 2}
    assert table["dice"].to_dict() == {
        "0-110": pytest.approx(0.05),
        "111-250": pytest.approx(0.25),
        "250+": pytest.approx(0.45),
    }


def _differences(a, b) -> pd.DataFrame:
    return stats.paired_differences(pd.DataFrame(a), pd.DataFrame(b))


def test_the_paired_difference_and_its_interval_match_hand_and_scipy(rows_with_dice) -> None:
    rng = np.random.default_rng(5)
    first, gain = rng.uniform(0.3, 0.6, 80), rng.normal(0.1, 0.05, 80)
    shuffled = pd.DataFrame(rows_with_dice(0, {"oracle": first + gain})).sample(frac=1, random_state=0)
    found = _differences(shuffled, rows_with_dice(0, {"first_pass": first}))
    assert found["dice"].sort_values().tolist() == pytest.approx(sorted(gain))
    mean, low, high = stats.intervals(found)["dice"]
    assert mean == pytest.approx(gain.mean())
    expected = scipy.stats.bootstrap(
        (gain,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    )
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=5e-4)


def test_only_images_that_both_have_are_compared(row) -> None:
    a = [row("both", 0, dice=0.9), row("only_a", 0, dice=0.1)]
    b = [row("only_b", 0, dice=0.5), row("both", 0, dice=0.6)]
    found = _differences(a, b)
    assert found["dice"].to_dict() == {"both": pytest.approx(0.3)}


def test_the_interval_is_the_same_every_time_and_a_single_patient_has_none(rows_with_dice) -> None:
    rows = pd.DataFrame(rows_with_dice(0, {"first_pass": [0.1, 0.5, 0.7]}))
    assert stats.intervals(rows) == stats.intervals(rows)
    mean, *bounds = stats.intervals(rows.assign(patient="one"))["dice"]
    assert mean == pytest.approx(1.3 / 3)
    assert bounds == [None, None]


def test_copies_of_a_patients_image_do_not_narrow_the_interval(row) -> None:
    dice = [0.5, 0.6, 0.8, 0.55, 0.7, 0.4]
    copied = pd.DataFrame(
        [row(f"p{i}c{copy}", 0, dice=value, patient=f"p{i}") for i, value in enumerate(dice) for copy in range(4)]
    )
    single = copied[copied["key"].str.endswith("c0")]
    a, b = (stats.intervals(rows)["dice"] for rows in (single, copied))
    assert (a.low, a.high) == pytest.approx((b.low, b.high))


def test_wilcoxon_by_hand_drops_zeros_and_gives_the_rank_biserial_correlation() -> None:
    # Without the two zeros: ranks of 0.1, -0.2, 0.3, 0.4, 0.5 are 1 to 5; W+ = 13, W- = 2, so r = 11 / 15.
    # Of the 2^5 sign patterns, W- <= 2 has three (none, {1}, {2}): two-sided p = 6 / 32.
    found = stats.signed_rank([0.1, -0.2, 0.0, 0.3, 0.4, 0.5, 0.0])
    assert (found.n, found.zeros, found.reason) == (5, 2, None)
    assert found.effect == pytest.approx(11 / 15)
    assert found.p == pytest.approx(6 / 32)


def test_wilcoxon_of_many_images_is_scipys_of_the_pairs_and_turns_with_the_arms() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.uniform(0.5, 1, 200), rng.uniform(0.4, 1, 200)
    found, turned = stats.signed_rank(a - b), stats.signed_rank(b - a)
    assert found.p == pytest.approx(scipy.stats.wilcoxon(a, b, zero_method="wilcox").pvalue)
    assert turned.p == pytest.approx(found.p)
    assert turned.effect == pytest.approx(-found.effect)
    assert stats.signed_rank(np.linspace(0.1, 0.2, 30)).effect == 1


def test_nothing_to_test_is_said_in_words_and_never_nan() -> None:
    assert stats.signed_rank([0.0, 0.0]) == (None, None, 0, 2, "no image differs")
    assert stats.signed_rank([]).reason == "no common image"
    assert stats.corrected_t([0.1], 0.25)[4:] == (0, None, "one fold has no variance")
    assert stats.corrected_t([0.1, 0.1, 0.1], 0.25).reason == "all folds differ by the same amount"
    assert stats.friedman(np.ones((9, 2))).reason == "it needs three arms or more and two images or more"
    assert stats.friedman(np.ones((9, 3))).reason == "all arms score alike on every image"
    assert stats.calibration(_bins([0], [0.0], [0])) is None


def test_holm_matches_statsmodels_and_passes_over_what_has_no_p() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005, 0.7, 0.04]
    expected = multipletests(p_values, method="holm")[1].tolist()
    assert stats.holm(p_values) == pytest.approx(expected)
    assert stats.holm([None, *p_values])[0] is None
    assert stats.holm([None, *p_values])[1:] == pytest.approx(expected)


def test_the_corrected_t_test_is_the_papers_formula_and_without_overlap_the_plain_one() -> None:
    differences = [0.02, 0.01, 0.03, -0.01, 0.02]  # mean 0.014, variance 0.00023
    found = stats.corrected_t(differences, 1 / 4)
    assert found.t == pytest.approx(0.014 / np.sqrt((1 / 5 + 1 / 4) * 0.00023))
    assert found.df == 4
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(found.t, 4))
    assert found.high - found.mean == pytest.approx(2.776445 * np.sqrt(0.45 * 0.00023))  # t table: 0.975, df 4
    plain, scipys = stats.corrected_t(differences, 0), scipy.stats.ttest_1samp(differences, 0)
    assert (plain.t, plain.p) == pytest.approx((scipys.statistic, scipys.pvalue))
    assert (plain.low, plain.high) == pytest.approx(tuple(scipys.confidence_interval()))


def test_friedman_by_hand_and_nemenyi_by_its_studentised_range() -> None:
    # Ranks of every one of 4 images: first arm 1, second 2, third 3. chi2 = 12 / (4*3*4) * (16 + 64 + 144) - 3*4*4 = 8.
    score = np.array([[0.9, 0.5, 0.1], [0.8, 0.6, 0.2], [0.7, 0.5, 0.3], [0.95, 0.4, 0.2]])
    found = stats.friedman(score)
    assert (found.n, found.rank_K, found.reason) == (4, [1, 2, 3], None)
    assert found.chi2 == pytest.approx(8)
    assert found.p == pytest.approx(scipy.stats.chi2.sf(8, 2))
    q = (3 - 1) / np.sqrt(3 * 4 / (6 * 4)) * np.sqrt(2)
    assert found.nemenyi_KK[0][2] == pytest.approx(scipy.stats.studentized_range.sf(q, 3, np.inf), abs=1e-6)
    assert found.nemenyi_KK[1][1] == 1


def _bins(pixels, prob_sum, lesion_pixels) -> pd.DataFrame:
    return pd.DataFrame(
        {"bin": range(len(pixels)), "pixels": pixels, "prob_sum": prob_sum, "lesion_pixels": lesion_pixels}
    )


def test_the_calibration_error_matches_torchmetrics_and_a_hand_worked_case() -> None:
    # 80 pixels said 0.1 of which 10 % are lesion (right), 20 said 0.9 of which half are: 0.2 * 0.4 = 0.08.
    by_hand = stats.calibration(_bins([80, 0, 20], [8.0, 0.0, 18.0], [8, 0, 10]))
    assert by_hand == (pytest.approx(0.08), pytest.approx(0.26), pytest.approx(0.18), 100)
    rng = np.random.default_rng(0)
    prob, truth = rng.uniform(0.001, 0.999, 5000), rng.uniform(0, 1, 5000) < 0.3
    which = np.minimum((prob * 15).astype(int), 14)
    sums = [np.bincount(which, weights, minlength=15) for weights in (np.ones(5000), prob, truth)]
    found = stats.calibration(pd.concat([_bins(*(half / 2 for half in sums))] * 2))  # two folds of half each
    expected = torchmetrics.functional.classification.binary_calibration_error(
        torch.tensor(prob), torch.tensor(truth.astype(int)), n_bins=15, norm="l1"
    )
    assert found.ece == pytest.approx(float(expected), abs=1e-6)
