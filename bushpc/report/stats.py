"""Frames → numbers: means, intervals, tests, size strata, calibration. No files, no formatting.

Figures that cannot be computed are None, never NaN; tests that are not possible also have a reason as text.
"""

from __future__ import annotations

import math
import typing as t
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.stats

from bushpc.metrics.registry import ALWAYS, IMAGE_METRICS


class Stratum(t.NamedTuple):
    """Lesions whose length is in low..high pixels, both ends included."""

    name: str
    low: float
    high: float


# XBusNet's Table 2. The paper prints 0-110, 111-250 and 250+ and does not define "length". Here it is the longest
# side of the lesion's bounding box in original pixels, and 250 belongs to the middle stratum. Measured on
# BrEaST's 252 tumour masks, that gives 49, 142 and 61 lesions (lengths 52 to 599, one of exactly 250, none of
# 110). Weighted by these counts, the strata of Table 2 average to Dice 0.8766 and IoU 0.8149, the paper's own
# overall figures, so this reading of "length" fits what was published.
STRATA = (Stratum("0-110", 1, 110), Stratum("111-250", 111, 250), Stratum("250+", 251, float("inf")))

BOOTSTRAP_RESAMPLES = 10_000
BOOTSTRAP_SEED = 2025
_AT_ONCE = 500  # resamples; bounds the memory for datasets of thousands of patients


class Interval(t.NamedTuple):
    """A mean with the bounds of its 95 % confidence interval; None if there is nothing to resample."""

    mean: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


class Test(t.Protocol):
    """A test of a family. p: None if it was not possible. p_holm: p adjusted for the family."""

    @property
    def p(self) -> t.Any: ...

    p_holm: t.Any


class SignedRank(t.NamedTuple):
    """Wilcoxon's signed-rank test of paired differences, two-sided.

    p: None if no test is possible; `reason` says why.
    effect: matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), from -1 to 1 (Kerby 2014).
    n: differences that are not zero; the test and the effect size are of these (Wilcoxon's own zero handling).
    """

    p: float | None
    effect: float | None
    n: int
    zeros: int
    reason: str | None


class CorrectedT(t.NamedTuple):
    """The corrected resampled t-test of fold means, with the 95 % interval of the mean difference."""

    mean: float
    low: float | None
    high: float | None
    t: float | None
    df: int
    p: float | None
    reason: str | None


class Friedman(t.NamedTuple):
    """Friedman's test of k arms on n images and Nemenyi's post hoc p for each pair of arms.

    chi2, p, nemenyi_KK: None if no test is possible; `reason` says why. rank_K: mean rank, 1 is the best.
    """

    n: int
    chi2: float | None
    p: float | None
    rank_K: list[float]
    nemenyi_KK: list[list[float]] | None
    reason: str | None


class Calibration(t.NamedTuple):
    """ece: expected calibration error. prob, lesion: mean predicted probability, and share of lesion pixels."""

    ece: float
    prob: float
    lesion: float
    pixels: int


