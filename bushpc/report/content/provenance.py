"""Tables of what the results were made from: cells, settings, shards."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from bushpc.report.results import Arm, Cell
from bushpc.report.study import Study
from bushpc.report.tables import Column, Entry, Row, Table
from bushpc.shards.manifest import Manifest, ShardInfo

CELL = Column(key="cell", header="Cell", numeric=False, of=lambda row: row.name)
# A run's own names and places: they differ between any two runs and determine no result.
_NO_SETTINGS = ("name", "fold", "runs_dir")


def arm_heading(study: Study, arm: Arm) -> str:
    """What the rows of an arm stand under; nothing where there is only one."""
    return arm.label if len(study.arms) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class CellState(Entry):
    cell: Cell

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def state(self) -> str:
        return "complete" if self.cell.complete else f"missing: {self.cell.reason}"


def cells_table(study: Study) -> Table:
    """State of every cell: complete, or why not; and whose weights it has, where it trained none."""
    elsewhere = any(cell.trained_in for arm in study.arms for cell in arm.cells)
    columns = (
        CELL,
        Column(key="fold", header="Fold", numeric=False, of=lambda row: str(row.cell.fold)),
        Column(key="state", header="State", numeric=False, of=lambda row: row.state),
        Column(key="step", header="Step", of=lambda row: "—" if row.cell.step is None else row.cell.step),
        Column(key="config_hash", header="Config hash", numeric=False, of=lambda row: row.cell.hash),
        Column(
            key="trained_in",
            header="Trained in",
            numeric=False,
            of=lambda row: row.cell.trained_in or "—",
            only_if=elsewhere,
        ),
    )
    rows = [CellState(cell=cell, group=arm_heading(study, arm)) for arm in study.arms for cell in arm.cells]
    note = (
        "Cells that were trained in another run were only evaluated in this one: weights and curves are those of "
        "that training, and what it cost is told there."
    )
    caption = "Cells of this run" if len(study.runs) == 1 else "Cells of these runs"
    return Table.of("cells", caption, columns, rows, [note] if elsewhere else [])


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


@dataclass(frozen=True, kw_only=True)
class PackedShard(Entry):
    shard: ShardInfo


def shards_table(manifest: Manifest | None) -> Table | None:
    """The packed files with their hashes; None where the shards are gone or were packed anew."""
    if manifest is None:
        return None
    columns = (
        Column(key="file", header="Shard", numeric=False, of=lambda row: row.shard.file),
        Column(key="samples", header="Samples", of=lambda row: row.shard.samples),
        Column(key="bytes", header="Bytes", of=lambda row: row.shard.bytes),
        Column(key="sha256", header="SHA-256", numeric=False, of=lambda row: row.shard.sha256),
    )
    return Table.of("shards", "Packed data", columns, [PackedShard(shard=shard) for shard in manifest.shards])
