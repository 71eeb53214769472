"""What one does with a run that is there: go on, end it, run cells again. Its frozen settings count, not `configs/`.

run folder ─read_plan→ plan ─→ submit | cancel
"""

from __future__ import annotations

import dataclasses
import socket
import time
import typing as t
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bushpc.cluster.base import cluster_for
from bushpc.cluster.records import Job
from bushpc.config import reconfigure
from bushpc.dispatch.jobs import adopt
from bushpc.dispatch.plan import Plan
from bushpc.dispatch.run_folder import alone_in, owner_of, read_plan, start_anew
from bushpc.dispatch.status import CellStatus, job_of, read_job, read_status
from bushpc.dispatch.submit import Submission, submit
from bushpc.errors import ConfigError, DispatchError, unknown_name
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import JobNote
from bushpc.runs.run_record import RunRecord
from bushpc.train.take_over import Donor

# States that `--only` may name: those from which a cell does not go on by itself.
RESUMABLE = ("failed", "stopped", "stale", "missing")
# What may change between two submissions of a run, besides the whole cluster profile.
FREE_GROUPS = ("cluster", "loader")


class Cancelled(t.NamedTuple):
    """cells: whose jobs were ended. left: live cells that belong to another run, and its name."""

    cells: list[str]
    left: dict[str, str]


def resume(
    run_dir: Path, command: Sequence[str], *, only: str | None = None, overrides: Sequence[str] = ()
) -> Submission:
    """Submit what is missing of a run, whichever command made it.

    only: just the cells in this state, one of RESUMABLE. overrides: of the cluster and the loader, which decide how
    it runs and not what it learns: `cluster=mysite`, `cluster.time_min=600`.
    Raises: DataError if it is no run, ConfigError for another version's, and what `submit` raises.
    """
    if only is not None and only not in RESUMABLE:
        raise ConfigError(unknown_name("state in --only", only, RESUMABLE))
    plan = read_plan(run_dir)
    for word in overrides:
        key = word.partition("=")[0]
        if key.partition(".")[0] not in FREE_GROUPS:
            raise ConfigError(_not_free(word, key))
    cells = {name: reconfigure(cell, overrides, _of_row(plan, name)) for name, cell in plan.cells.items()}
    for name, cell in cells.items():
        cluster_for(cell.cluster.executor).require(cell.cluster)
        if cell.hash != plan.cells[name].hash:  # the lanes of a stream
            [key, *_] = [key for key, value in cell.settings.items() if value != plan.cells[name].settings[key]]
            raise ConfigError(_not_free(" ".join(overrides), key))
    plan = dataclasses.replace(plan, cells=cells)
    if only is not None:
        states = {cell.name: cell.state for cell in read_status(plan.first.run_dir).cells}
        plan = dataclasses.replace(plan, wanted=[name for name in plan.wanted if states[name] == only])
    _require_weights(plan)
    return submit(plan, command)


def retry(run_dir: Path, names: Sequence[str], command: Sequence[str], *, fresh: bool = False) -> Submission:
    """Submit these cells again. fresh: from step 0; what they had is kept in `replaced/`.

    Raises: ConfigError for a name that is no cell, for a live one, and for one that is done unless `fresh`.
    """
    plan = read_plan(run_dir)
    run_dir = plan.first.run_dir
    with alone_in({run_dir.resolve(), *(owner_of(run_dir, name) for name in plan.cells)}):
        adopt(run_dir)
        status = _named(RunRecord.open(RunDir(run_dir)), read_status(run_dir).cells, names)
        if not fresh:  # of a row what is missing
            status = [cell for cell in status if cell.state != "done" or cell.name in names]
        for cell in status:
            if cell.live:
                raise ConfigError(f"{cell.name} is {cell.state}; end it first: bushpc cancel {run_dir} {cell.name}")
            if cell.state == "done" and not fresh:
                raise ConfigError(
                    f"{cell.name} is done; --fresh trains it anew, and keeps this one in {run_dir}/replaced"
                )
        _require_weights(dataclasses.replace(plan, wanted=[cell.name for cell in status]), fresh=fresh)
        for cell in status if fresh else []:
            start_anew(run_dir, cell.name)
    return submit(dataclasses.replace(plan, wanted=[cell.name for cell in status]), command)


