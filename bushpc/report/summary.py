"""Numbers → `summary.json`: the one set of figures that machines, tables and page all take theirs from.

While a fold is missing, `mean` and `sd` are null and what can be said stands in `partial_mean`. A program that
collects `mean` over many runs then fails on an incomplete one instead of averaging it in.
"""

from __future__ import annotations

import typing as t

import numpy as np
import pandas as pd

from bushpc.report import stats
from bushpc.report.costs import Cost, cost_of
from bushpc.report.results import METRICS, USES_GROUND_TRUTH, Arm, source_label
from bushpc.report.study import Entry, Study

TESTED = ("dice", "iou")  # as in XBusNet 3.1


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
        "data": run["data"] + (" (excerpt)" if run.get("excerpt") else ""),
        "folds_source": run["folds"]["source"],
        "complete": all(arm.complete for arm in study.arms),
        "baseline": study.baseline.name,
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
        "friedman": _friedman(study),
        "arms": arms,
    }


def _arm(study: Study, arm: Arm) -> dict[str, t.Any]:
    shown = {entry.source for entry in study.entries if entry.arm is arm}
    return {
        "arm": arm.name,
        "label": arm.label,
        "run": arm.run["name"],
        "model": arm.model,
        "settings": _settings(study, arm),
        "complete": arm.complete,
        "folds": {
            "source": arm.run["folds"]["source"],
            "expected": len(arm.cells),
            "complete": [cell.fold for cell in arm.complete_cells],
            "missing": [{"cell": cell.name, "fold": cell.fold, "reason": cell.reason} for cell in arm.missing_cells],
        },
        "headline": arm.headline,
        "threshold": arm.threshold,
        "sources": {
            source: {"label": source_label(source, arm.sources), "uses_ground_truth": source in USES_GROUND_TRUTH}
            for source in arm.sources
        },
        "images": {str(cell.fold): _images(cell.per_image) for cell in arm.complete_cells},
        "metrics": {source: _metrics(arm, source, source in shown) for source in arm.sources},
        "strata": {source: _strata(arm, source) for source in arm.sources},
        "calibration": _calibration(arm),
        # What its sources differ in: one arm has room for all metrics, and its tests are its comparisons.
        "difference": _oracle_difference(arm) if len(study.arms) == 1 else None,
        "source_tests": _source_tests(arm) if len(study.arms) > 1 else {},
        "cost": _cost(cost_of(arm.cells)),
    }


def _settings(study: Study, arm: Arm) -> dict[str, t.Any]:
    """What the rows of a grid state, for every arm: where its own row does not, its config does."""
    stated = dict.fromkeys(key for other in study.arms for key in other.given)
    composed = next((cell.settings for cell in arm.cells if cell.settings), {})
    return {key: arm.given.get(key, composed.get(key)) for key in stated}


def _images(per_image: pd.DataFrame | None) -> int:
    assert per_image is not None, "asked of a cell that is not complete"
    return int(per_image["key"].nunique())


def _whole_or_partial(mean: float | None, complete: bool) -> dict[str, float | None]:
    return {"mean": mean if complete else None, "partial_mean": None if complete else mean}


def _interval(found: stats.Interval, complete: bool) -> dict[str, t.Any]:
    bounds = None if found.low is None else [found.low, found.high]
    return {"ci95": bounds if complete else None, "partial_ci95": None if complete else bounds}


def _metrics(arm: Arm, source: str, shown: bool) -> dict[str, t.Any]:
    """Intervals only for what the tables show: a thousand cells have many sources that nobody reads intervals of."""
    rows = arm.rows(source)
    means = stats.fold_means(rows)
    intervals = stats.intervals(rows) if shown else {}
    summary = {}
    for metric in METRICS:
        per_fold = {str(fold): float(value) for fold, value in means[metric].items()}
        mean, sd = stats.mean_and_sd(list(per_fold.values()))
        summary[metric] = {
            **_whole_or_partial(mean, arm.complete),
            "sd": sd if arm.complete else None,
            **(_interval(intervals[metric], arm.complete) if shown else {}),
            "per_fold": per_fold,
        }
    return summary


def _strata(arm: Arm, source: str) -> dict[str, t.Any]:
    summary = {}
    for name, row in stats.stratum_means(arm.rows(source)).to_dict("index").items():
        n = int(row["n"])
        means = {metric: float(row[metric]) if n else None for metric in METRICS}
        summary[str(name)] = {
            "n": n,
            **{metric: _whole_or_partial(mean, arm.complete) for metric, mean in means.items()},
        }
    return summary


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


