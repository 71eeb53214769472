"""Numbers → `summary.json`: the one set of figures that machines, tables and page all take theirs from.

While a fold is missing, `mean` and `sd` are null and what can be said stands in `partial_mean`. A program that
collects `mean` over many runs then fails on an incomplete one instead of averaging it in.
"""

from __future__ import annotations

import typing as t

import numpy as np
import pandas as pd

from bushpc.metrics.registry import IMAGE_METRICS, LABEL_METRICS
from bushpc.report import label_stats, stats
from bushpc.report.costs import Cost, cost_of
from bushpc.report.results import PROB_COLUMNS, Arm, of_class
from bushpc.report.study import Entry, Study
from bushpc.sample import LABELS

STRATIFIED = ("dice", "iou")  # as in XBusNet's Table 2, where they are among the chosen ones


def summarise(study: Study) -> dict[str, t.Any]:
    """The content of `summary.json`; floats at full precision, only JSON types.

    The figures of every arm stand in `arms`, those of a run with one arm at the top level, too.
    """
    arms = [_arm(study, arm) for arm in study.arms]
    if len(arms) > 1:
        _adjust([test for arm in arms for test in arm["source_tests"].values()])
    run = study.runs[0].run
    return {
        **(arms[0] if len(arms) == 1 else {}),
        "title": study.title,
        "kind": study.kind,
        # An excerpt has another name, so that no figure published for the whole dataset stands beside it.
        "data": run.data + (" (excerpt)" if run.excerpt else ""),
        "folds_source": run.folds.source,
        "complete": all(arm.complete for arm in study.arms),
        "baseline": study.baseline.name,
        "shown_metrics": study.metrics,
        "undefined_metrics": study.undefined,
        "tested_metrics": study.tested,
        "headline_metric": study.headline_metric,
        "cost": _cost(cost_of(cell for arm in study.arms for cell in arm.cells)),
        "entries": [
            {
                "arm": study.arms.index(entry.arm),
                "source": entry.source,
                "label": entry.label,
                "uses_ground_truth": entry.uses_ground_truth,
            }
            for entry in study.entries
        ],
        "comparisons": _comparisons(study),
        "label_comparisons": _label_comparisons(study),
        "external": study.external,
        "external_comparisons": _external_comparisons(study),
        "friedman": _friedman(study),
        "arms": arms,
    }


def _arm(study: Study, arm: Arm) -> dict[str, t.Any]:
    shown = {entry.source for entry in study.entries if entry.arm is arm}
    return {
        "arm": arm.name,
        "label": arm.label,
        "run": arm.run.name,
        "model": arm.model,
        "settings": _settings(study, arm),
        "parameters": next((cell.parameters for cell in arm.cells if cell.parameters), None),
        "complete": arm.complete,
        "synthetic": _synthetic(arm),
        "folds": {
            "source": arm.run.folds.source,
            "expected": len(arm.cells),
            "complete": [cell.fold for cell in arm.complete_cells],
            "missing": [{"cell": cell.name, "fold": cell.fold, "reason": cell.reason} for cell in arm.missing_cells],
        },
        "headline": arm.headline,
        "threshold": arm.threshold,
        "sources": {
            source: {"label": arm.source_label(source), "uses_ground_truth": arm.uses_ground_truth(source)}
            for source in arm.sources
        },
        "images": {str(cell.fold): _images(cell.per_image) for cell in arm.complete_cells},
        "metrics": {source: _metrics(study, arm, source, source in shown) for source in arm.sources},
        "mask_classes": list(arm.classes),
        "by_class": {source: _by_class(study, arm, source) for source in arm.sources},
        "strata": {source: _strata(study, arm, source) for source in arm.sources},
        "normals": {source: _normals(arm, source) for source in arm.sources},
        "labels": {source: _labels(arm, source) if source in shown else None for source in arm.sources},
        "external": {name: _external(study, arm, name, rows) for name, rows in arm.external.items()},
        "tolerance": arm.tolerance,
        "calibration": _calibration(arm),
        # What its sources differ in: one arm has room for all metrics, and its tests are its comparisons.
        "difference": _oracle_difference(study, arm) if len(study.arms) == 1 else None,
        "source_tests": _source_tests(study, arm) if len(study.arms) > 1 else {},
        "cost": _cost(cost_of(arm.cells)),
    }


def _settings(study: Study, arm: Arm) -> dict[str, t.Any]:
    """What the rows of a grid state, for every arm: where its own row does not, its config does."""
    stated = dict.fromkeys(key for other in study.arms for key in other.given)
    composed = next((cell.settings for cell in arm.cells if cell.settings), {})
    return {key: arm.given.get(key, composed.get(key)) for key in stated}


