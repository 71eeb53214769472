"""Notes and captions that several tables share: what a figure covers, what it is compared with."""

from __future__ import annotations

from bushpc.metrics.registry import IMAGE_METRICS, METRICS, Metric
from bushpc.report.content.common import (
    Summary,
    bold_note,
    classes_of,
    folds_phrase,
    lines,
    listed,
    lower_is_better,
    ours,
    same_folds,
    several,
    titled,
    turned,
)
from bushpc.report.published import PublishedTable


def headline_group(summary: Summary) -> str:
    if not same_folds(summary):
        return f"{ours(summary)}, mean ± SD over folds"
    arm = summary["arms"][0]
    return f"{ours(summary)}, mean {'± SD ' if arm['complete'] else ''}over {folds_phrase(arm)}"


def threshold(summary: Summary) -> str:
    found = {arm["threshold"] for arm in summary["arms"] if arm["sources"]}
    return f"threshold {found.pop():g}" if len(found) == 1 else "each arm's own threshold"


def tests_of(summary: Summary) -> dict[str, Summary]:
    """Label of an entry → its headline metric against the baseline: image by image, AUC of all images together."""
    found, metric = summary["comparisons"], summary["headline_metric"]
    if found:
        return {row["label"]: row["metrics"][metric]["images"] for row in found["rows"]}
    found = summary["label_comparisons"] if metric == "label_auc" else None
    return {row["label"]: row[metric] for row in found["rows"] if row[metric]} if found else {}


def against(summary: Summary) -> str:
    found = summary["comparisons"] or summary["label_comparisons"]
    return found["against"] if found else "the baseline"


def headline_notes(summary: Summary, paper: PublishedTable | None) -> list[str]:
    notes = [*lower_is_better(summary["shown_metrics"]), *_definition_notes(summary)]
    if made := [(arm["label"], found) for arm in summary["arms"] if (found := arm["synthetic"])]:
        said = [
            f"{label} ({found['ratio']:g} for each real one{'' if found['real'] else ', which do not train'})"
            for label, found in made
        ]
        notes.append(f"Trained on synthetic scans: {listed(said)}. All are validated on real scans alone.")
    most_folds = max(arm["folds"]["expected"] for arm in summary["arms"])
    if summary["complete"] and most_folds > 1:
        notes.append("Each image counts once within its fold, each fold once; SD is the sample SD over folds (ddof=1).")
    elif summary["complete"]:
        notes.append("One fold has no standard deviation.")
    elif several(summary):
        notes.append(
            "Arms that miss folds show the mean over their complete ones, without SD, which is no final result."
        )
    else:
        notes.append("Folds are missing: these are means over the complete ones only, without SD, and no final result.")
    if turned(summary) and len(summary["entries"]) == 1:
        notes.append(
            "95 % interval: of the mean over images, of classification of all images together; percentile bootstrap "
            "over patients."
        )
    elif not turned(summary):
        of = "the mean over images" if summary["tested_metrics"] else "all images together"
        notes.append(f"95 % interval: of {of}, percentile bootstrap over patients.")
    if summary["comparisons"] and not turned(summary):
        notes.append(
            f"Baseline: {summary['comparisons']['against']}. Effect size r and p: paired Wilcoxon signed-rank test "
            "over images, see the comparisons."
        )
    elif not turned(summary) and tests_of(summary):
        notes.append(
            f"Baseline: {against(summary)}. p: DeLong's test of the AUC of all images together, with patients as the "
            "unit, see the labels."
        )
    if paper:
        notes.append(f"The paper's rows were not computed here: {paper.citation}.")
    return [*notes, bold_note(summary, across=turned(summary))]


def _definition_notes(summary: Summary) -> list[str]:
    """What a figure does not cover, and what cannot be read from its name."""
    shown, notes = summary["shown_metrics"], []
    classes = classes_of(summary)
    if classes:
        notes.append(f"Of an image the mean over the mask classes {listed(classes)}; see the results by mask class.")
    of_images = [metric for metric in shown if metric in IMAGE_METRICS]
    notes += coverage(of_images, [(line.arm, line.figures()) for line in lines(summary)], "lesion")
    by_reason: dict[str, list[str]] = {}
    for metric in summary["undefined_metrics"]:
        by_reason.setdefault(METRICS[metric].undefined, []).append(titled(metric))
    notes += [f"Not shown: {listed(names)}, as {reason}." for reason, names in by_reason.items()]
    return [*notes, *_metric_notes(shown, summary["arms"][0]["tolerance"])]


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
        said = [f"{tolerance[metric.name]:g} {metric.spacing}" for metric in metrics if metric.name in tolerance]
        if note and ("{tolerance}" not in note or said):
            notes.append(note.format(tolerance=listed(said)))
    return notes


def coverage(metrics: list[str], of_arms: list[tuple[Summary, Summary]], what: str) -> list[str]:
    """Of how many images a metric is, where it is not of all.

    of_arms: each arm with its figures by metric. what: is to be found in an image, and missing in the others.
    """
    by_count: dict[str, list[str]] = {}
    for metric in metrics:
        found = [
            (figures[metric]["images"], sum(arm["images"].values())) for arm, figures in of_arms if metric in figures
        ]
        if any(images < all_images for images, all_images in found):
            images, all_images = ({pair[i] for pair in found} for i in (0, 1))
            said = f"{_range(images)} of {_range(all_images)} images; the others have no {what}"
            said += " or no known pixel size" if METRICS[metric].spacing == "mm" else ""
            by_count.setdefault(said, []).append(titled(metric))
    return [f"{listed(names)}: of {said}." for said, names in by_count.items()]


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
