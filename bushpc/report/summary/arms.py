"""One arm → `ArmSummary`: its figures by metric, mask class, lesion length, label, dataset and prompt source."""

from __future__ import annotations

import typing as t

import pandas as pd

from bushpc.metrics.registry import IMAGE_METRICS, LABEL_METRICS, ON_ORIGINAL, TWO_CLASS
from bushpc.report import costs, label_stats, stats
from bushpc.report.per_image import of_class
from bushpc.report.results import Arm
from bushpc.report.scope import ReportScope
from bushpc.report.summary import records
from bushpc.report.summary.records import ArmSummary, Bounds, Figure, Mean, PooledFigure
from bushpc.sample import LABELS

# As in XBusNet's Table 2, on whatever grid and in whatever way they are among the chosen ones.
STRATIFIED = tuple(f"{name}{of}" for name in ("dice", "iou") for of in ("", ON_ORIGINAL, TWO_CLASS))


def summarise_arm(scope: ReportScope, arm: Arm) -> ArmSummary:
    """All figures of an arm."""
    shown = {entry.source for entry in scope.entries if entry.arm is arm}
    only_arm = len(scope.arms) == 1
    return ArmSummary(
        arm=arm.name,
        label=arm.label,
        run=arm.run.name,
        model=arm.model,
        settings=_settings(scope, arm),
        parameters=next((cell.parameters for cell in arm.cells if cell.parameters), None),
        complete=arm.complete,
        synthetic=_synthetic(arm),
        folds=records.Folds(
            source=arm.run.folds.source,
            expected=len(arm.cells),
            complete=[cell.fold for cell in arm.complete_cells],
            missing=[
                records.MissingFold(cell=cell.name, fold=cell.fold, reason=cell.reason or "")
                for cell in arm.missing_cells
            ],
        ),
        headline=arm.headline,
        threshold=arm.threshold,
        tta=arm.tta,
        postprocess=arm.chosen,
        postprocess_is_old=arm.choice_is_old,
        sources={
            source: records.Source(label=arm.source_label(source), uses_ground_truth=arm.uses_ground_truth(source))
            for source in arm.sources
        },
        images={str(cell.fold): _images(cell.per_image) for cell in arm.complete_cells},
        metrics={source: _metrics(scope, arm, source, source in shown) for source in arm.sources},
        mask_classes=list(arm.classes),
        by_class={source: _by_class(scope, arm, source) for source in arm.sources},
        strata={source: _strata(scope, arm, source) for source in arm.sources},
        normals={source: _normals(arm, source) for source in arm.sources},
        labels={source: _labels(arm, source) if source in shown else None for source in arm.sources},
        external={name: _external(scope, arm, name, rows) for name, rows in arm.external.items()},
        tolerance=arm.tolerance,
        calibration=_calibration(arm),
        # How its prompt sources differ: a single arm has room for all metrics, several have one test each.
        difference=_oracle_difference(scope, arm) if only_arm else None,
        source_tests={} if only_arm else _source_tests(scope, arm),
        cost=cost_record(costs.cost_of(arm.cells)),
        image_size=next((size for cell in arm.cells if (size := cell.settings.get("model.image_size"))), None),
    )


def _settings(scope: ReportScope, arm: Arm) -> dict[str, t.Any]:
    """The settings that any row of the grid states; where this arm's row doesn't, from its config."""
    stated = dict.fromkeys(key for other in scope.arms for key in other.given)
    composed = next((cell.settings for cell in arm.cells if cell.settings), {})
    return {key: arm.given.get(key, composed.get(key)) for key in stated}


def _synthetic(arm: Arm) -> records.SyntheticScans | None:
    cells = [
        cell for cell in arm.cells if cell.settings.get("data.synthetic") and cell.settings["data.synthetic_ratio"]
    ]
    if not cells:
        return None
    return records.SyntheticScans(
        ratio=cells[0].settings["data.synthetic_ratio"],
        real=cells[0].settings["data.real"],
        sha256={str(cell.fold): cell.settings["data.synthetic_sha256"] for cell in cells},
    )


def _images(per_image: pd.DataFrame | None) -> int:
    assert per_image is not None, "only complete cells are counted"
    return int(per_image["key"].nunique())


# --- means and intervals ----------------------------------------------------------------------------------------