def _synthetic(arm: Arm) -> dict[str, t.Any] | None:
    """What synthetic scans the arm trained on; None without any. sha256: of their manifest, by fold."""
    cells = [
        cell for cell in arm.cells if cell.settings.get("data.synthetic") and cell.settings["data.synthetic_ratio"]
    ]
    if not cells:
        return None
    return {
        "ratio": cells[0].settings["data.synthetic_ratio"],
        "real": cells[0].settings["data.real"],
        "sha256": {str(cell.fold): cell.settings["data.synthetic_sha256"] for cell in cells},
    }


def _images(per_image: pd.DataFrame | None) -> int:
    assert per_image is not None, "asked of a cell that is not complete"
    return int(per_image["key"].nunique())


def _whole_or_partial(mean: float | None, complete: bool) -> dict[str, float | None]:
    return {"mean": mean if complete else None, "partial_mean": None if complete else mean}


def _interval(found: stats.Interval | None, complete: bool) -> dict[str, t.Any]:
    bounds = None if found is None or found.low is None else [found.low, found.high]
    return {"ci95": bounds if complete else None, "partial_ci95": None if complete else bounds}


def _figure(per_fold: dict[str, float | None], complete: bool) -> dict[str, t.Any]:
    """Mean and SD over the folds that have a value."""
    values = [value for value in per_fold.values() if value is not None]
    mean, sd = stats.mean_and_sd(values) if values else (None, None)
    return {**_whole_or_partial(mean, complete), "sd": sd if complete else None}


def _metrics(study: Study, arm: Arm, source: str, shown: bool) -> dict[str, t.Any]:
    """Intervals only for what the tables show: a thousand cells have many sources that nobody reads intervals of."""
    rows = arm.rows(source)
    intervals = stats.intervals(rows, _defined(rows, study.measured)) if shown else {}
    summary = {}
    for metric, per_fold in _per_fold(rows, study.measured).items():
        summary[metric] = {
            **_figure(per_fold, arm.complete),
            **(_interval(intervals.get(metric), arm.complete) if shown and metric in IMAGE_METRICS else {}),
            "per_fold": per_fold,
            **({"images": int(rows[metric].notna().sum())} if metric in IMAGE_METRICS else {}),
        }
    return summary


def _per_fold(rows: pd.DataFrame, metrics: list[str]) -> dict[str, dict[str, float | None]]:
    """Metric → fold → value; None where no image of the fold has it."""
    of_images = [metric for metric in metrics if metric in IMAGE_METRICS]
    image = stats.fold_means(rows, of_images) if of_images else {}
    told = label_stats.labelled(rows)
    label = {fold: label_stats.point_values(part) for fold, part in told.groupby("fold")}
    of_label = dict.fromkeys(LABEL_METRICS)
    return {
        metric: {str(fold): _or_none(value) for fold, value in image[metric].items()}
        if metric in IMAGE_METRICS
        else {str(fold): label.get(fold, of_label)[metric] for fold in sorted(rows["fold"].unique())}
        for metric in metrics
    }


def _by_class(study: Study, arm: Arm, source: str) -> dict[str, t.Any]:
    """Mask class → image metric → as in `_metrics`; metrics that were not measured by class are left out."""
    rows = arm.rows(source)
    summary: dict[str, t.Any] = {}
    for name in arm.classes:
        columns = {metric: of_class(metric, name) for metric in study.image_metrics}
        columns = {metric: column for metric, column in columns.items() if column in rows}
        means = stats.fold_means(rows, list(columns.values()))
        summary[name] = {}
        for metric, column in columns.items():
            per_fold = {str(fold): _or_none(value) for fold, value in means[column].items()}
            images = int(rows[column].notna().sum())
            summary[name][metric] = {**_figure(per_fold, arm.complete), "per_fold": per_fold, "images": images}
    return summary


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _strata(study: Study, arm: Arm, source: str) -> dict[str, t.Any]:
    metrics = [metric for metric in study.metrics if metric in STRATIFIED] or study.tested[:1]
    summary = {}
    for name, row in stats.stratum_means(arm.rows(source), metrics).to_dict("index").items():
        means = {metric: _or_none(row[metric]) for metric in metrics}
        summary[str(name)] = {
            "n": int(row["n"]),
            **{metric: _whole_or_partial(mean, arm.complete) for metric, mean in means.items()},
        }
    return summary


