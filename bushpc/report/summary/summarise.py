"""Scope → `Summary`: the figures of every arm, and how the arms differ."""

from __future__ import annotations

from bushpc.metrics.registry import METRICS
from bushpc.report.costs import cost_of
from bushpc.report.scope import ReportScope
from bushpc.report.stats import adjust
from bushpc.report.summary.arms import cost_record, summarise_arm
from bushpc.report.summary.comparisons import compare, compare_elsewhere, compare_labels, rank_all
from bushpc.report.summary.records import RivalLine, Rivals
from bushpc.report.summary.summary import EntryRecord, Summary
from bushpc.runs.run_record import QuotedRecord


def summarise(scope: ReportScope) -> Summary:
    """All figures, at full precision."""
    arms = [summarise_arm(scope, arm) for arm in scope.arms]
    if len(arms) > 1:
        adjust([test for arm in arms for test in arm.source_tests.values()])
    run = scope.runs[0].record
    return Summary(
        title=scope.title,
        kind=scope.kind,
        # An excerpt gets another name, so that no figure published for the whole dataset is shown beside it.
        data=run.data + (" (excerpt)" if run.excerpt else ""),
        folds_source=run.folds.source,
        folds_note=run.folds.note,
        complete=all(arm.complete for arm in scope.arms),
        baseline=scope.baseline.name,
        shown_metrics=scope.metrics,
        undefined_metrics=scope.undefined,
        tested_metrics=scope.tested,
        headline_metric=scope.headline_metric,
        cost=cost_record(cost_of(cell for arm in scope.arms for cell in arm.cells)),
        entries=[
            EntryRecord(
                arm=scope.arms.index(entry.arm),
                source=entry.source,
                label=entry.label,
                uses_ground_truth=entry.uses_ground_truth,
            )
            for entry in scope.entries
        ],
        comparisons=compare(scope),
        label_comparisons=compare_labels(scope),
        external=scope.external,
        external_comparisons=compare_elsewhere(scope),
        friedman=rank_all(scope),
        arms=arms,
        grids={metric: grid for metric in scope.metrics if (grid := METRICS[metric].grid)},
        rivals=_rivals(scope),
    )


def _rivals(scope: ReportScope) -> Rivals | None:
    """The lines of a paper's table of methods: the grid's rows, and the quoted ones where the grid has them."""
    grid = scope.runs[0].record.grid
    if scope.kind != "grid" or grid is None or grid.paper is None:
        return None
    printed_as = {row.name: row.printed_as for row in grid.rows}
    lines = []
    for position, arm in enumerate(scope.arms):
        lines += [_quoted_line(row) for row in grid.quoted if row.before == arm.name]
        lines.append(RivalLine(label=arm.label, arm=position, printed_as=printed_as[arm.name]))
    lines += [_quoted_line(row) for row in grid.quoted if row.before is None]
    return Rivals(paper=grid.paper, lines=lines)


def _quoted_line(row: QuotedRecord) -> RivalLine:
    return RivalLine(label=row.label, arm=None, printed_as=row.printed_as, reason=row.reason)