def fold_means(rows: pd.DataFrame, metrics: Sequence[str] = ALWAYS) -> pd.DataFrame:
    """Mean over the images of each fold (paper, section 2.4): rows are folds, columns the image metrics.

    Images for which a metric is undefined are left out of its mean, as everywhere here; without any it is NaN.
    """
    return rows.groupby("fold")[list(metrics)].mean()


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof=1); one value has no standard deviation.

    ddof=1 is also what the paper used: it turns Table 3's folds into Table 1's 0.014, 0.013, 0.020, 0.012.
    """
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def stratum_means(rows: pd.DataFrame, metrics: Sequence[str] = ALWAYS) -> pd.DataFrame:
    """Mean over the images of each size stratum, all folds together: rows are STRATA, columns n and the metrics.

    Images without a lesion (length 0) are in no stratum; an empty stratum has n = 0 and NaN for its means.
    """
    table = {}
    for stratum in STRATA:
        inside = rows[rows["length_px"].between(stratum.low, stratum.high)]
        table[stratum.name] = {"n": len(inside), **inside[list(metrics)].mean()}
    return pd.DataFrame.from_dict(table, orient="index").astype({"n": int})


def paired_differences(rows: pd.DataFrame, baseline: pd.DataFrame, metrics: Sequence[str] = ALWAYS) -> pd.DataFrame:
    """`rows` minus `baseline` on the images that both have: indexed by key, columns metrics, patient and fold."""
    both = rows.set_index("key").join(baseline.set_index("key")[list(metrics)], how="inner", rsuffix="_baseline")
    differences = {metric: both[metric] - both[f"{metric}_baseline"] for metric in metrics}
    return both[["patient", "fold"]].assign(**differences).sort_index()


def intervals(rows: pd.DataFrame, metrics: Sequence[str] = ALWAYS) -> dict[str, Interval]:
    """Mean over images of every metric (or difference) with its percentile bootstrap interval, by metric.

    Patients are drawn, not images, because images of one patient are not independent. A single patient gives no
    interval. Only for metrics that some image has.
    """
    if not metrics:
        return {}
    by_patient = rows.groupby("patient")[list(metrics)]
    bounds = _bootstrap_bounds(by_patient.sum().to_numpy(float), by_patient.count().to_numpy(float))
    return {metric: Interval(float(rows[metric].mean()), *bounds[m]) for m, metric in enumerate(metrics)}


def _bootstrap_bounds(sum_PM: np.ndarray, size_PM: np.ndarray) -> list[tuple[float | None, float | None]]:
    """2.5 and 97.5 percentiles of each of M means when P patients are drawn P times with replacement.

    size_PM: images of a patient for which the metric is defined.
    """
    means = []
    for times_RP in resamples(len(sum_PM)):
        with np.errstate(invalid="ignore"):  # 0 / 0 where no image of a resample has the metric
            means.append(times_RP @ sum_PM / (times_RP @ size_PM))
    several_M = (size_PM > 0).sum(axis=0) > 1
    found = percentiles(means, len(several_M))
    return [bounds if several else (None, None) for bounds, several in zip(found, several_M, strict=True)]


def percentiles(parts: Sequence[np.ndarray], metrics: int) -> list[tuple[float | None, float | None]]:
    """2.5 and 97.5 percentiles of each of M metrics over resamples, leaving out those in which it is undefined.

    parts: arrays of (resamples, M). Without any value both are None.
    """
    found: list[tuple[float | None, float | None]] = []
    for value_R in np.concatenate([*parts, np.empty((0, metrics))]).T:
        defined = value_R[~np.isnan(value_R)]
        low, high = np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) else (None, None)
        found.append((low, high))
    return found


def resamples(patients: int) -> t.Iterator[np.ndarray]:
    """How often each of P patients is drawn when P are drawn with replacement, for BOOTSTRAP_RESAMPLES resamples.

    Yields float arrays of (resamples at once, P), the same in every call; nothing for a single patient.
    """
    if patients < 2:
        return
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    for _ in range(BOOTSTRAP_RESAMPLES // _AT_ONCE):
        drawn_RP = rng.integers(patients, size=(_AT_ONCE, patients))
        slot_RP = drawn_RP + patients * np.arange(_AT_ONCE)[:, None]
        yield np.bincount(slot_RP.ravel(), minlength=slot_RP.size).reshape(slot_RP.shape).astype(float)


def signed_rank(differences: Sequence[float]) -> SignedRank:
    """Paired Wilcoxon signed-rank test with its effect size (XBusNet 3.1): exact for few images, else normal.

    differences: one per image. Those of exactly zero are dropped, as Wilcoxon did, and those that are not defined.
    """
    difference_N = np.asarray(differences, float)
    difference_N = difference_N[~np.isnan(difference_N)]
    nonzero_N = difference_N[difference_N != 0]
    zeros = len(difference_N) - len(nonzero_N)
    if not len(nonzero_N):
        return SignedRank(None, None, 0, zeros, "no image differs" if zeros else "no common image")
    rank_N = scipy.stats.rankdata(np.abs(nonzero_N))
    effect = float((np.sign(nonzero_N) * rank_N).sum() / rank_N.sum())
    return SignedRank(float(scipy.stats.wilcoxon(nonzero_N).pvalue), effect, len(nonzero_N), zeros, None)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment over one family (Holm 1979); tests without p stay None and don't count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def adjust(family: Sequence[Test]) -> None:
    """Set Holm's p of every test of one family."""
    for test, adjusted in zip(family, holm([test.p for test in family]), strict=True):
        test.p_holm = adjusted


