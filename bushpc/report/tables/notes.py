"""Notes and captions that several tables share: what a figure covers, what it is compared with."""

from __future__ import annotations

import typing as t

from bushpc.metrics.registry import GRIDS, IMAGE_METRICS, METRICS, Metric
from bushpc.report.published import PublishedTable, grid_sentence
from bushpc.report.summary import ArmSummary, Summary
from bushpc.report.summary.comparison_records import Difference, ImageTest
from bushpc.report.summary.records import Figure
from bushpc.report.tables.common import (
    bold_note,
    classes_of,
    folds_phrase,
    is_transposed,
    listed,
    lower_is_better,
    ours,
    same_folds,
    titled,
)


def headline_group(summary: Summary) -> str:
    if not same_folds(summary):
        return f"{ours(summary)}, mean ± SD over folds"
    arm = summary.arms[0]
    return f"{ours(summary)}, mean {'± SD ' if arm.complete else ''}over {folds_phrase(arm)}"


def threshold(summary: Summary) -> str:
    found = {arm.threshold for arm in summary.arms if arm.sources}
    return f"threshold {found.pop():g}" if len(found) == 1 else "each arm's own threshold"


def tests_of(summary: Summary) -> dict[str, ImageTest | Difference]:
    """Label of an entry → its headline metric against the baseline: image by image, or AUC of all images together."""
    metric = summary.headline_metric
    if summary.comparisons:
        return {row.label: row.metrics[metric].images for row in summary.comparisons.rows}
    if summary.label_comparisons and metric == "label_auc":
        return {row.label: auc for row in summary.label_comparisons.rows if (auc := row.metrics.get(metric))}
    return {}


def against(summary: Summary) -> str:
    """The baseline's label."""
    comparisons = summary.comparisons or summary.label_comparisons
    return comparisons.against if comparisons else "the baseline"


def headline_notes(summary: Summary, paper: PublishedTable | None) -> list[str]:
    notes = [*lower_is_better(summary.shown_metrics), *_definition_notes(summary), *tta_note(summary)]
    notes += old_choice_note(summary)
    if summary.folds_note:
        notes.append(f"One split: {summary.folds_note}.")
    with_synthetic = [
        f"{arm.label} ({scans.ratio:g} for each real one{'' if scans.real else ', which do not train'})"
        for arm in summary.arms
        if (scans := arm.synthetic)
    ]
    if with_synthetic:
        notes.append(f"Trained on synthetic scans: {listed(with_synthetic)}. All are validated on real scans only.")
    most_folds = max(arm.folds.expected for arm in summary.arms)
    if summary.complete and most_folds > 1:
        notes.append("Each image counts once within its fold, each fold once; SD is the sample SD over folds (ddof=1).")
    elif summary.complete:
        notes.append("One fold has no standard deviation.")
    elif summary.several:
        notes.append("Incomplete arms show the mean over their complete folds, without SD; it is not final.")
    else:
        notes.append("Folds are missing: these are means over the complete folds, without SD, and not final.")
    if is_transposed(summary) and len(summary.entries) == 1:
        notes.append(
            "95 % interval: of the mean over images, for classification of all images together; percentile bootstrap "
            "over patients."
        )
    elif not is_transposed(summary):
        of = "the mean over images" if summary.tested_metrics else "all images together"
        notes.append(f"95 % interval: of {of}, percentile bootstrap over patients.")
    if summary.comparisons and not is_transposed(summary):
        notes.append(
            f"Baseline: {summary.comparisons.against}. Effect size r and p: paired Wilcoxon signed-rank test "
            "over images, see the comparisons."
        )
    elif not is_transposed(summary) and tests_of(summary):
        notes.append(
            f"Baseline: {against(summary)}. p: DeLong's test of the AUC of all images together, with patients as the "
            "unit, see the labels."
        )
    if paper:
        notes.append(paper_note(paper, summary.shown_metrics))
    return [*notes, bold_note(summary, across=is_transposed(summary))]


def _definition_notes(summary: Summary) -> list[str]:
    """What a figure does not cover, and what cannot be read from its name."""
    shown, notes = summary.shown_metrics, []
    classes = classes_of(summary)
    if classes:
        notes.append(
            f"Metrics of an image are the mean over the mask classes {listed(classes)}; see the results by mask class."
        )
    of_images = [metric for metric in shown if metric in IMAGE_METRICS]
    notes += coverage(of_images, [(result.arm, result.figures) for result in summary.results], "lesion")
    by_reason: dict[str, list[str]] = {}
    for metric in summary.undefined_metrics:
        by_reason.setdefault(METRICS[metric].undefined, []).append(titled(metric))
    notes += [f"Not shown: {listed(names)}, as {reason}." for reason, names in by_reason.items()]
    return [*notes, *_metric_notes(shown, summary.arms[0].tolerance), *grid_notes(summary, shown)]