def _oracle_difference(arm: Arm) -> dict[str, t.Any] | None:
    """Oracle minus first pass on the same images; None unless both were evaluated."""
    if not {"first_pass", "oracle"} <= set(arm.sources):
        return None
    differences = stats.paired_differences(arm.rows("oracle"), arm.rows("first_pass"))
    found = stats.intervals(differences)
    return {
        "of": f"{source_label('oracle', arm.sources)} minus first_pass, per image",
        "images": len(differences),
        "patients": int(differences["patient"].nunique()),
        "resamples": stats.BOOTSTRAP_RESAMPLES,
        "seed": stats.BOOTSTRAP_SEED,
        **{
            metric: {**_whole_or_partial(found[metric].mean, arm.complete), **_interval(found[metric], arm.complete)}
            for metric in METRICS
        },
    }


def _source_tests(arm: Arm) -> dict[str, t.Any]:
    """Dice under every other prompt source against the headline one: the same weights, another sentence."""
    found = {}
    for source in arm.sources:
        if source != arm.headline:
            dice = stats.paired_differences(arm.rows(source), arm.rows(arm.headline))["dice"]
            found[source] = {"mean": float(dice.mean()), **stats.signed_rank(dice.to_numpy())._asdict()}
    return found


def _adjust(tests: list[dict[str, t.Any]]) -> None:
    """Add Holm's p over one family of tests."""
    for test, adjusted in zip(tests, stats.holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted


def _cost(cost: Cost | None) -> dict[str, t.Any] | None:
    return None if cost is None else {**cost._asdict(), "goodput": cost.share}


def _comparisons(study: Study) -> dict[str, t.Any] | None:
    """Every entry against the reference, image by image and fold by fold; None without two entries."""
    reference = study.reference
    others = [entry for entry in study.entries if entry is not reference]
    if reference is None or not others:
        return None
    rows = [_comparison(entry, reference) for entry in others]
    for test in ("images", "folds"):  # a family each: they are two answers to the same questions
        _adjust([row["metrics"][metric][test] for row in rows for metric in TESTED])
    return {"against": reference.label, "rows": rows}


def _comparison(entry: Entry, reference: Entry) -> dict[str, t.Any]:
    """On the folds that are complete in both, on the images that both have."""
    folds = common_folds([entry, reference])
    differences = stats.paired_differences(_on(entry, folds), _on(reference, folds))
    expected = max(len(entry.arm.cells), len(reference.arm.cells))
    intervals = stats.intervals(differences) if len(differences) else {}
    # Every fold trains on all the others, so n_test / n_train is 1 / (k - 1), folds being of one size but for rounding.
    test_to_train = 1 / (expected - 1) if expected > 1 else 0.0
    by_fold = differences.groupby("fold")[list(METRICS)].mean()
    metrics = {}
    for metric in TESTED:
        ranks = stats.signed_rank(differences[metric].to_numpy())
        interval = intervals.get(metric)
        metrics[metric] = {
            "images": {
                "mean": interval.mean if interval else None,
                "ci95": [interval.low, interval.high] if interval and interval.low is not None else None,
                **ranks._asdict(),
            },
            "folds": _fold_test(by_fold[metric].tolist(), test_to_train),
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


def _on(entry: Entry, folds: list[int]) -> pd.DataFrame:
    rows = entry.arm.rows(entry.source)
    return rows[rows["fold"].isin(folds)]


def common_folds(entries: list[Entry]) -> list[int]:
    """Folds that are complete in every one of them."""
    return sorted(set.intersection(*({cell.fold for cell in entry.arm.complete_cells} for entry in entries)))


def _friedman(study: Study) -> dict[str, t.Any] | None:
    """Dice of all entries on the images that all of them have; None for fewer than three."""
    entries = study.entries
    if len(entries) < 3:
        return None
    folds = common_folds(entries)
    columns = [_on(entry, folds).set_index("key")["dice"] for entry in entries]
    score_NK = pd.concat(columns, axis=1, join="inner").to_numpy(float) if folds else np.empty((0, len(entries)))
    found = stats.friedman(score_NK)
    return {
        "labels": [entry.label for entry in entries],
        "folds": folds,
        "images": found.n,
        "chi2": found.chi2,
        "p": found.p,
        "ranks": found.rank_K,
        "nemenyi": found.nemenyi_KK,
        "reason": found.reason if folds else "no fold is complete in every arm",
    }
