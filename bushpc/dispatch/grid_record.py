"""A grid as run.json has it, and back."""

from __future__ import annotations

import json
import typing as t
from collections.abc import Mapping

from bushpc.dispatch.grid_file import Grid, GridRow, QuotedRow
from bushpc.runs.run_record import GridRecord, QuotedRecord, RowRecord


def grid_record(grid: Grid, models: Mapping[str, str]) -> GridRecord:
    """As run.json has it. models: row → model."""
    rows, generators = ([_row_record(row, models[row.name]) for row in some] for some in (grid.rows, grid.generators))
    quoted = [
        QuotedRecord(label=row.label, printed_as=list(row.printed_as), reason=row.reason, before=row.before)
        for row in grid.quoted
    ]
    return GridRecord(
        name=grid.name,
        title=grid.title,
        baseline=grid.baseline,
        rows=rows,
        paper=grid.paper,
        quoted=quoted,
        generators=generators,
    )


def _row_record(row: GridRow, model: str) -> RowRecord:
    return RowRecord(
        name=row.name,
        label=row.label,
        settings=_plain(row.settings),
        model=model,
        printed_as=list(row.printed_as),
        scans=row.scans,
    )


def read_grid(grid: GridRecord) -> Grid:
    """The grid of a run that was planned before; its base is part of the frozen cells."""
    rows, generators = ([_row(row) for row in some] for some in (grid.rows, grid.generators))
    quoted = [
        QuotedRow(label=row.label, printed_as=tuple(row.printed_as), reason=row.reason, before=row.before)
        for row in grid.quoted
    ]
    return Grid(
        name=grid.name,
        title=grid.title,
        base=(),
        rows=tuple(rows),
        baseline=grid.baseline or rows[0].name,
        paper=grid.paper,
        quoted=tuple(quoted),
        generators=tuple(generators),
    )


def _row(row: RowRecord) -> GridRow:
    printed_as = tuple(row.printed_as)
    return GridRow(name=row.name, label=row.label, settings=row.settings, printed_as=printed_as, scans=row.scans)


def _plain(settings: Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Without what only the reader of yaml needs: its numbers remember how they were typed."""
    return dict(json.loads(json.dumps(settings)))
