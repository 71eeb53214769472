"""A plan as `bushpc grid --list` shows it."""

from __future__ import annotations

import dataclasses
import json
import typing as t

from bushpc.dispatch.plan import Plan

if t.TYPE_CHECKING:
    from rich.table import Table


def plan_table(plan: Plan) -> Table:
    """What `bushpc grid --list` shows: a row per row of the grid."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    assert plan.grid is not None
    table = Table(title=f"{plan.first.run_dir}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("row", "label", "sets", "folds", "ranks", "GPUs"):
        table.add_column(column, justify="right" if column in ("folds", "ranks", "GPUs") else "left")
    for row in (*plan.grid.generators, *plan.grid.rows):
        of_row = [plan.cells[name] for name in plan.wanted if plan.row_of[name] == row.name]
        cells = [cell for cell in of_row if cell.work == "train"]
        cluster = plan.cells[f"{row.name}-fold0"].cluster
        if row.scans:
            row = dataclasses.replace(row, settings={"scans": row.scans, **row.settings})
        sets = ", ".join(f"{key}={json.dumps(value)}" for key, value in row.settings.items())
        gpus = str(cluster.nodes * cluster.gpu_count)
        name = f"{row.name} (baseline)" if row.name == plan.grid.baseline else row.name
        table.add_row(*map(escape, (name, row.label, sets, str(len(cells)), str(cluster.world_size), gpus)))
    return table
