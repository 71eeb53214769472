"""Tables of differences between arms and their tests: per image, per fold, and all arms at once."""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass

from bushpc.report.summary import Summary
from bushpc.report.summary.comparison_records import Comparison, FoldTest, FriedmanTest, ImageTest
from bushpc.report.table import Column, Number, RowData, Table
from bushpc.report.tables.common import (
    FOLDS,
    METHOD,
    OfComparison,
    effect_number,
    interval_columns,
    p_columns,
    p_number,
    titled,
)
from bushpc.report.tables.notes import grid_notes

_MOST_PAIRED = 10  # arms up to which a matrix of all pairs can be read


@dataclass(frozen=True, kw_only=True)
class Tested(OfComparison):
    """One arm against the baseline in one metric."""

    comparison: Comparison
    test: ImageTest | FoldTest


_MEAN_DIFFERENCE = (
    Column(key="mean_difference", header="Mean difference", of=lambda row: Number(row.test.mean)),
    *interval_columns(lambda row: row.test.ci95),
)
_EFFECT = Column(key="effect", header="effect r", of=lambda row: effect_number(row.test.effect))
_P = p_columns(lambda row: row.test)


def comparison_table(summary: Summary) -> Table | None:
    """Paired Wilcoxon test of each entry against the baseline, over images (XBusNet 3.1)."""
    if summary.comparisons is None:
        return None
    return Table.of(
        "comparisons",
        f"Per image, against {summary.comparisons.against}",
        (
            METHOD,
            FOLDS,
            Column(key="images", header="Images", of=lambda row: row.test.images),
            *_MEAN_DIFFERENCE,
            _EFFECT,
            *_P,
        ),
        _tested(summary, "images"),
        (
            "Two-sided paired Wilcoxon signed-rank test over the images that both have, in folds complete in both. "
            "Images without a difference are dropped (Wilcoxon's method). Effect: matched-pairs rank-biserial "
            "correlation of the others, from \u22121 to 1; positive means better than the baseline.",
            "Interval of the mean difference: percentile bootstrap over patients. p (Holm): adjusted for all tests of "
            "this table.",
            *grid_notes(summary, summary.tested_metrics),
            *_untested(summary, "images"),
        ),
    )


def fold_comparison_table(summary: Summary) -> Table | None:
    """Nadeau and Bengio's corrected resampled t-test of each entry against the baseline, over fold means."""
    if summary.comparisons is None:
        return None
    return Table.of(
        "fold_comparisons",
        f"Per fold, against {summary.comparisons.against}",
        (
            METHOD,
            FOLDS,
            *_MEAN_DIFFERENCE,
            Column(key="t", header="t", of=lambda row: Number(row.test.t, decimals=2)),
            *_P,
        ),
        _tested(summary, "folds"),
        (
            "Corrected resampled t-test (Nadeau and Bengio 2003): folds share training data, so their variance is "
            "multiplied by 1/k + n_test/n_train. It tests whether a new training on new folds would differ too, which "
            "a test over images does not. p (Holm): adjusted for all tests of this table.",
            *grid_notes(summary, summary.tested_metrics),
            *_untested(summary, "folds"),
        ),
    )


def _tested(summary: Summary, kind: t.Literal["images", "folds"]) -> t.Iterator[Tested]:
    assert summary.comparisons is not None, "the table is left out without them"
    for metric in summary.tested_metrics:
        for row in summary.comparisons.rows:
            tests = row.metrics[metric]
            yield Tested(comparison=row, test=tests.images if kind == "images" else tests.folds, group=titled(metric))


def _untested(summary: Summary, kind: t.Literal["images", "folds"]) -> list[str]:
    """A sentence for every test that was not possible."""
    reasons = {
        f"{row.label}: no {row.group} test, {row.test.reason}." for row in _tested(summary, kind) if row.test.reason
    }
    return sorted(reasons)


@dataclass(frozen=True, kw_only=True)
class Ranked(RowData):
    """An arm of Friedman's test, by position."""

    test: FriedmanTest
    position: int

    @property
    def label(self) -> str:
        return self.test.labels[self.position]

    @property
    def rank(self) -> Number:
        return Number(self.test.ranks[self.position], decimals=2)

    def p_against(self, other: int) -> Number:
        """Nemenyi's p of the pair."""
        nemenyi = self.test.nemenyi
        return p_number(nemenyi[self.position][other] if nemenyi and other != self.position else None)


def nemenyi_table(summary: Summary) -> Table | None:
    """Friedman's test over all entries with Nemenyi's post hoc (hybrid-attention paper, 5.1.1)."""
    test = summary.friedman
    if test is None or not test.ranks:
        return None
    against = range(len(test.labels)) if len(test.labels) <= _MOST_PAIRED else range(1)
    columns = (
        METHOD,
        Column(key="mean_rank", header="Mean rank", of=lambda row: row.rank),
        *(
            Column(
                key=f"p_{test.labels[other]}",
                header=test.labels[other],
                over="Nemenyi p against",
                of=functools.partial(_p_against, other),
            )
            for other in against
        ),
    )
    notes = [
        _friedman_sentence(test),
        "Mean rank: 1 is best on every image. p: Nemenyi's post hoc test, adjusted for all pairs.",
    ]
    if len(against) < len(test.labels):
        notes.append(f"With more than {_MOST_PAIRED} arms, only pairs with the first are shown; summary.json has all.")
    rows = [Ranked(test=test, position=position) for position in range(len(test.labels))]
    caption = f"All arms at once: mean ranks over {test.images} images, and p of each pair"
    return Table.of("nemenyi", caption, columns, rows, notes)


def _p_against(other: int, row: Ranked) -> Number:
    return row.p_against(other)


def _friedman_sentence(test: FriedmanTest) -> str:
    what = f"Friedman's test of {len(test.labels)} rankings on the {titled(test.metric)} of {test.images} images"
    if test.reason:
        return f"{what}: not possible, {test.reason}."
    p = str(p_number(test.p))
    relation = p if p.startswith("<") else f"= {p}"
    return f"{what}: χ² = {test.chi2:.2f}, df = {len(test.labels) - 1}, p {relation}."