def improvement(metric: str, differences: pd.Series) -> SignedRank:
    """Wilcoxon's test; a positive effect is an improvement, whatever the metric's direction."""
    better = differences if IMAGE_METRICS[metric].more_is_better else -differences
    return signed_rank(better.to_numpy())


def or_none(value: float) -> float | None:
    """None instead of NaN."""
    return None if np.isnan(value) else float(value)


def defined(rows: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """The image metrics that at least one image has."""
    return [metric for metric in metrics if metric in IMAGE_METRICS and rows[metric].notna().any()]


def corrected_t(differences: Sequence[float], test_to_train: float) -> CorrectedT:
    """Nadeau and Bengio's corrected resampled t-test (2003). Folds share training data, so variance / k is too small;
    variance * (1/k + n_test/n_train) is used instead.

    differences: of the k fold means. test_to_train: n_test / n_train.
    """
    mean, sd = mean_and_sd(differences)
    df = len(differences) - 1
    if sd is None:
        return CorrectedT(mean, None, None, None, df, None, "one fold has no variance")
    if sd <= 1e-12:  # rounding of equal differences, no figure of a metric from 0 to 1
        return CorrectedT(mean, None, None, None, df, None, "all folds differ by the same amount")
    error = sd * math.sqrt(1 / len(differences) + test_to_train)
    half = error * float(scipy.stats.t.ppf(0.975, df))
    p = 2 * float(scipy.stats.t.sf(abs(mean) / error, df))
    return CorrectedT(mean, mean - half, mean + half, mean / error, df, p, None)


def friedman(score_NK: np.ndarray) -> Friedman:
    """Friedman's test with Nemenyi's post hoc (hybrid-attention paper, 5.1.1): do K arms differ on the same N images?

    score_NK: one row per image, higher is better.
    """
    images, arms = score_NK.shape
    rank_K = scipy.stats.rankdata(-score_NK, axis=1).mean(axis=0).tolist() if images else []
    if arms < 3 or images < 2:
        return Friedman(images, None, None, rank_K, None, "it needs three arms or more and two images or more")
    if (score_NK == score_NK[:, :1]).all():
        return Friedman(images, None, None, rank_K, None, "all arms score alike on every image")
    import scikit_posthocs  # brings seaborn and statsmodels, which take seconds to import

    chi2, p = scipy.stats.friedmanchisquare(*score_NK.T)
    nemenyi_KK = scikit_posthocs.posthoc_nemenyi_friedman(score_NK).to_numpy(float).tolist()
    return Friedman(images, float(chi2), float(p), rank_K, nemenyi_KK, None)


def reliability(bins: pd.DataFrame) -> pd.DataFrame:
    """Bins summed over folds, by bin: mean predicted `prob`, observed `lesion` share, `pixels`; without empty bins.

    bins: rows of one prompt source, columns bin, pixels, prob_sum, lesion_pixels.
    """
    summed = bins.groupby("bin")[["pixels", "prob_sum", "lesion_pixels"]].sum()
    summed = summed[summed["pixels"] > 0]
    return pd.DataFrame(
        {
            "prob": summed["prob_sum"] / summed["pixels"],
            "lesion": summed["lesion_pixels"] / summed["pixels"],
            "pixels": summed["pixels"],
        }
    )


def calibration(bins: pd.DataFrame) -> Calibration | None:
    """Expected calibration error (Naeini 2015; Guo 2017) over pixels: |lesion share - mean probability| of each bin,
    weighted by its pixels. None without a pixel.
    """
    curve = reliability(bins)
    if curve.empty:
        return None
    share = curve["pixels"] / curve["pixels"].sum()
    return Calibration(
        ece=float((share * (curve["lesion"] - curve["prob"]).abs()).sum()),
        prob=float((share * curve["prob"]).sum()),
        lesion=float((share * curve["lesion"]).sum()),
        pixels=int(curve["pixels"].sum()),
    )
