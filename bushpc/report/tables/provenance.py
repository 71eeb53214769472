"""Tables of what the results were made from: cells, settings, shards."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from bushpc.report.results import Arm, Cell
from bushpc.report.scope import ReportScope
from bushpc.report.table import Column, RowData, Table
from bushpc.shards.manifest import Manifest, ShardInfo

CELL = Column(key="cell", header="Cell", numeric=False, of=lambda row: row.name)
# A run's own names and places: they differ between any two runs and determine no result.
_NO_SETTINGS = ("name", "fold", "runs_dir")


def arm_heading(scope: ReportScope, arm: Arm) -> str:
    """What the rows of an arm stand under; nothing where there is only one."""
    return arm.label if len(scope.arms) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class CellState(RowData):
    cell: Cell

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def state(self) -> str:
        return "complete" if self.cell.complete else f"missing: {self.cell.reason}"


def cells_table(scope: ReportScope) -> Table:
    """State of every cell: complete, or why not; and whose weights it has, where it trained none."""
    elsewhere = any(cell.trained_in for arm in scope.arms for cell in arm.cells)
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
    rows = [CellState(cell=cell, group=arm_heading(scope, arm)) for arm in scope.arms for cell in arm.cells]
    note = (
        "Cells that were trained in another run were only evaluated in this one: weights and curves are those of "
        "that training, and its cost is reported there."
    )
    caption = "Cells of this run" if len(scope.runs) == 1 else "Cells of these runs"
    return Table.of("cells", caption, columns, rows, [note] if elsewhere else [])


@dataclass(frozen=True, kw_only=True)
class ChangedSetting(RowData):
    """A setting in which an arm differs from the baseline; both values as text."""

    key: str
    baseline: str
    here: str


_SETTINGS = (
    Column(key="setting", header="Setting", numeric=False, of=lambda row: row.key),
    Column(key="baseline", header="There", numeric=False, of=lambda row: row.baseline),
    Column(key="here", header="Here", numeric=False, of=lambda row: row.here),
)


def settings_table(scope: ReportScope) -> Table | None:
    """Every setting in which an arm's composed config differs from the baseline's."""
    ours = _config(scope.baseline)
    rows = []
    for arm in scope.arms:
        theirs = _config(arm)
        differ = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        rows += [
            ChangedSetting(key=key, baseline=_text(ours, key), here=_text(theirs, key), group=arm.label)
            for key in differ
            if ours and theirs and key not in _NO_SETTINGS
        ]
    if not rows:
        return None
    note = "Each arm's config is that of its first fold; the others only differ in the fold."
    return Table.of("settings", f"Settings that differ from {scope.baseline.label}", _SETTINGS, rows, [note])


def _config(arm: Arm) -> dict[str, t.Any]:
    return next((cell.settings for cell in arm.cells if cell.settings), {})


def _text(settings: dict[str, t.Any], key: str) -> str:
    return str(settings[key]) if key in settings else "—"


@dataclass(frozen=True, kw_only=True)
class PackedShard(RowData):
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