def _normals(arm: Arm, source: str) -> dict[str, t.Any] | None:
    """False alarms on scans without a lesion, which have no overlap to measure; None without any, or without masks.

    alarmed: share of them with a predicted pixel.
    """
    rows = arm.rows(source)
    normal = rows[rows["label"] == "normal"]
    if normal["fpr"].isna().all():
        return None
    found = stats.fold_means(normal.assign(alarmed=(normal["fp"] > 0).astype(float)), ["fpr", "alarmed"])
    summary: dict[str, t.Any] = {"n": len(normal)}
    for name in ("fpr", "alarmed"):
        per_fold: dict[str, float | None] = {str(fold): float(value) for fold, value in found[name].items()}
        summary[name] = {**_figure(per_fold, arm.complete), "per_fold": per_fold}
    return summary


def _labels(arm: Arm, source: str) -> dict[str, t.Any] | None:
    """Label metrics of the images of all folds together, with intervals; None where no image has label and answer."""
    rows = label_stats.labelled(arm.rows(source))
    if rows.empty:
        return None
    counts = rows["label"].value_counts()
    return {
        "images": {label: int(counts.get(label, 0)) for label in LABELS},
        "patients": int(rows["patient"].nunique()),
        "confusion": label_stats.confusion_matrix(rows).tolist(),
        **{
            name: None
            if found is None
            else {**_whole_or_partial(found.mean, arm.complete), **_interval(found, arm.complete)}
            for name, found in label_stats.label_intervals(rows).items()
        },
    }


def _external(study: Study, arm: Arm, name: str, rows: pd.DataFrame) -> dict[str, t.Any]:
    """Metrics over all images of another dataset, a figure for each fold's model; as in `_metrics`, without intervals.

    rows: of all complete cells. seen_by_generator: the generator of its synthetic scans trained on some of them.
    """
    return {
        "images": int(rows["key"].nunique()),
        "patients": int(rows["patient"].nunique()),
        "seen_by_generator": name in arm.generator_saw,
        "metrics": {
            metric: {**_figure(per_fold, arm.complete), "per_fold": per_fold}
            for metric, per_fold in _per_fold(rows, study.measured).items()
        },
    }


def _calibration(arm: Arm) -> dict[str, t.Any] | None:
    """By prompt source; None where the evaluation of a fold wrote no bins."""
    bins = arm.calibration
    if bins is None:
        return None
    summary = {}
    for source in arm.sources:
        rows = bins[bins["prompts"] == source]
        pooled = stats.calibration(rows)
        per_fold = {str(fold): stats.calibration(part) for fold, part in rows.groupby("fold")}
        eces = {fold: found.ece for fold, found in per_fold.items() if found is not None}
        if pooled is None or len(eces) < len(arm.complete_cells):
            continue
        mean, sd = stats.mean_and_sd(list(eces.values()))
        summary[source] = {
            "ece": {**_whole_or_partial(mean, arm.complete), "sd": sd if arm.complete else None, "per_fold": eces},
            "mean_probability": pooled.prob,
            "lesion_share": pooled.lesion,
            "pixels": pooled.pixels,
        }
    return summary


def _oracle_difference(study: Study, arm: Arm) -> dict[str, t.Any] | None:
    """Oracle minus first pass on the same images; None unless both were evaluated."""
    if not {"first_pass", "oracle"} <= set(arm.sources):
        return None
    differences = stats.paired_differences(arm.rows("oracle"), arm.rows("first_pass"), study.image_metrics)
    found = stats.intervals(differences, _defined(differences, study.image_metrics))
    return {
        "of": f"{arm.source_label('oracle')} minus first_pass, per image",
        "images": len(differences),
        "patients": int(differences["patient"].nunique()),
        "resamples": stats.BOOTSTRAP_RESAMPLES,
        "seed": stats.BOOTSTRAP_SEED,
        **{
            metric: {**_whole_or_partial(interval.mean, arm.complete), **_interval(interval, arm.complete)}
            for metric, interval in found.items()
        },
    }


def _defined(rows: pd.DataFrame, metrics: list[str]) -> list[str]:
    return [metric for metric in metrics if metric in IMAGE_METRICS and rows[metric].notna().any()]


def _source_tests(study: Study, arm: Arm) -> dict[str, t.Any]:
    """The headline metric under every other prompt source against the headline one: the same weights, another
    sentence.
    """
    metric = study.headline_metric
    found = {}
    for source in arm.sources:
        if source != arm.headline and metric in study.tested:
            differences = stats.paired_differences(arm.rows(source), arm.rows(arm.headline), [metric])[metric]
            found[source] = {"mean": _or_none(differences.mean()), **_ranks(metric, differences)}
    return found