class _MeanFields(t.TypedDict):
    mean: float | None
    partial_mean: float | None


class _BoundsFields(t.TypedDict):
    ci95: Bounds | None
    partial_ci95: Bounds | None


def _mean_fields(mean: float | None, complete: bool) -> _MeanFields:
    return {"mean": mean if complete else None, "partial_mean": None if complete else mean}


def _bounds_fields(interval: stats.Interval | None, complete: bool) -> _BoundsFields:
    bounds = interval.bounds if interval else None
    return {"ci95": bounds if complete else None, "partial_ci95": None if complete else bounds}


def pooled(interval: stats.Interval, complete: bool) -> PooledFigure:
    """A figure of all images together."""
    return PooledFigure(**_mean_fields(interval.mean, complete), **_bounds_fields(interval, complete))


def over_folds(per_fold: dict[str, float | None], complete: bool) -> Figure:
    """Mean and SD over the folds that have a value."""
    values = [value for value in per_fold.values() if value is not None]
    mean, sd = stats.mean_and_sd(values) if values else (None, None)
    return Figure(**_mean_fields(mean, complete), sd=sd if complete else None, per_fold=per_fold)


def _metrics(scope: ReportScope, arm: Arm, source: str, shown: bool) -> dict[str, Figure]:
    """Intervals only for sources that the tables show: a thousand cells have many that nobody reads."""
    rows = arm.rows(source)
    intervals = stats.intervals(rows, stats.defined(rows, scope.measured)) if shown else {}
    figures = {}
    for metric, per_fold in _per_fold(rows, scope.measured).items():
        figure = figures[metric] = over_folds(per_fold, arm.complete)
        if metric in IMAGE_METRICS:
            figure.images = int(rows[metric].notna().sum())
            if shown:
                bounds = _bounds_fields(intervals.get(metric), arm.complete)
                figure.ci95, figure.partial_ci95 = bounds["ci95"], bounds["partial_ci95"]
    return figures


def _per_fold(rows: pd.DataFrame, metrics: list[str]) -> dict[str, dict[str, float | None]]:
    """Metric → fold → value; None where no image of the fold has one."""
    of_images = [metric for metric in metrics if metric in IMAGE_METRICS]
    image = stats.fold_means(rows, of_images) if of_images else {}
    with_answers = label_stats.labelled(rows)
    label = {fold: label_stats.point_values(part) for fold, part in with_answers.groupby("fold")}
    undefined = dict.fromkeys(LABEL_METRICS)
    return {
        metric: {str(fold): stats.or_none(value) for fold, value in image[metric].items()}
        if metric in IMAGE_METRICS
        else {str(fold): label.get(fold, undefined)[metric] for fold in sorted(rows["fold"].unique())}
        for metric in metrics
    }


def _by_class(scope: ReportScope, arm: Arm, source: str) -> dict[str, dict[str, Figure]]:
    """Mask class → image metric → figure; metrics that weren't measured by class are left out."""
    rows = arm.rows(source)
    by_class: dict[str, dict[str, Figure]] = {}
    for name in arm.classes:
        columns = {metric: of_class(metric, name) for metric in scope.image_metrics}
        columns = {metric: column for metric, column in columns.items() if column in rows}
        means = stats.fold_means(rows, list(columns.values()))
        by_class[name] = {}
        for metric, column in columns.items():
            per_fold = {str(fold): stats.or_none(value) for fold, value in means[column].items()}
            figure = by_class[name][metric] = over_folds(per_fold, arm.complete)
            figure.images = int(rows[column].notna().sum())
    return by_class


def _strata(scope: ReportScope, arm: Arm, source: str) -> dict[str, records.Stratum]:
    metrics = [metric for metric in scope.metrics if metric in STRATIFIED] or scope.tested[:1]
    return {
        str(name): records.Stratum(
            n=int(row["n"]),
            metrics={metric: Mean(**_mean_fields(stats.or_none(row[metric]), arm.complete)) for metric in metrics},
        )
        for name, row in stats.stratum_means(arm.rows(source), metrics).to_dict("index").items()
    }


