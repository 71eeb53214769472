"""What several tables share: the entries of a summary, and how folds are spoken of."""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass

from bushpc.metrics.registry import ALWAYS, LABEL_METRICS, METRICS
from bushpc.report.published import PublishedTable, find_published
from bushpc.report.tables import NOTHING, Column, Entry, Number

Summary = dict[str, t.Any]

METHOD = Column(key="method", header="Method", numeric=False, of=lambda row: row.label)
_MOST_TURNED = 8  # columns of methods that a page has room for
FOLDS = Column(key="folds", header="Folds", of=lambda row: row.folds)


@dataclass(frozen=True, kw_only=True)
class Scores(Entry):
    """A method with its figures. folds: how many it has, as text. figures: by metric; a dash for what is missing."""

    label: str
    folds: str = "—"
    figures: t.Mapping[str, Number]

    def figure(self, metric: str) -> Number:
        return self.figures.get(metric, NOTHING)


class Line(t.NamedTuple):
    """An entry of the summary with its arm: what most tables have a row, or a group of rows, for.

    ranked: it competes for bold. Not what no user could get, nor an arm without all folds beside one with them.
    """

    arm: Summary
    source: str
    label: str
    ranked: bool

    def figures(self) -> dict[str, t.Any]:
        """By metric."""
        return self.arm["metrics"][self.source]


def lines(summary: Summary) -> list[Line]:
    """The entries, in their order."""
    found = []
    for entry in summary["entries"]:
        arm = summary["arms"][entry["arm"]]
        whole = arm["complete"] or not several(summary)
        found.append(Line(arm, entry["source"], entry["label"], whole and not entry["uses_ground_truth"]))
    return found


def several(summary: Summary) -> bool:
    """Whether arms stand side by side."""
    return len(summary["arms"]) > 1


def ours(summary: Summary) -> str:
    """How our own figures are introduced."""
    return {"grid": "this grid", "compare": "these runs"}.get(summary["kind"], "this run")


def metric_columns(
    summary: Summary, metrics: t.Iterable[str] | None = None, *, over: str | None = None, ranked: bool = True
) -> list[Column]:
    """A column for each metric, by default for all that are shown; with an arrow to the better side unless these are
    XBusNet's four, of which a note says it.

    over: what stands above; by default the task, where models do two.
    """
    shown = summary["shown_metrics"]
    arrows = not set(shown) <= set(ALWAYS)
    tasks = len({metric in LABEL_METRICS for metric in shown}) == 2
    columns = []
    for metric in shown if metrics is None else metrics:
        task = ("Classification" if metric in LABEL_METRICS else "Segmentation") if tasks else ""
        more = METRICS[metric].more_is_better
        columns.append(
            Column(
                key=metric,
                of=functools.partial(_figure_of, metric),
                header=titled(metric) + (f"\N{NO-BREAK SPACE}{'↑' if more else '↓'}" if arrows else ""),
                over=task if over is None else over,
                better=("high" if more else "low") if ranked else None,
            )
        )
    return columns


def _figure_of(metric: str, row: Scores) -> Number:
    return row.figure(metric)


def titled(metric: str) -> str:
    """Its name as people read it, with the unit."""
    return METRICS[metric].heading


def listed(words: t.Sequence[str]) -> str:
    """ "a", "a and b" or "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def lower_is_better(metrics: t.Iterable[str]) -> list[str]:
    """The sentence that says of which; none where more is better of all."""
    lower = [titled(metric) for metric in metrics if not METRICS[metric].more_is_better]
    return [f"{listed(lower)}: lower is better."] if lower else []


def folds_phrase(arm: Summary) -> str:
    """ "5 folds" or "4 of 5 folds": what every mean of an arm is a mean over."""
    expected = arm["folds"]["expected"]
    return f"{folds_count(arm)} {'fold' if expected == 1 else 'folds'}"


def folds_count(arm: Summary) -> str:
    """The same without the word."""
    expected, complete = arm["folds"]["expected"], len(arm["folds"]["complete"])
    return str(expected) if arm["complete"] else f"{complete} of {expected}"


def figure(metric: dict[str, t.Any]) -> Number:
    """A mean with its SD; of an incomplete arm what there is, without."""
    return Number(metric["mean"] if metric["partial_mean"] is None else metric["partial_mean"], metric.get("sd"))


def figures_of(figures: dict[str, t.Any], metrics: t.Iterable[str]) -> dict[str, Number]:
    """Metric → mean with its SD, of those of the metrics that there are figures of."""
    return {metric: figure(figures[metric]) for metric in metrics if metric in figures}


def bounds(metric: dict[str, t.Any]) -> tuple[Number, Number]:
    """Of the 95 % interval of a figure that may be partial."""
    low, high = metric.get("ci95") or metric.get("partial_ci95") or (None, None)
    return Number(low), Number(high)


def printed(paper: PublishedTable, figures: t.Mapping[str, t.Any], metrics: t.Iterable[str]) -> dict[str, Number]:
    """Metrics of one row of a paper, each a mean or a mean with SD; a dash for what it does not print."""
    found = {}
    for metric in metrics:
        mean, sd = figures[metric] if isinstance(figures.get(metric), list) else (figures.get(metric), None)
        digits = len(repr(mean).partition(".")[2])  # a paper may print some of its figures with more
        found[metric] = Number(mean, sd, max(digits, paper.decimals.get(metric, 4)))
    return found


def published(summary: Summary, kind: str) -> PublishedTable | None:
    """The first paper's table that fits one of the arms."""
    found = (find_published(summary["data"], arm["model"], kind) for arm in summary["arms"])
    return next((table for table in found if table), None)


def bold_note(summary: Summary, sources: t.Iterable[Summary] = (), *, across: bool = False) -> str:
    """Which rows do not compete, by name. sources: where a table shows others than the entries'.
    across: whether methods are columns.
    """
    entries = [summary["arms"][entry["arm"]]["sources"][entry["source"]] for entry in summary["entries"]]
    unranked = list(dict.fromkeys(source["label"] for source in sources or entries if source["uses_ground_truth"]))
    if several(summary) and not summary["complete"] and not sources:
        unranked.append("what lacks a fold")
    does = "does" if len(unranked) == 1 else "do"
    competes = f"; {', '.join(unranked)} {does} not compete." if unranked else "."
    return f"Bold: the best of its {'row' if across else 'group'}{competes}"


def turned(summary: Summary) -> bool:
    """Whether metrics are rows and methods columns, as in the SAM multi-task paper: where a model does two tasks, which
    makes many metrics, and there are few methods.
    """
    tasks = {metric in LABEL_METRICS for metric in summary["shown_metrics"]}
    return len(tasks) == 2 and len(summary["entries"]) <= _MOST_TURNED


def same_folds(summary: Summary) -> bool:
    """Whether every arm has the same number of complete folds, so that it need not be said in each row."""
    return len({folds_count(arm) for arm in summary["arms"]}) == 1


def classes_of(summary: Summary) -> list[str]:
    """Mask classes that some arm was measured by, in their order; none where there is but one."""
    return list(dict.fromkeys(name for arm in summary["arms"] for name in arm["mask_classes"]))