def _ranks(metric: str, differences: pd.Series) -> dict[str, t.Any]:
    """Wilcoxon's test; a positive effect is a better one, whatever the metric's direction."""
    better = differences if IMAGE_METRICS[metric].more_is_better else -differences
    return stats.signed_rank(better.to_numpy())._asdict()


def _adjust(tests: list[dict[str, t.Any]]) -> None:
    """Add Holm's p over one family of tests."""
    for test, adjusted in zip(tests, stats.holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted


def _cost(cost: Cost | None) -> dict[str, t.Any] | None:
    return None if cost is None else {**cost._asdict(), "goodput": cost.share}


def _comparisons(study: Study) -> dict[str, t.Any] | None:
    """Every entry against the reference, image by image and fold by fold; None without two entries, or any masks."""
    reference = study.reference
    others = [entry for entry in study.entries if entry is not reference]
    if reference is None or not others or not study.tested:
        return None
    rows = [_comparison(study, entry, reference) for entry in others]
    for test in ("images", "folds"):  # a family each: they are two answers to the same questions
        _adjust([row["metrics"][metric][test] for row in rows for metric in study.tested])
    return {"against": reference.label, "rows": rows}


def _comparison(study: Study, entry: Entry, reference: Entry) -> dict[str, t.Any]:
    """On the folds that are complete in both, on the images that both have."""
    folds = common_folds([entry, reference])
    differences = stats.paired_differences(_on(entry, folds), _on(reference, folds), study.tested)
    expected = max(len(entry.arm.cells), len(reference.arm.cells))
    intervals = stats.intervals(differences, _defined(differences, study.tested))
    # Every fold trains on all the others, so n_test / n_train is 1 / (k - 1), folds being of one size but for rounding.
    test_to_train = 1 / (expected - 1) if expected > 1 else 0.0
    by_fold = stats.fold_means(differences, study.tested)
    metrics = {}
    for metric in study.tested:
        interval = intervals.get(metric)
        metrics[metric] = {
            "images": {
                "mean": interval.mean if interval else None,
                "ci95": [interval.low, interval.high] if interval and interval.low is not None else None,
                **_ranks(metric, differences[metric]),
                "images": int(differences[metric].notna().sum()),
            },
            "folds": _fold_test(by_fold[metric].dropna().tolist(), test_to_train),
        }
    return {
        "label": entry.label,
        "arm": entry.arm.name,
        "source": entry.source,
        "folds": folds,
        "expected": expected,
        "images": len(differences),
        "patients": int(differences["patient"].nunique()),
        "metrics": metrics,
    }


def _fold_test(differences: list[float], test_to_train: float) -> dict[str, t.Any]:
    if not differences:
        return {"mean": None, "ci95": None, "t": None, "df": None, "p": None, "reason": "no fold is complete in both"}
    found = stats.corrected_t(differences, test_to_train)
    bounds = None if found.low is None else [found.low, found.high]
    return {"mean": found.mean, "ci95": bounds, "t": found.t, "df": found.df, "p": found.p, "reason": found.reason}


def _label_comparisons(study: Study) -> dict[str, t.Any] | None:
    """Label metrics of every entry against the reference's on the labelled images that both have; None without any."""
    reference = study.reference
    rows = [
        _label_comparison(entry, reference)
        for entry in study.entries
        if reference is not None and entry is not reference
    ]
    found = [row for row in rows if row is not None]
    if reference is None or not found:
        return None
    _adjust([test for row in found for test in (row["label_auc"], row["mcnemar"]) if test is not None])
    return {"against": reference.label, "rows": found}


def _label_comparison(entry: Entry, reference: Entry) -> dict[str, t.Any] | None:
    folds = common_folds([entry, reference])
    ours, theirs = (label_stats.labelled(_on(each, folds)).set_index("key") for each in (entry, reference))
    common = ours.index.intersection(theirs.index)
    if common.empty:
        return None
    ours, theirs = ours.loc[common], theirs.loc[common]
    return {
        "label": entry.label,
        "arm": entry.arm.name,
        "source": entry.source,
        "folds": folds,
        "expected": max(len(entry.arm.cells), len(reference.arm.cells)),
        "images": len(common),
        "patients": int(ours["patient"].nunique()),
        **_label_differences(ours, theirs),
        "mcnemar": label_stats.mcnemar(ours, theirs)._asdict(),
    }


def _label_differences(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, dict[str, t.Any] | None]:
    """By LABEL_METRICS, None where one is not defined; of AUC with DeLong's test, whose interval goes with its p."""
    found: dict[str, dict[str, t.Any] | None] = {
        name: None if each is None else {"mean": each.mean, **_interval(each, True)}
        for name, each in label_stats.label_differences(ours, theirs).items()
    }
    if auc := found["label_auc"]:
        test = label_stats.delong(ours, theirs)
        auc |= {"ci95": None if test.low is None else [test.low, test.high], "p": test.p, "reason": test.reason}
    return found


def _external_comparisons(study: Study) -> dict[str, t.Any] | None:
    """Every entry against the reference on each other dataset that both were scored on; None without any.

    Each image counts once, with the mean of what the models of the common folds make of it. Not where the generator of
    one's synthetic scans trained on that dataset: what it remembers has no test there.
    """
    reference = study.reference
    if reference is None:
        return None

    def judged(arm: Arm, name: str) -> bool:
        return name in arm.external and name not in arm.generator_saw

    rows = [
        _external_comparison(study, entry, reference, name)
        for name in study.external
        for entry in study.entries
        if entry is not reference and judged(entry.arm, name) and judged(reference.arm, name)
    ]
    if not rows:
        return None
    _adjust([test for row in rows for test in row["metrics"].values() if "p" in test])
    return {"against": reference.label, "rows": rows}


def _external_comparison(study: Study, entry: Entry, reference: Entry, name: str) -> dict[str, t.Any]:
    folds = common_folds([entry, reference])
    ours, theirs = (_over_folds(each.arm.external[name], folds) for each in (entry, reference))
    differences = stats.paired_differences(ours, theirs, study.tested)
    metrics: dict[str, dict[str, t.Any]] = {}
    for metric, found in stats.intervals(differences, _defined(differences, study.tested)).items():
        metrics[metric] = {"mean": found.mean, **_interval(found, True), **_ranks(metric, differences[metric])}
    told = [label_stats.labelled(rows).set_index("key") for rows in (ours, theirs)]
    common = told[0].index.intersection(told[1].index)
    if len(common):
        told = [rows.loc[common] for rows in told]
        for metric, each in _label_differences(*told).items():
            if each is not None and metric in study.metrics:
                metrics[metric] = each
                if metric == "label_accuracy":
                    metrics[metric] |= {"p": label_stats.mcnemar(*told).p}
    return {
        "label": entry.label,
        "arm": entry.arm.name,
        "data": name,
        "folds": folds,
        "expected": max(len(entry.arm.cells), len(reference.arm.cells)),
        "images": len(differences),
        "metrics": metrics,
    }


def _over_folds(rows: pd.DataFrame, folds: list[int]) -> pd.DataFrame:
    """A row an image: its metrics and label probabilities are means over the models of these folds."""
    by_key = rows[rows["fold"].isin(folds)].groupby("key", sort=False)
    means = by_key[[*IMAGE_METRICS, *PROB_COLUMNS]].mean()
    return by_key[["patient", "label", "fold"]].first().join(means).reset_index()


def _on(entry: Entry, folds: list[int]) -> pd.DataFrame:
    rows = entry.arm.rows(entry.source)
    return rows[rows["fold"].isin(folds)]


def common_folds(entries: list[Entry]) -> list[int]:
    """Folds that are complete in every one of them."""
    return sorted(set.intersection(*({cell.fold for cell in entry.arm.complete_cells} for entry in entries)))


def _friedman(study: Study) -> dict[str, t.Any] | None:
    """The headline metric of all entries on the images that all of them have; None for fewer than three, or labels."""
    entries = study.entries
    if len(entries) < 3 or not study.tested:
        return None
    folds = common_folds(entries)
    metric = study.headline_metric
    columns = [_on(entry, folds).set_index("key")[metric].dropna() for entry in entries]
    score_NK = pd.concat(columns, axis=1, join="inner").to_numpy(float) if folds else np.empty((0, len(entries)))
    found = stats.friedman(score_NK if IMAGE_METRICS[metric].more_is_better else -score_NK)
    return {
        "metric": metric,
        "labels": [entry.label for entry in entries],
        "folds": folds,
        "images": found.n,
        "chi2": found.chi2,
        "p": found.p,
        "ranks": found.rank_K,
        "nemenyi": found.nemenyi_KK,
        "reason": found.reason if folds else "no fold is complete in every arm",
    }
