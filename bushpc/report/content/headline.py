"""Tables of the overall result: mean ± SD over folds with interval and test, for the page and for a terminal."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from bushpc.metrics.registry import LABEL_METRICS, METRICS
from bushpc.report.content.common import (
    FOLDS,
    METHOD,
    Scores,
    Summary,
    figures_of,
    folds_count,
    lines,
    metric_columns,
    printed,
    published,
    same_folds,
    several,
    titled,
    turned,
)
from bushpc.report.content.notes import against, headline_group, headline_notes, tests_of, threshold
from bushpc.report.content.turned import interval_of, turned_table
from bushpc.report.published import PublishedTable
from bushpc.report.tables import NOTHING, Column, Number, Table


@dataclass(frozen=True, kw_only=True)
class Headline(Scores):
    """low, high: of the 95 % interval of the headline metric. effect, p: of its test against the baseline."""

    low: Number = NOTHING
    high: Number = NOTHING
    effect: Number = NOTHING
    p: Number = NOTHING


def headline_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means for each entry with its interval, p and effect size; the paper's table below."""
    if not lines(summary):
        return None
    paper = published(summary, "overall")
    notes = headline_notes(summary, paper)
    if turned(summary):
        return turned_table(
            summary,
            name="headline",
            caption=f"Results at {threshold(summary)} on validation images",
            metrics=summary["shown_metrics"],
            paper=paper,
            notes=notes,
        )
    metric, tests = summary["headline_metric"], tests_of(summary)
    interval, versus = f"{titled(metric)}, 95 % interval", f"{titled(metric)} vs baseline"
    columns = (
        METHOD,
        replace(FOLDS, only_if=not same_folds(summary)),
        *metric_columns(summary),
        Column(key=f"{metric}_ci95_low", header="low", over=interval, of=lambda row: row.low),
        Column(key=f"{metric}_ci95_high", header="high", over=interval, of=lambda row: row.high),
        Column(
            key=f"{metric}_effect",
            header="r",
            over=versus,
            of=lambda row: row.effect,
            only_if=summary["comparisons"] is not None,
        ),
        Column(key=f"{metric}_p_holm", header="p (Holm)", over=versus, of=lambda row: row.p, only_if=bool(tests)),
    )
    rows = [*_headlines(summary, tests), *_papers_headlines(summary, paper)]
    return Table.of("headline", _task(summary), columns, rows, notes)


def _headlines(summary: Summary, tests: dict[str, Summary]) -> t.Iterator[Headline]:
    group = headline_group(summary)
    for line in lines(summary):
        low, high = interval_of(line, summary["headline_metric"])
        test = tests.get(line.label, {})
        yield Headline(
            label=line.label,
            folds=folds_count(line.arm),
            figures=figures_of(line.figures(), summary["shown_metrics"]),
            low=low,
            high=high,
            effect=Number(test.get("effect"), decimals=2),
            p=Number(test.get("p_holm"), is_p=True),
            group=group,
            ranked=line.ranked,
        )
    for arm in summary["arms"]:
        if several(summary) and not arm["sources"]:
            yield Headline(label=arm["label"], folds=folds_count(arm), figures={}, group=group, ranked=False)


def _papers_headlines(summary: Summary, paper: PublishedTable | None) -> t.Iterator[Headline]:
    for name, figures in paper.rows.items() if paper else ():
        assert paper is not None
        shown = printed(paper, figures, summary["shown_metrics"])
        yield Headline(label=name, figures=shown, group=paper.heading, quoted=True)


def _task(summary: Summary) -> str:
    tested = set(summary["tested_metrics"])
    if not tested:
        return "Classification of validation images"
    if all(METRICS[metric].of == "pixels" for metric in tested):
        return "Validation images as the model itself scores them"
    return f"Segmentation at {threshold(summary)} on validation images"


def overview_table(summary: Summary) -> Table | None:
    """The same for a terminal, which has no room for every column; None for one arm, whose folds are shown there."""
    if not several(summary):
        return None
    tests = tests_of(summary)
    tested = bool(tests or summary["tested_metrics"])
    metrics = _few(summary)
    rows = [
        Headline(
            label=line.label,
            folds=folds_count(line.arm),
            figures=figures_of(line.figures(), metrics),
            p=Number(tests.get(line.label, {}).get("p_holm"), is_p=True),
            ranked=line.ranked,
        )
        for line in lines(summary)
    ]
    caption = f"{summary['title']}: mean ± SD over folds"
    if tested:
        caption += f"; p (Holm) of {titled(summary['headline_metric'])} against {against(summary)}"
    columns = (
        METHOD,
        FOLDS,
        *metric_columns(summary, metrics, over=""),
        Column(key="p", header="p", of=lambda row: row.p, only_if=tested),
    )
    return Table.of("overview", caption, columns, rows)


def _few(summary: Summary) -> list[str]:
    """Metrics for where there is room for few: one a task, then more of what is tested."""
    label = [metric for metric in summary["shown_metrics"] if metric in LABEL_METRICS]
    tested = [metric for metric in summary["tested_metrics"] if metric in summary["shown_metrics"]]
    tested.sort(key=lambda metric: metric != summary["headline_metric"])
    return [*label[: 1 if tested else 2], *tested[: 1 if label else 2]]
