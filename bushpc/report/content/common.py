"""What several tables share: the entries of a summary, and how folds are spoken of."""

from __future__ import annotations

import typing as t

from bushpc.report.published import PublishedTable, find_published
from bushpc.report.results import METRICS
from bushpc.report.tables import Column, Number

Summary = dict[str, t.Any]

METRIC_COLUMNS = (
    Column(key="dice", header="Dice", better="high"),
    Column(key="iou", header="IoU", better="high"),
    Column(key="fpr", header="FPR", better="low"),
    Column(key="fnr", header="FNR", better="low"),
)
UNRANKED_METRIC_COLUMNS = tuple(Column(key=c.key, header=c.header) for c in METRIC_COLUMNS)
METHOD = Column(key="method", header="Method", numeric=False)
FOLDS = Column(key="folds", header="Folds")


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


def bounds(metric: dict[str, t.Any]) -> tuple[Number, Number]:
    """Of the 95 % interval of a figure that may be partial."""
    low, high = metric.get("ci95") or metric.get("partial_ci95") or (None, None)
    return Number(low), Number(high)


def printed(figures: t.Mapping[str, t.Any], decimals: int) -> list[Number]:
    """The four metrics of a paper, each a mean or a mean with SD."""
    pairs = (figures[metric] if isinstance(figures[metric], list) else [figures[metric], None] for metric in METRICS)
    return [Number(mean, sd, decimals) for mean, sd in pairs]


def published(summary: Summary, kind: str) -> PublishedTable | None:
    """The first paper's table that fits one of the arms."""
    found = (find_published(summary["data"], arm["model"], kind) for arm in summary["arms"])
    return next((table for table in found if table), None)


def bold_note(summary: Summary, sources: t.Iterable[Summary] = ()) -> str:
    """Which rows do not compete, by name. sources: where a table shows others than the entries'."""
    entries = [summary["arms"][entry["arm"]]["sources"][entry["source"]] for entry in summary["entries"]]
    unranked = list(dict.fromkeys(source["label"] for source in sources or entries if source["uses_ground_truth"]))
    if several(summary) and not summary["complete"] and not sources:
        unranked.append("what lacks a fold")
    does = "does" if len(unranked) == 1 else "do"
    return "Bold: the best of its group" + (f"; {', '.join(unranked)} {does} not compete." if unranked else ".")


def same_folds(summary: Summary) -> bool:
    """Whether every arm has the same number of complete folds, so that it need not be said in each row."""
    return len({folds_count(arm) for arm in summary["arms"]}) == 1
