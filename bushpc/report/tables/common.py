"""What several tables share: columns of metrics, figures as numbers, and how folds are named."""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass, replace

from bushpc.metrics.registry import ALWAYS, LABEL_METRICS, METRICS, ON_ORIGINAL
from bushpc.report.published import PublishedTable, find_published, paper_table
from bushpc.report.summary import ArmSummary, Result, Summary
from bushpc.report.summary.comparison_records import (
    Comparison,
    Difference,
    ExternalComparison,
    FoldTest,
    ImageTest,
    LabelComparison,
)
from bushpc.report.summary.records import Figure, Mean, PooledFigure, RankTest, Source
from bushpc.report.table import NOTHING, Column, Number, RowData

METHOD = Column(key="method", header="Method", numeric=False, of=lambda row: row.label)
FOLDS = Column(key="folds", header="Folds", of=lambda row: row.folds)
_MOST_METHODS = 8  # columns of methods that fit on a page


@dataclass(frozen=True, kw_only=True)
class Scores(RowData):
    """A method with its figures. folds: how many it has, as text. figures: by metric; missing ones are dashes."""

    label: str
    folds: str = "—"
    figures: t.Mapping[str, Number]

    def figure(self, metric: str) -> Number:
        return self.figures.get(metric, NOTHING)


@dataclass(frozen=True, kw_only=True)
class TestedScores(Scores):
    """Scores with a test of one metric against another row; None where there is none."""

    test: ImageTest | Difference | RankTest | None = None

    @property
    def effect(self) -> Number:
        return effect_number(self.test.effect if self.test else None)

    @property
    def p(self) -> Number:
        return p_number(self.test.p_holm if self.test else None)


@dataclass(frozen=True, kw_only=True)
class OfResult(RowData):
    """A row of one entry: an arm under one prompt source."""

    result: Result

    @property
    def label(self) -> str:
        return self.result.label

    @property
    def folds(self) -> str:
        return folds_count(self.result.arm)


@dataclass(frozen=True, kw_only=True)
class OfComparison(RowData):
    """A row of one arm against the baseline. folds: how many are complete in both."""

    comparison: Comparison | LabelComparison | ExternalComparison

    @property
    def label(self) -> str:
        return self.comparison.label

    @property
    def folds(self) -> str:
        return count_of(len(self.comparison.folds), self.comparison.expected)


# --- columns ----------------------------------------------------------------------------------------------------


def metric_columns(
    summary: Summary, metrics: t.Iterable[str] | None = None, *, over: str | None = None, ranked: bool = True
) -> list[Column]:
    """A column of `Scores` for each metric, by default for all shown ones; with an arrow to the better side, unless
    only XBusNet's four are shown, where a note says it.

    over: second header line; by default the grid of pixels, after the task if the metrics are of two tasks.
    """
    arrows = not set(summary.shown_metrics) <= set(ALWAYS)
    columns = []
    for metric in summary.shown_metrics if metrics is None else metrics:
        more = METRICS[metric].more_is_better
        columns.append(
            Column(
                key=metric,
                of=functools.partial(_figure_of, metric),
                header=(titled(metric) if over is not None else without_grid(metric))
                + (f"\N{NO-BREAK SPACE}{'↑' if more else '↓'}" if arrows else ""),
                over=_task_and_grid(summary, metric) if over is None else over,
                better=("high" if more else "low") if ranked else None,
            )
        )
    return columns


def _task_and_grid(summary: Summary, metric: str) -> str:
    task = ("Classification" if metric in LABEL_METRICS else "Segmentation") if has_two_tasks(summary) else ""
    grid = METRICS[metric].grid
    return ", ".join(part for part in (task, f"{grid} grid" if grid else "") if part)


def without_grid(metric: str) -> str:
    """Title and unit of a metric below a line that names the grid."""
    return titled(metric.removesuffix(ON_ORIGINAL))


def _figure_of(metric: str, row: Scores) -> Number:
    return row.figure(metric)


def interval_columns(
    of: t.Callable[[t.Any], t.Sequence[float] | None], *, key: str = "ci95", over: str = "95 % interval"
) -> tuple[Column, Column]:
    """Two columns: the bounds that `of` reads from a row, or dashes."""
    return (
        Column(key=f"{key}_low", header="low", over=over, of=lambda row: bound(of(row), 0)),
        Column(key=f"{key}_high", header="high", over=over, of=lambda row: bound(of(row), 1)),
    )


def p_columns(of: t.Callable[[t.Any], t.Any], *, key: str = "p", over: str = "") -> tuple[Column, Column]:
    """Two columns: p of the test that `of` reads from a row, plain and adjusted."""
    return (
        Column(key=key, header="p", over=over, of=lambda row: p_number(of(row).p)),
        Column(key=f"{key}_holm", header="p (Holm)", over=over, of=lambda row: p_number(of(row).p_holm)),
    )


# --- figures ----------------------------------------------------------------------------------------------------


def number(figure: Figure | Mean | PooledFigure | ImageTest | FoldTest | None) -> Number:
    """A mean with its SD, if it has one; of an incomplete arm the partial mean. A dash for None."""
    if figure is None:
        return NOTHING
    value = figure.value if isinstance(figure, Mean) else figure.mean
    return Number(value, figure.sd if isinstance(figure, Figure) else None)


def without_sd(figure: Mean) -> Number:
    return Number(figure.value)


