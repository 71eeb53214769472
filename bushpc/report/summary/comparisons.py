"""Arms against each other: per image, per fold, by the labels they give, on other datasets, and all at once."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bushpc.metrics.registry import IMAGE_METRICS
from bushpc.report import label_stats, stats
from bushpc.report.per_image import PROB_COLUMNS
from bushpc.report.results import Arm
from bushpc.report.scope import ArmVariant, ReportScope
from bushpc.report.stats import adjust
from bushpc.report.summary import comparison_records
from bushpc.report.summary.comparison_records import Against, Difference


def compare(scope: ReportScope) -> Against[comparison_records.Comparison] | None:
    """Every entry against the baseline, image by image and fold by fold; None without two entries or without masks."""
    reference = scope.reference
    others = [entry for entry in scope.entries if entry is not reference]
    if reference is None or not others or not scope.tested:
        return None
    rows = [_comparison(scope, entry, reference) for entry in others]
    tests = [row.metrics[metric] for row in rows for metric in scope.tested]
    # One family each, because they are two answers to the same questions.
    adjust([test.images for test in tests])
    adjust([test.folds for test in tests])
    return Against(against=reference.label, rows=rows)


def _comparison(scope: ReportScope, entry: ArmVariant, reference: ArmVariant) -> comparison_records.Comparison:
    """On the folds that are complete in both, and the images that both have."""
    folds = common_folds([entry, reference])
    differences = stats.paired_differences(_on(entry, folds), _on(reference, folds), scope.tested)
    expected = _expected(entry, reference)
    intervals = stats.intervals(differences, stats.defined(differences, scope.tested))
    # Every fold trains on all the others, so n_test / n_train is 1 / (k - 1), folds being of one size but for rounding.
    test_to_train = 1 / (expected - 1) if expected > 1 else 0.0
    by_fold = stats.fold_means(differences, scope.tested)
    metrics = {}
    for metric in scope.tested:
        interval = intervals.get(metric)
        metrics[metric] = comparison_records.MetricTests(
            images=comparison_records.ImageTest(
                mean=interval.mean if interval else None,
                ci95=interval.bounds if interval else None,
                **stats.improvement(metric, differences[metric])._asdict(),
                images=int(differences[metric].notna().sum()),
            ),
            folds=_fold_test(by_fold[metric].dropna().tolist(), test_to_train),
        )
    return comparison_records.Comparison(
        label=entry.label,
        arm=entry.arm.name,
        source=entry.source,
        folds=folds,
        expected=expected,
        images=len(differences),
        patients=int(differences["patient"].nunique()),
        metrics=metrics,
    )


def _fold_test(differences: list[float], test_to_train: float) -> comparison_records.FoldTest:
    if not differences:
        reason = "no fold is complete in both"
        return comparison_records.FoldTest(mean=None, ci95=None, t=None, df=None, p=None, reason=reason)
    test = stats.corrected_t(differences, test_to_train)
    bounds = None if test.low is None or test.high is None else (test.low, test.high)
    return comparison_records.FoldTest(mean=test.mean, ci95=bounds, t=test.t, df=test.df, p=test.p, reason=test.reason)


# --- labels -----------------------------------------------------------------------------------------------------


def compare_labels(scope: ReportScope) -> Against[comparison_records.LabelComparison] | None:
    """Label metrics of every entry against the baseline's, on the labelled images that both have; None without any."""
    reference = scope.reference
    if reference is None:
        return None
    compared = [_label_comparison(entry, reference) for entry in scope.entries if entry is not reference]
    rows = [row for row in compared if row is not None]
    if not rows:
        return None
    adjust([test for row in rows for test in (row.metrics["label_auc"], row.mcnemar) if test is not None])
    return Against(against=reference.label, rows=rows)


def _label_comparison(entry: ArmVariant, reference: ArmVariant) -> comparison_records.LabelComparison | None:
    folds = common_folds([entry, reference])
    ours, theirs = (label_stats.labelled(_on(each, folds)).set_index("key") for each in (entry, reference))
    common = ours.index.intersection(theirs.index)
    if common.empty:
        return None
    ours, theirs = ours.loc[common], theirs.loc[common]
    return comparison_records.LabelComparison(
        label=entry.label,
        arm=entry.arm.name,
        source=entry.source,
        folds=folds,
        expected=_expected(entry, reference),
        images=len(common),
        patients=int(ours["patient"].nunique()),
        metrics=_label_differences(ours, theirs),
        mcnemar=comparison_records.McNemarTest(**label_stats.mcnemar(ours, theirs)._asdict()),
    )


def _label_differences(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, Difference | None]:
    """By LABEL_METRICS, None where a metric is not defined; AUC has DeLong's test, and the interval that fits its p."""
    differences: dict[str, Difference | None] = {
        name: None if interval is None else _difference(interval)
        for name, interval in label_stats.label_differences(ours, theirs).items()
    }
    if auc := differences["label_auc"]:
        test = label_stats.delong(ours, theirs)
        auc.ci95 = None if test.low is None or test.high is None else (test.low, test.high)
        auc.p, auc.reason = test.p, test.reason
    return differences