def grid_notes(summary: Summary, metrics: t.Iterable[str]) -> list[str]:
    """On which grid the metrics of masks are taken."""
    by_grid: dict[str, list[str]] = {}
    for metric in metrics:
        if grid := METRICS[metric].grid:
            by_grid.setdefault(grid, []).append(metric)
    sizes = {arm.image_size for arm in summary.arms if arm.image_size}
    pixels = {"network": f", {_range(sizes)} pixels a side" if sizes else ""}
    notes = [
        f"Grid: pixels of {listed([titled(name) for name in names])} are those of {GRIDS[grid]}{pixels.get(grid, '')}."
        for grid, names in by_grid.items()
    ]
    if any(METRICS[metric].spacing == "px" for names in by_grid.values() for metric in names):
        notes.append("Distances in px are in pixels of the original image.")
    if any(METRICS[metric].spacing == "network px" for names in by_grid.values() for metric in names):
        notes.append("Distances in network px are in pixels of the square images that the network reads.")
    return notes


def tta_note(summary: Summary) -> list[str]:
    """Which arms average over changed images at test time."""
    by_way: dict[str, list[str]] = {}
    for arm in summary.arms:
        by_way.setdefault(arm.tta, []).append(arm.label)
    spoken = {"mirror": "the image and its mirror image", "mirror_scale": "mirror images and three input sizes"}
    return [
        f"Test-time augmentation{f' of {listed(labels)}' if len(by_way) > 1 else ''}: mean probability over "
        f"{spoken.get(way, way)}."
        for way, labels in by_way.items()
        if way != "none"
    ]


def old_choice_note(summary: Summary) -> list[str]:
    """Which arms have a post-processing that does not belong to their weights."""
    old = [arm.label for arm in summary.arms if arm.postprocess_is_old]
    of = f" of {listed(old)}" if summary.several else ""
    note = f"Post-processing{of} is left out: it was chosen on predictions of other weights; choose it again."
    return [note] if old else []


def paper_note(paper: PublishedTable, metrics: t.Iterable[str], addition: str = "") -> str:
    """Where a paper's rows come from, and on which grid they are measured. addition: to the first sentence."""
    note = f"The paper's rows were not computed here{addition}: {paper.citation}."
    note += f" {paper.note}" if paper.note else ""
    return f"{note} {grid_sentence(paper)}" if has_grid(metrics) else note


def has_grid(metrics: t.Iterable[str]) -> bool:
    """Whether any of the metrics is taken on a grid of pixels."""
    return any(METRICS[metric].grid for metric in metrics)


def _metric_notes(shown: list[str], tolerance: dict[str, float]) -> list[str]:
    """What the shown metrics say of themselves, classification first. Metrics with the same note share it."""
    by_note: dict[str, list[Metric]] = {}
    for metric in (METRICS[name] for name in shown):
        by_note.setdefault(metric.note, []).append(metric)
    order = list(METRICS.values())
    notes = []
    for note, metrics in sorted(
        by_note.items(), key=lambda item: (item[1][0].of != "labels", min(map(order.index, item[1])))
    ):
        tolerances = [f"{tolerance[metric.name]:g} {metric.spacing}" for metric in metrics if metric.name in tolerance]
        if note and ("{tolerance}" not in note or tolerances):
            notes.append(note.format(tolerance=listed(tolerances)))
    return notes


def coverage(
    metrics: list[str], of_arms: t.Iterable[tuple[ArmSummary, t.Mapping[str, Figure]]], what: str
) -> list[str]:
    """How many images a metric covers, where that isn't all of them.

    of_arms: each arm with its figures by metric. what: images without it don't have the metric.
    """
    of_arms = list(of_arms)
    by_count: dict[str, list[str]] = {}
    for metric in metrics:
        counts = [(figures[metric].images, sum(arm.images.values())) for arm, figures in of_arms if metric in figures]
        pairs = [(images, total) for images, total in counts if isinstance(images, int)]
        if any(images < total for images, total in pairs):
            images, total = ({pair[i] for pair in pairs} for i in (0, 1))
            text = f"{_range(images)} of {_range(total)} images; the others have no {what}"
            text += " or no known pixel size" if METRICS[metric].spacing == "mm" else ""
            by_count.setdefault(text, []).append(titled(metric))
    return [f"{listed(names)}: of {text}." for text, names in by_count.items()]


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
