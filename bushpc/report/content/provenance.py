"""Tables of what it took and what it was made from: cost, time, cells, settings, shards."""

from __future__ import annotations

import typing as t

from bushpc.report.content.common import Summary, several
from bushpc.report.results import Arm
from bushpc.report.study import Study
from bushpc.report.tables import Column, Number, Row, Table, Value
from bushpc.runs.goodput import CAUSES
from bushpc.shards.manifest import Manifest

_CELL = Column(key="cell", header="Cell", numeric=False)
_ARM = Column(key="arm", header="Arm", numeric=False)
# A run's own names and places: they differ between any two runs and determine no result.
_NO_SETTINGS = ("name", "fold", "runs_dir")


def cost_table(summary: Summary) -> Table | None:
    """What every arm took, and all of them; None before a cell has started."""
    if summary["cost"] is None:
        return None
    costs = [(arm["label"], arm["cost"]) for arm in summary["arms"] if arm["cost"]]
    rows = [Row(values=_cost_values(label, cost)) for label, cost in costs]
    notes = [
        "Hours of all attempts, those included that were preempted or failed. Core hours count runs without a GPU; "
        "energy is what the driver says of the GPUs, and a dash where one attempt could not tell."
    ]
    if several(summary):
        rows.append(Row(values=_cost_values("in all", summary["cost"]), strong=True))
        notes.append("In all: a cell that several arms share was trained once and counts once.")
    return Table(
        name="cost",
        caption="What it cost",
        columns=(
            _ARM,
            Column(key="cells", header="Cells started"),
            Column(key="attempts", header="Attempts"),
            Column(key="replayed_steps", header="Steps done again"),
            Column(key="goodput", header="Goodput"),
            Column(key="gpu_hours", header="GPU hours"),
            Column(key="core_hours", header="Core hours"),
            Column(key="energy_kwh", header="GPU energy, kWh"),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _cost_values(label: str, cost: Summary) -> tuple[Value, ...]:
    return (
        label,
        cost["cells"],
        cost["attempts"],
        cost["replayed_steps"],
        Number(cost["goodput"], decimals=3),
        Number(cost["gpu_hours"], decimals=2),
        Number(cost["core_hours"], decimals=2),
        Number(cost["energy_kwh"], decimals=3),
    )


def time_table(study: Study) -> Table | None:
    """Where the time of every cell went; None before one has started."""
    started = [(arm, cell, cell.goodput) for arm in study.arms for cell in arm.cells if cell.goodput]
    if not started:
        return None
    rows = [
        Row(
            values=(
                cell.name,
                account.attempts,
                account.replayed_steps,
                Number(account.share, decimals=3),
                Number(account.gpu_hours, decimals=2),
                Number(account.wall_s, decimals=0),
                *(Number(account.seconds[cause], decimals=0) for cause in CAUSES),
            ),
            group=_group(study, arm),
        )
        for arm, cell, account in started
    ]
    seconds = "Seconds"
    return Table(
        name="time",
        caption="Where the time of every cell went",
        columns=(
            _CELL,
            Column(key="attempts", header="Attempts"),
            Column(key="replayed_steps", header="Steps done again"),
            Column(key="goodput", header="Goodput"),
            Column(key="gpu_hours", header="GPU hours"),
            Column(key="wall_seconds", header="in all", over=seconds),
            *(Column(key=f"{cause}_seconds", header=said, over=seconds) for cause, said in CAUSES.items()),
        ),
        rows=tuple(rows),
        notes=(
            "Goodput is the share of training steps that were not done again, of all time in which the cell was "
            "submitted. All causes sum to the time from the first submission to the last sign of life.",
            "Requeue is the time from an attempt's last sign of life to the next one's begin; what a killed attempt "
            "did after its last sign of life is in it.",
        ),
    )


def _group(study: Study, arm: Arm) -> str:
    return arm.label if len(study.arms) > 1 else ""


def cells_table(study: Study) -> Table:
    """State of every cell: complete, or why not; and whose weights it has, where it trained none."""
    elsewhere = any(cell.trained_in for arm in study.arms for cell in arm.cells)
    rows = [
        Row(
            values=(
                cell.name,
                str(cell.fold),
                "complete" if cell.complete else f"missing: {cell.reason}",
                "—" if cell.step is None else cell.step,
                cell.hash,
                *([cell.trained_in or "—"] if elsewhere else []),
            ),
            group=_group(study, arm),
        )
        for arm in study.arms
        for cell in arm.cells
    ]
    return Table(
        name="cells",
        caption="Cells of this run" if len(study.runs) == 1 else "Cells of these runs",
        columns=(
            _CELL,
            Column(key="fold", header="Fold", numeric=False),
            Column(key="state", header="State", numeric=False),
            Column(key="step", header="Step"),
            Column(key="config_hash", header="Config hash", numeric=False),
            *([Column(key="trained_in", header="Trained in", numeric=False)] if elsewhere else []),
        ),
        rows=tuple(rows),
        notes=(
            "Cells that were trained in another run were only evaluated in this one: weights and curves are those of "
            "that training, and what it cost is told there.",
        )
        if elsewhere
        else (),
    )


def differences_table(study: Study) -> Table | None:
    """Every setting in which an arm's composed config differs from the baseline's."""
    ours = _config(study.baseline)
    rows = []
    for arm in study.arms:
        theirs = _config(arm)
        differ = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        rows += [
            Row(values=(key, _said(ours, key), _said(theirs, key)), group=arm.label)
            for key in differ
            if ours and theirs and key not in _NO_SETTINGS
        ]
    if not rows:
        return None
    return Table(
        name="settings",
        caption=f"Settings that differ from {study.baseline.label}",
        columns=(
            Column(key="setting", header="Setting", numeric=False),
            Column(key="baseline", header="There", numeric=False),
            Column(key="here", header="Here", numeric=False),
        ),
        rows=tuple(rows),
        notes=("Of each arm the config of its first fold; all others are alike but for the fold.",),
    )


def _config(arm: Arm) -> dict[str, t.Any]:
    return next((cell.settings for cell in arm.cells if cell.settings), {})


def _said(settings: dict[str, t.Any], key: str) -> str:
    return str(settings[key]) if key in settings else "—"


def shards_table(manifest: Manifest | None) -> Table | None:
    """The packed files with their hashes; None where the shards are gone or were packed anew."""
    if manifest is None:
        return None
    return Table(
        name="shards",
        caption="Packed data",
        columns=(
            Column(key="file", header="Shard", numeric=False),
            Column(key="samples", header="Samples"),
            Column(key="bytes", header="Bytes"),
            Column(key="sha256", header="SHA-256", numeric=False),
        ),
        rows=tuple(Row(values=(shard.file, shard.samples, shard.bytes, shard.sha256)) for shard in manifest.shards),
    )