def _difference(interval: stats.Interval) -> Difference:
    return Difference(mean=interval.mean, ci95=interval.bounds, partial_ci95=None)


# --- other datasets ---------------------------------------------------------------------------------------------


def compare_elsewhere(scope: ReportScope) -> Against[comparison_records.ExternalComparison] | None:
    """Every entry against the baseline on each other dataset that both were scored on; None without any.

    Each image counts once, with its mean over the models of the common folds. Datasets are left out if the generator of
    one arm's synthetic scans trained on them, since they are not unseen there.
    """
    reference = scope.reference
    if reference is None:
        return None

    def unseen(arm: Arm, name: str) -> bool:
        return name in arm.external and name not in arm.generator_saw

    rows = [
        _external_comparison(scope, entry, reference, name)
        for name in scope.external
        for entry in scope.entries
        if entry is not reference and unseen(entry.arm, name) and unseen(reference.arm, name)
    ]
    if not rows:
        return None
    adjust([test for row in rows for test in row.metrics.values() if test.tested])
    return Against(against=reference.label, rows=rows)


def _external_comparison(
    scope: ReportScope, entry: ArmVariant, reference: ArmVariant, name: str
) -> comparison_records.ExternalComparison:
    folds = common_folds([entry, reference])
    ours, theirs = (_over_folds(each.arm.external[name], folds) for each in (entry, reference))
    differences = stats.paired_differences(ours, theirs, scope.tested)
    metrics: dict[str, Difference] = {}
    for metric, interval in stats.intervals(differences, stats.defined(differences, scope.tested)).items():
        difference = metrics[metric] = _difference(interval)
        test = stats.improvement(metric, differences[metric])
        difference.p, difference.effect, difference.reason = test.p, test.effect, test.reason
        difference.n, difference.zeros = test.n, test.zeros
    ours, theirs = (label_stats.labelled(rows).set_index("key") for rows in (ours, theirs))
    common = ours.index.intersection(theirs.index)
    if len(common):
        ours, theirs = ours.loc[common], theirs.loc[common]
        for metric, label_difference in _label_differences(ours, theirs).items():
            if label_difference is not None and metric in scope.metrics:
                metrics[metric] = label_difference
                if metric == "label_accuracy":
                    label_difference.p = label_stats.mcnemar(ours, theirs).p
    return comparison_records.ExternalComparison(
        label=entry.label,
        arm=entry.arm.name,
        data=name,
        folds=folds,
        expected=_expected(entry, reference),
        images=len(differences),
        metrics=metrics,
    )


def _over_folds(rows: pd.DataFrame, folds: list[int]) -> pd.DataFrame:
    """One row per image: its metrics and label probabilities are means over the models of these folds."""
    by_key = rows[rows["fold"].isin(folds)].groupby("key", sort=False)
    means = by_key[[*IMAGE_METRICS, *PROB_COLUMNS]].mean()
    return by_key[["patient", "label", "fold"]].first().join(means).reset_index()


# --- all at once ------------------------------------------------------------------------------------------------


def rank_all(scope: ReportScope) -> comparison_records.FriedmanTest | None:
    """The headline metric on the images that all entries have; None for fewer than three entries, or labels alone."""
    entries = scope.entries
    if len(entries) < 3 or not scope.tested:
        return None
    folds = common_folds(entries)
    metric = scope.headline_metric
    columns = [_on(entry, folds).set_index("key")[metric].dropna() for entry in entries]
    score_NK = pd.concat(columns, axis=1, join="inner").to_numpy(float) if folds else np.empty((0, len(entries)))
    test = stats.friedman(score_NK if IMAGE_METRICS[metric].more_is_better else -score_NK)
    return comparison_records.FriedmanTest(
        metric=metric,
        labels=[entry.label for entry in entries],
        folds=folds,
        images=test.n,
        chi2=test.chi2,
        p=test.p,
        ranks=test.rank_K,
        nemenyi=test.nemenyi_KK,
        reason=test.reason if folds else "no fold is complete in every arm",
    )


def common_folds(entries: list[ArmVariant]) -> list[int]:
    """Folds that are complete in every one of them."""
    return sorted(set.intersection(*({cell.fold for cell in entry.arm.complete_cells} for entry in entries)))


def _on(entry: ArmVariant, folds: list[int]) -> pd.DataFrame:
    rows = entry.arm.rows(entry.source)
    return rows[rows["fold"].isin(folds)]


def _expected(entry: ArmVariant, reference: ArmVariant) -> int:
    """Number of folds of the longer one."""
    return max(len(entry.arm.cells), len(reference.arm.cells))