def _require_weights(plan: Plan, *, fresh: bool = False) -> None:
    """Refuse to submit cells whose weights are to be taken over from a run that has them no more.

    fresh: also those that have taken them. Raises: ConfigError.
    """
    run_dir = plan.first.run_dir
    sources: dict[str, Donor] = {}
    for name in plan.wanted:
        run, folder = plan.cells[name].train.weights_from, RunDir(run_dir).cell(name)
        has_them = folder.done.exists() or folder.newest_step() > 0
        if run and (fresh or not has_them):
            if run not in sources:
                sources[run] = Donor(Path(run), RunRecord.open(RunDir(run_dir)).facts)
            sources[run].cell_for(plan.cells[name])


def cancel(run_dir: Path, names: Sequence[str] = ()) -> Cancelled:
    """End the jobs of a run, or of some of its cells. What runs is sent TERM and saves first.

    Cells that belong to another run go on unless they are named, and so do cells that share a job with those named.
    Raises: ConfigError for a name that is no cell; DispatchError where the cluster refuses, or a cell is a process of
    another machine.
    """
    run_dir = run_dir.resolve()
    record = RunRecord.open(RunDir(run_dir))
    with alone_in([run_dir]):
        adopt(run_dir)
        status = read_status(run_dir)
        live = [cell for cell in _named(record, status.cells, names) if cell.live]
        elsewhere = {cell.name: owner for cell in live if (owner := owner_of(run_dir, cell.name)) != run_dir}
        wanted = [cell for cell in live if names or cell.name not in elsewhere]
        shared = _shared_jobs(run_dir, wanted)
        notes = {path: note for cell in wanted if (note := read_job(path := CellDir(cell.folder).job_note))}
        for path, note in notes.items():
            if (note.host or None) not in (None, socket.gethostname()):
                raise DispatchError(f"{path.parent.name} runs on {note.host}, outside of any queue: cancel it there")
        for path, note in notes.items():
            msgspec.structs.replace(note, cancelled=time.time()).write(path)
        # Where a job has other cells as well, its ranks read the note.
        _end([note for note in notes.values() if note.job_id not in shared])
        report = read_job(RunDir(run_dir).report_job)
        if report and not names and status.report_live:
            msgspec.structs.replace(report, cancelled=time.time()).write(RunDir(run_dir).report_job)
            _end([report])
    left = {} if names else {name: owner.name for name, owner in elsewhere.items()}
    return Cancelled(cells=[cell.name for cell in wanted], left=left)


def _shared_jobs(run_dir: Path, wanted: Sequence[CellStatus]) -> set[str]:
    """Those jobs of these cells that work on others as well, in whichever run they are."""
    folders, jobs = {cell.folder for cell in wanted}, {cell.job_id for cell in wanted}
    owners = {run_dir, *(CellDir(folder).run.path for folder in folders)}
    others = (cell for owner in owners for cell in read_status(owner).cells if cell.folder not in folders)
    return {cell.job_id for cell in others if cell.live and cell.job_id in jobs}


def _named(record: RunRecord, cells: Sequence[CellStatus], names: Sequence[str]) -> list[CellStatus]:
    """Cells by name, in the run's order; all of them where no name is given. A row's name stands for its folds."""
    rows = {cell.name: cell.row for cell in record.cells}
    for name in names:
        if name not in rows and name not in rows.values():
            raise ConfigError(unknown_name("cell", name, {*rows, *(row for row in rows.values() if row)}))
    return [cell for cell in cells if not names or cell.name in names or rows[cell.name] in names]


def _end(notes: Sequence[JobNote]) -> None:
    by_cluster: dict[str, list[Job]] = {}
    for note in notes:
        by_cluster.setdefault(note.executor, []).append(job_of(note))
    for executor, jobs in by_cluster.items():
        cluster_for(executor).cancel(jobs)


def _of_row(plan: Plan, name: str) -> dict[str, t.Any]:
    """What a cell's row sets of the cluster: a heavy row stays heavy under another profile."""
    rows = (*plan.grid.generators, *plan.grid.rows) if plan.grid else ()
    settings = next((row.settings for row in rows if row.name == plan.row_of.get(name)), {})
    return {key: value for key, value in settings.items() if key.startswith("cluster.")}


def _not_free(word: str, key: str) -> str:
    return (
        f"{word}: a run that goes on may only get other {' or '.join(FREE_GROUPS)} settings that change no result. For "
        f"another {key} submit it with the command it was made with, and resume_changes=[{key}]"
    )
