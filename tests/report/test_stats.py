"""The report's numbers against hand-worked values and scipy."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from bushpc.report import stats


def test_an_image_counts_once_in_its_fold_and_a_fold_once_in_the_mean(rows_with_dice) -> None:
    rows = rows_with_dice(0, {"first_pass": [0.2, 0.4]}) + rows_with_dice(1, {"first_pass": [0.9, 0.9, 0.9, 0.9]})
    means = stats.fold_means(pd.DataFrame(rows), "first_pass")["dice"]
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
    table = stats.stratum_means(pd.DataFrame(rows), "first_pass")
    assert table["n"].to_dict() == {"0-110": 2, "111-250": 2, "250+": 2}
    assert table["dice"].to_dict() == {
        "0-110": pytest.approx(0.05),
        "111-250": pytest.approx(0.25),
        "250+": pytest.approx(0.45),
    }


def test_the_paired_difference_matches_hand_and_scipy(rows_with_dice) -> None:
    rng = np.random.default_rng(5)
    first, gain = rng.uniform(0.3, 0.6, 80), rng.normal(0.1, 0.05, 80)
    rows = rows_with_dice(0, {"oracle": first + gain, "first_pass": first})
    found = stats.paired_difference(pd.DataFrame(rows).sample(frac=1, random_state=0), "first_pass", "oracle", "dice")
    assert found.mean == pytest.approx(gain.mean())
    assert (found.images, found.patients) == (80, 80)
    expected = scipy.stats.bootstrap(
        (gain,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    )
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=5e-4)


def test_the_interval_is_the_same_every_time(rows_with_dice) -> None:
    frame = pd.DataFrame(rows_with_dice(0, {"first_pass": [0.1, 0.5, 0.7], "oracle": [0.3, 0.6, 0.6]}))
    once, again = (stats.paired_difference(frame, "first_pass", "oracle", "dice") for _ in range(2))
    assert once == again


def test_copies_of_a_patients_image_do_not_narrow_the_interval(row) -> None:
    gains = [0.0, 0.1, 0.3, 0.05, 0.2, -0.1]
    single, copied = [], []
    for patient, gain in enumerate(gains):
        for copy in range(4):
            pair = [
                row(f"p{patient}c{copy}", 0, source, dice, patient=f"p{patient}")
                for source, dice in (("first_pass", 0.5), ("oracle", 0.5 + gain))
            ]
            copied += pair
            single += pair if copy == 0 else []
    a, b = (stats.paired_difference(pd.DataFrame(rows), "first_pass", "oracle", "dice") for rows in (single, copied))
    assert (a.low, a.high) == pytest.approx((b.low, b.high))
    assert (b.images, b.patients) == (24, 6)
