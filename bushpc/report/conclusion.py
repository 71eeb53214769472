"""Summary → the sentences at the top of a report: which arm is best, by how much, and whether the tests agree."""

from __future__ import annotations

from bushpc.metrics.registry import METRICS
from bushpc.report.summary import Result, Summary
from bushpc.report.summary.comparison_records import FoldTest, ImageTest
from bushpc.report.tables.common import folds_phrase, titled

LEVEL = 0.05  # of significance, after Holm's correction


def conclusion(summary: Summary) -> str:
    """What the figures and tests say, in two or three sentences; nothing that they do not."""
    metric = summary.headline_metric
    ranked = [each for each in summary.results if each.ranked and _value(each, metric) is not None]
    if not ranked:
        return "No fold is complete, so nothing can be concluded."
    final = "" if summary.complete else " Cells are missing, so this is not final."
    best = sorted(ranked, key=lambda each: _value(each, metric) or 0.0, reverse=METRICS[metric].more_is_better)[0]
    if len(ranked) == 1:
        return f"{best.label}: {_measured(best, metric)}, over {folds_phrase(best.arm)}.{final}"
    lead = f"{best.label} has the best {titled(metric)}: {_measured(best, metric)}."
    return f"{lead} {_against_baseline(summary, best, metric)}{final}"


def _value(result: Result, metric: str) -> float | None:
    figure = result.figures.get(metric)
    return figure.value if figure else None


def _measured(result: Result, metric: str) -> str:
    figure = result.figures[metric]
    interval = ""
    if figure.bounds:
        interval = f" (95 % interval over patients {figure.bounds[0]:.3f} to {figure.bounds[1]:.3f})"
    return f"{titled(metric)} {figure.value:.3f}{interval}"


def _against_baseline(summary: Summary, best: Result, metric: str) -> str:
    rows = {row.label: row.metrics for row in (summary.comparisons.rows if summary.comparisons else [])}
    tests = {label: metrics[metric] for label, metrics in rows.items() if metric in metrics}
    if best.label in tests:
        assert summary.comparisons is not None, "a test has a baseline"
        return _tested(summary.comparisons.against, tests[best.label].images, tests[best.label].folds)
    if tests and summary.comparisons and best.label == summary.comparisons.against:
        worse = [label for label, test in tests.items() if _significant(test.images)]
        return f"It is the baseline; {len(worse)} of {len(tests)} others differ from it significantly, image by image."
    return f"No test of its {titled(metric)} against the baseline was possible, so the difference may be chance."


def _tested(baseline: str, images: ImageTest, folds: FoldTest) -> str:
    if images.mean is None or images.p_holm is None:
        return f"A test against {baseline} was not possible: {images.reason}."
    by = f"{abs(images.mean):.3f} {'more' if images.mean > 0 else 'less'} than {baseline}"
    interval = f", 95 % interval {images.ci95[0]:.3f} to {images.ci95[1]:.3f}" if images.ci95 else ""
    verdict = "significant" if _significant(images) else "not significant"
    text = f"On the images that both have it is {by}{interval}; image by image this is {verdict} ({_p(images.p_holm)})"
    if folds.p_holm is None:
        return f"{text}; there is no test over folds."
    agrees = "significant, too" if _significant(folds) else "not significant"
    agrees = agrees if _significant(images) else agrees.replace(", too", "")
    return f"{text}, and over folds, which stand for new trainings, it is {agrees} ({_p(folds.p_holm)})."


def _significant(test: ImageTest | FoldTest) -> bool:
    return test.p_holm is not None and test.p_holm < LEVEL


def _p(p: float) -> str:
    return "Holm-corrected p < 0.001" if p < 0.001 else f"Holm-corrected p = {p:.3f}"