def _normals(arm: Arm, source: str) -> records.FalseAlarms | None:
    """False alarms on scans without a lesion, which have no overlap to measure; None without such scans or masks."""
    rows = arm.rows(source)
    normal = rows[rows["label"] == "normal"]
    if normal["fpr"].isna().all():
        return None
    means = stats.fold_means(normal.assign(alarmed=(normal["fp"] > 0).astype(float)), ["fpr", "alarmed"])
    fpr, alarmed = (
        over_folds({str(fold): float(value) for fold, value in means[name].items()}, arm.complete)
        for name in ("fpr", "alarmed")
    )
    return records.FalseAlarms(n=len(normal), fpr=fpr, alarmed=alarmed)


def _labels(arm: Arm, source: str) -> records.PooledLabels | None:
    """Label metrics of the images of all folds together; None where no image has a label and an answer."""
    rows = label_stats.labelled(arm.rows(source))
    if rows.empty:
        return None
    counts = rows["label"].value_counts()
    return records.PooledLabels(
        images={label: int(counts.get(label, 0)) for label in LABELS},
        patients=int(rows["patient"].nunique()),
        confusion=label_stats.confusion_matrix(rows).tolist(),
        metrics={
            name: None if interval is None else pooled(interval, arm.complete)
            for name, interval in label_stats.label_intervals(rows).items()
        },
    )


def _external(scope: ReportScope, arm: Arm, name: str, rows: pd.DataFrame) -> records.OtherDataset:
    """Metrics over all images of another dataset, one figure for each fold's model. rows: of all complete cells."""
    return records.OtherDataset(
        images=int(rows["key"].nunique()),
        patients=int(rows["patient"].nunique()),
        seen_by_generator=name in arm.generator_saw,
        metrics={
            metric: over_folds(per_fold, arm.complete) for metric, per_fold in _per_fold(rows, scope.measured).items()
        },
    )


def _calibration(arm: Arm) -> dict[str, records.Calibration] | None:
    """By prompt source; None if the evaluation of a fold wrote no bins."""
    bins = arm.calibration
    if bins is None:
        return None
    by_source = {}
    for source in arm.sources:
        rows = bins[bins["prompts"] == source]
        all_folds = stats.calibration(rows)
        per_fold = {str(fold): stats.calibration(part) for fold, part in rows.groupby("fold")}
        errors: dict[str, float | None] = {fold: found.ece for fold, found in per_fold.items() if found is not None}
        if all_folds is None or len(errors) < len(arm.complete_cells):
            continue
        by_source[source] = records.Calibration(
            ece=over_folds(errors, arm.complete),
            mean_probability=all_folds.prob,
            lesion_share=all_folds.lesion,
            pixels=all_folds.pixels,
        )
    return by_source


# --- prompt sources against each other --------------------------------------------------------------------------


def _oracle_difference(scope: ReportScope, arm: Arm) -> records.SourceDifference | None:
    """Oracle minus first pass on the same images; None unless both were evaluated."""
    if not {"first_pass", "oracle"} <= set(arm.sources):
        return None
    differences = stats.paired_differences(arm.rows("oracle"), arm.rows("first_pass"), scope.image_metrics)
    intervals = stats.intervals(differences, stats.defined(differences, scope.image_metrics))
    return records.SourceDifference(
        of=f"{arm.source_label('oracle')} minus first_pass, per image",
        images=len(differences),
        patients=int(differences["patient"].nunique()),
        resamples=stats.BOOTSTRAP_RESAMPLES,
        seed=stats.BOOTSTRAP_SEED,
        metrics={metric: pooled(interval, arm.complete) for metric, interval in intervals.items()},
    )


def _source_tests(scope: ReportScope, arm: Arm) -> dict[str, records.RankTest]:
    """The headline metric under every other prompt source against the headline source: same weights, other prompts."""
    metric = scope.headline_metric
    tests = {}
    for source in arm.sources:
        if source != arm.headline and metric in scope.tested:
            differences = stats.paired_differences(arm.rows(source), arm.rows(arm.headline), [metric])[metric]
            test = stats.improvement(metric, differences)
            tests[source] = records.RankTest(mean=stats.or_none(differences.mean()), **test._asdict())
    return tests


def cost_record(cost: costs.Cost | None) -> records.Cost | None:
    """What an arm, or all of them, cost."""
    return None if cost is None else records.Cost(**cost._asdict(), goodput=cost.share)
