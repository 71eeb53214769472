"""Tables of cost: what every arm took, and where the time of every cell went."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bushpc.report.scope import ReportScope
from bushpc.report.summary import Summary
from bushpc.report.summary.records import Cost
from bushpc.report.table import Column, Number, RowData, Table
from bushpc.report.tables.provenance import CELL, arm_heading
from bushpc.runs.goodput import CAUSES, Goodput


@dataclass(frozen=True, kw_only=True)
class ArmCost(RowData):
    """An arm, or all of them."""

    label: str
    cost: Cost


_COST = (
    Column(key="arm", header="Arm", numeric=False, of=lambda row: row.label),
    Column(key="cells", header="Cells started", of=lambda row: row.cost.cells),
    Column(key="attempts", header="Attempts", of=lambda row: row.cost.attempts),
    Column(key="replayed_steps", header="Repeated steps", of=lambda row: row.cost.replayed_steps),
    Column(key="goodput", header="Goodput", of=lambda row: Number(row.cost.goodput, decimals=3)),
    Column(key="gpu_hours", header="GPU hours", of=lambda row: Number(row.cost.gpu_hours, decimals=2)),
    Column(key="core_hours", header="Core hours", of=lambda row: Number(row.cost.core_hours, decimals=2)),
    Column(key="energy_kwh", header="GPU energy, kWh", of=lambda row: Number(row.cost.energy_kwh, decimals=3)),
)


def cost_table(summary: Summary) -> Table | None:
    """What every arm took, and all of them; None before a cell has started."""
    if summary.cost is None:
        return None
    rows = [ArmCost(label=arm.label, cost=arm.cost) for arm in summary.arms if arm.cost]
    notes = [
        "Hours of all attempts, including preempted and failed ones. Core hours count runs without a GPU. Energy of "
        "the GPUs is read from the driver; a dash means that it was not available for every attempt."
    ]
    if summary.several:
        rows.append(ArmCost(label="total", cost=summary.cost, strong=True))
        notes.append("Total: cells that several arms share were trained once and count once.")
    return Table.of("cost", "Cost", _COST, rows, notes)


@dataclass(frozen=True, kw_only=True)
class CellTime(RowData):
    name: str
    account: Goodput


def _seconds(cause: str, row: CellTime) -> Number:
    return Number(row.account.seconds[cause], decimals=0)


_TIME = (
    CELL,
    Column(key="attempts", header="Attempts", of=lambda row: row.account.attempts),
    Column(key="replayed_steps", header="Repeated steps", of=lambda row: row.account.replayed_steps),
    Column(key="goodput", header="Goodput", of=lambda row: Number(row.account.share, decimals=3)),
    Column(key="gpu_hours", header="GPU hours", of=lambda row: Number(row.account.gpu_hours, decimals=2)),
    Column(key="wall_seconds", header="total", over="Seconds", of=lambda row: Number(row.account.wall_s, decimals=0)),
    *(
        Column(key=f"{cause}_seconds", header=title, over="Seconds", of=functools.partial(_seconds, cause))
        for cause, title in CAUSES.items()
    ),
)


def time_table(scope: ReportScope) -> Table | None:
    """Where the time of every cell went; None before one has started."""
    rows = [
        CellTime(name=cell.name, account=cell.goodput, group=arm_heading(scope, arm))
        for arm in scope.arms
        for cell in arm.cells
        if cell.goodput
    ]
    notes = (
        "Goodput: time of training steps that were not repeated, as a share of the time that the cell was submitted. "
        "All causes sum to the time from the first submission to the last heartbeat.",
        "Requeue: time from the last heartbeat of an attempt to the start of the next one, including what a killed "
        "attempt did after its last heartbeat.",
    )
    return Table.of("time", "How the time of every cell was spent", _TIME, rows, notes) if rows else None
