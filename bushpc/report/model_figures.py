"""A run's results → the figures that a model card states, the same as those of the run's own report."""

from __future__ import annotations

import typing as t
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import msgspec
import pandas as pd

from bushpc.metrics.registry import GRIDS, METRICS
from bushpc.report.read_run import read_run
from bushpc.report.scope import ReportScope
from bushpc.report.stats import BOOTSTRAP_RESAMPLES
from bushpc.report.summary.arms import summarise_arm
from bushpc.report.summary.records import ArmSummary, Figure

POOLED = "all images of all folds together"
OVER_FOLDS = "mean over folds"
INTERVAL = f"95 % interval: percentile bootstrap over patients, {BOOTSTRAP_RESAMPLES:,} resamples"


class ModelFigure(msgspec.Struct, kw_only=True):
    """One metric of a model on one dataset under one prompt source.

    dataset: None for the folds' own validation parts, else the other dataset that it was tested on.
    prompts: how its prompts were made, in words. uses_ground_truth: whether they come from the mask to be predicted.
    of: what `value` is, in words. sd: over folds. ci95: of the mean over images, or for label metrics of the value.
    grid: whose pixels were counted, in words; None for metrics without pixels.
    """

    metric: str
    dataset: str | None
    source: str
    prompts: str
    uses_ground_truth: bool
    value: float
    of: str
    sd: float | None
    ci95: tuple[float, float] | None
    images: int
    patients: int
    grid: str | None


def model_figures(run_dir: Path, row: str | None, folds: Collection[int]) -> list[ModelFigure]:
    """The shown metrics of these folds of a run, or of a row of a grid. Raises: DataError as its report would."""
    run = read_run(run_dir, row)
    (whole,) = run.arms
    cells = [cell for cell in whole.cells if cell.fold in folds and cell.complete]
    frames = [cell.per_image for cell in cells if cell.per_image is not None]
    if not frames:
        return []
    arm = replace(whole, cells=cells, per_image=pd.concat(frames, ignore_index=True))
    scope = ReportScope(arm.label, "cv", [run], [arm], arm)
    summary = summarise_arm(scope, arm)
    found = []
    for source, figures in summary.metrics.items():
        rows = arm.rows(source)
        counted: dict[str, t.Any] = {"images": len(rows), "patients": int(rows["patient"].nunique())}
        for metric in scope.metrics:
            of_labels = METRICS[metric].of == "labels"
            figure = _of_labels(summary, source, metric) if of_labels else _of_images(figures[metric])
            if figure:
                found.append(_figure(summary, source, metric, None, figure, counted))
    for name, other in summary.external.items():
        counted = {"images": other.images, "patients": other.patients}
        for metric, over_folds in other.metrics.items():
            if over_folds.value is not None and metric in scope.metrics:
                figure = {"value": over_folds.value, "of": OVER_FOLDS, "sd": over_folds.sd, "ci95": None}
                found.append(_figure(summary, arm.headline, metric, name, figure, counted))
    return found


def _of_images(figure: Figure) -> dict[str, t.Any] | None:
    if figure.value is None:
        return None
    return {"value": figure.value, "of": OVER_FOLDS, "sd": figure.sd, "ci95": figure.bounds}


def _of_labels(summary: ArmSummary, source: str, metric: str) -> dict[str, t.Any] | None:
    labels = summary.labels[source]
    figure = labels.metrics.get(metric) if labels else None
    if figure is None or figure.value is None:
        return None
    return {"value": figure.value, "of": POOLED, "sd": summary.metrics[source][metric].sd, "ci95": figure.bounds}


def _figure(
    summary: ArmSummary,
    source: str,
    metric: str,
    dataset: str | None,
    figure: dict[str, t.Any],
    counted: dict[str, t.Any],
) -> ModelFigure:
    told, grid = summary.sources[source], METRICS[metric].grid
    size = f" ({summary.image_size} x {summary.image_size})" if summary.image_size and grid == "network" else ""
    return ModelFigure(
        metric=metric,
        dataset=dataset,
        source=source,
        prompts=told.label,
        uses_ground_truth=told.uses_ground_truth,
        grid=f"{GRIDS[grid]}{size}" if grid else None,
        **figure,
        **counted,
    )