def numbers(figures: t.Mapping[str, Mean], metrics: t.Iterable[str]) -> dict[str, Number]:
    """Metric → number, for those of the metrics that have a figure.

    Those of masks don't compete where no lesion is found: an FPR of 0 is then no merit.
    """
    empty = finds_nothing(figures)
    found = {metric: number(figures[metric]) for metric in metrics if metric in figures}
    return {
        metric: replace(shown, competes=False) if empty and metric not in LABEL_METRICS else shown
        for metric, shown in found.items()
    }


def finds_nothing(figures: t.Mapping[str, Mean]) -> bool:
    """Whether no pixel of any lesion was found in any fold: the Dice is 0."""
    return "dice" in figures and figures["dice"].value == 0


def bound(bounds: t.Sequence[float] | None, side: t.Literal[0, 1]) -> Number:
    """The lower (0) or upper (1) bound of an interval, or a dash."""
    return Number(bounds[side]) if bounds else NOTHING


def p_number(p: t.Any) -> Number:
    """A p value, or a dash where there is none."""
    return Number(p if isinstance(p, float) else None, is_p=True)


def effect_number(effect: t.Any) -> Number:
    return Number(effect if isinstance(effect, float) else None, decimals=2)


# --- papers -----------------------------------------------------------------------------------------------------


def published(summary: Summary, kind: str) -> PublishedTable | None:
    """The first paper's table that fits one of the arms; of a paper's table of rivals, that paper's."""
    if summary.rivals:
        return paper_table(summary.rivals.paper, summary.data, kind)
    found = (find_published(summary.data, arm.model, kind) for arm in summary.arms)
    return next((table for table in found if table), None)


def published_numbers(
    paper: PublishedTable, figures: t.Mapping[str, t.Any], metrics: t.Iterable[str]
) -> dict[str, Number]:
    """Metrics of one row of a paper, each a mean or a mean with SD; a dash for what the paper doesn't print."""
    found = {}
    for metric in metrics:
        mean, sd = figures[metric] if isinstance(figures.get(metric), list) else (figures.get(metric), None)
        digits = len(repr(mean).partition(".")[2])  # a paper may print some of its figures with more
        found[metric] = Number(mean, sd, max(digits, paper.decimals.get(metric, 4)))
    return found


# --- words ------------------------------------------------------------------------------------------------------


def ours(summary: Summary) -> str:
    """How our own figures are introduced."""
    return {"grid": "this grid", "compare": "these runs"}.get(summary.kind, "this run")


def titled(metric: str) -> str:
    """A metric's title with its unit."""
    return METRICS[metric].heading


def listed(words: t.Sequence[str]) -> str:
    """ "a", "a and b" or "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def folds_phrase(arm: ArmSummary) -> str:
    """ "5 folds" or "4 of 5 folds": what every mean of an arm is a mean over."""
    return f"{folds_count(arm)} {'fold' if arm.folds.expected == 1 else 'folds'}"


def folds_count(arm: ArmSummary) -> str:
    """The same without the word."""
    return count_of(len(arm.folds.complete), arm.folds.expected)


def count_of(complete: int, expected: int) -> str:
    return str(expected) if complete == expected else f"{complete} of {expected}"


def same_folds(summary: Summary) -> bool:
    """Whether every arm has the same number of complete folds, so that rows needn't say it."""
    return len({folds_count(arm) for arm in summary.arms}) == 1


def classes_of(summary: Summary) -> list[str]:
    """Mask classes that some arm was measured by, in order; empty if the data has only one."""
    return list(dict.fromkeys(name for arm in summary.arms for name in arm.mask_classes))


def has_two_tasks(summary: Summary) -> bool:
    """Whether the shown metrics are of masks and of labels."""
    return len({metric in LABEL_METRICS for metric in summary.shown_metrics}) == 2


def is_transposed(summary: Summary) -> bool:
    """Whether metrics are rows and methods are columns, as in the SAM multi-task paper: two tasks make many metrics,
    and this suits few methods.
    """
    return has_two_tasks(summary) and len(summary.entries) <= _MOST_METHODS


def bold_note(summary: Summary, sources: t.Iterable[Source] = (), *, across: bool = False) -> str:
    """What bold means, and which results don't compete. sources: if the table shows others than the entries'.

    across: whether methods are columns.
    """
    entries = [summary.arms[entry.arm].sources[entry.source] for entry in summary.entries]
    unranked = list(dict.fromkeys(source.label for source in sources or entries if source.uses_ground_truth))
    groups = []
    if summary.several and not summary.complete and not sources:
        groups.append("incomplete arms")
    if any(finds_nothing(summary.arms[entry.arm].metrics[entry.source]) for entry in summary.entries):
        groups.append("mask metrics of methods with a Dice of 0")
    does = "does" if len(unranked) == 1 and not groups else "do"
    competes = f"; {', '.join([*unranked, *groups])} {does} not compete." if unranked or groups else "."
    return f"Bold: the best of its {'row' if across else 'group'}{competes}"


def why_quoted(rows: t.Iterable[tuple[str, str]]) -> list[str]:
    """A sentence for each reason why rows of a paper are not run. rows: labels with their reasons."""
    reasons: dict[str, list[str]] = {}
    for label, reason in rows:
        reasons.setdefault(reason, []).append(label)
    return [f"Quoted only, {listed(labels)}: {reason.rstrip('.')}." for reason, labels in reasons.items()]


def lower_is_better(metrics: t.Iterable[str]) -> list[str]:
    """The sentence that names the metrics of which less is better, if there are any."""
    lower = [titled(metric) for metric in metrics if not METRICS[metric].more_is_better]
    return [f"{listed(lower)}: lower is better."] if lower else []
