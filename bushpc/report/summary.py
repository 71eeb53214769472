"""Numbers → `summary.json`: the one set of figures that machines, tables and page all take theirs from.

While a fold is missing, `mean` and `sd` are null and what can be said stands in `partial_mean`. A program that
collects `mean` over many runs then fails on an incomplete one instead of averaging it in.
"""

from __future__ import annotations

import typing as t

import pandas as pd

from bushpc.report import stats
from bushpc.report.results import METRICS, RunResults, source_label


def summarise(results: RunResults) -> dict[str, t.Any]:
    """The content of `summary.json`; floats at full precision, only JSON types."""
    return {
        "run": results.run["name"],
        "model": results.run["model"],
        # An excerpt has another name, so that no figure published for the whole dataset stands beside it.
        "data": results.run["data"] + (" (excerpt)" if results.run.get("excerpt") else ""),
        "complete": results.complete,
        "folds": {
            "source": results.run["folds"]["source"],
            "expected": len(results.cells),
            "complete": [cell.fold for cell in results.complete_cells],
            "missing": [
                {"cell": cell.name, "fold": cell.fold, "reason": cell.reason} for cell in results.missing_cells
            ],
        },
        "headline": results.headline,
        "threshold": results.threshold,
        "sources": {
            source: {"label": source_label(source, results.sources), "uses_ground_truth": source == "oracle"}
            for source in results.sources
        },
        "images": {str(cell.fold): _images(cell.per_image) for cell in results.complete_cells},
        "metrics": {source: _metrics(results, source) for source in results.sources},
        "strata": {source: _strata(results, source) for source in results.sources},
        "difference": _difference(results),
    }


def _images(per_image: pd.DataFrame | None) -> int:
    assert per_image is not None, "asked of a cell that is not complete"
    return int(per_image["key"].nunique())


def _frame(results: RunResults) -> pd.DataFrame:
    assert results.per_image is not None, "a run without a complete cell has no prompt sources to summarise"
    return results.per_image


def _whole_or_partial(mean: float | None, complete: bool) -> dict[str, float | None]:
    return {"mean": mean if complete else None, "partial_mean": None if complete else mean}


def _metrics(results: RunResults, source: str) -> dict[str, t.Any]:
    means = stats.fold_means(_frame(results), source)
    summary = {}
    for metric in METRICS:
        per_fold = {str(fold): float(value) for fold, value in means[metric].items()}
        mean, sd = stats.mean_and_sd(list(per_fold.values()))
        summary[metric] = {
            **_whole_or_partial(mean, results.complete),
            "sd": sd if results.complete else None,
            "per_fold": per_fold,
        }
    return summary


def _strata(results: RunResults, source: str) -> dict[str, t.Any]:
    summary = {}
    for name, row in stats.stratum_means(_frame(results), source).to_dict("index").items():
        n = int(row["n"])
        means = {metric: float(row[metric]) if n else None for metric in METRICS}
        summary[str(name)] = {
            "n": n,
            **{metric: _whole_or_partial(mean, results.complete) for metric, mean in means.items()},
        }
    return summary


def _difference(results: RunResults) -> dict[str, t.Any] | None:
    """Oracle minus first pass on the same images; None unless both were evaluated."""
    if not {"first_pass", "oracle"} <= set(results.sources):
        return None
    differences = {
        metric: stats.paired_difference(_frame(results), "first_pass", "oracle", metric) for metric in METRICS
    }
    some = differences["dice"]
    return {
        "of": f"{source_label('oracle', results.sources)} minus first_pass, per image",
        "images": some.images,
        "patients": some.patients,
        "resamples": stats.BOOTSTRAP_RESAMPLES,
        "seed": stats.BOOTSTRAP_SEED,
        **{
            metric: {
                **_whole_or_partial(found.mean, results.complete),
                "ci95": [found.low, found.high] if results.complete else None,
                "partial_ci95": None if results.complete else [found.low, found.high],
            }
            for metric, found in differences.items()
        },
    }
