"""Run folder + queue → the state of every cell. Reads files, and asks the cluster once."""

from __future__ import annotations

import json
import math
import os
import typing as t
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bushpc.cluster.base import Job, JobState, cluster_for, job_states
from bushpc.errors import ConfigError
from bushpc.runs.goodput import Goodput, goodput, read_attempts, trained_in
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import CellRecord, DoneRecord, Heartbeat, JobNote, RunRecord, read_config_hash

if t.TYPE_CHECKING:
    from rich.console import Group

STYLES = {
    "done": "green",
    "running": "cyan",
    "queued": "yellow",
    "failed": "red",
    "stopped": "magenta",
    "stale": "magenta",
    "missing": "dim",
}


COLUMNS = ("cell", "state", "where", "step", "metric", "rate", "left", "restarts", "goodput", "log")
# The same, those first that stay where there is little room.
MATTER = ("cell", "state", "step", "metric", "left", "goodput", "restarts", "log", "where", "rate")
COLUMN_GAP = 3
# Cells that a table shows one by one.
MOST_ROWS = 60

# States in which nothing works on a cell that is not done.
DEAD = ("failed", "stopped")


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """One cell. state: done, running, queued, failed, stopped (its job ended early), missing (never submitted) or
    stale (done, with other settings than the run has now).

    folder: where it really lies, which may be in another run. node: where it runs, or ran last. rate: steps per second.
    goodput: where its time went up to its last sign of life; None before its first start.
    trained_in: folder of the cell whose weights it took over; "" where it trains by itself, or has not started.
    reason: why it failed, stopped, or stays in the queue where it will not leave it by itself.
    """

    name: str
    folder: str
    state: str
    phase: str
    step: int
    total: int
    metric: dict[str, float]
    rate: float | None
    node: str
    restarts: int
    goodput: Goodput | None
    trained_in: str
    reason: str
    log: str
    job_id: str
    local: bool

    @property
    def live(self) -> bool:
        """True while a job exists that will go on by itself."""
        return self.state in ("running", "queued")

    @property
    def left_s(self) -> float | None:
        """Seconds of training left at its present rate; None where nothing trains."""
        training = self.state == "running" and self.phase == "training" and self.rate
        return (self.total - self.step) / self.rate if training and self.rate else None


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """All cells of a run, and whether its report job still exists."""

    run_dir: Path
    cells: list[CellStatus]
    report_live: bool

    @property
    def complete(self) -> bool:
        return all(cell.state == "done" for cell in self.cells)

    @property
    def totals(self) -> dict[str, t.Any]:
        """Over all cells: how many in each state, steps, steps per second, seconds left, GPU hours.

        left_s: at the present rate, for all that is not done; None where nothing trains.
        """
        counts = Counter(cell.state for cell in self.cells)
        cells = {cell.folder: cell for cell in self.cells}.values()  # two rows may be one cell
        done = sum(cell.total if cell.state == "done" else cell.step for cell in cells)
        steps = sum(cell.total for cell in cells)
        rate = sum(cell.rate for cell in cells if cell.left_s is not None and cell.rate)
        return {
            "states": {state: counts[state] for state in STYLES if counts[state]},
            "step": done,
            "total": steps,
            "rate": rate or None,
            "left_s": (steps - done) / rate if rate else None,
            "gpu_hours": math.fsum(cell.goodput.gpu_hours for cell in cells if cell.goodput),
        }

    def to_json(self) -> str:
        """The table for machines."""
        cells = [
            {**vars(cell), "live": cell.live, "goodput": cell.goodput and cell.goodput.to_dict()} for cell in self.cells
        ]
        whole = {"run": str(self.run_dir), "complete": self.complete, "totals": self.totals, "cells": cells}
        return json.dumps(whole, indent=1)


def read_status(run_dir: Path, record: RunRecord | None = None) -> RunStatus:
    """record: the run's, where the caller has read it. Raises: DataError if `run_dir` is not a run, or a note in it is
    damaged.
    """
    run = RunDir(run_dir)
    record = record or RunRecord.open(run)
    folders = {entry.name: run.cell(entry.name) for entry in record.cells}
    jobs = {name: read_job(folder.job_note) for name, folder in folders.items()}
    report_job = read_job(run.report_job)
    open_jobs = [jobs[name] for name, folder in folders.items() if not folder.done.exists()]
    if open_jobs or not report_is_current(run_dir):
        open_jobs.append(report_job)  # else nothing has to be asked, and a finished run reads without its cluster
    queue = job_states([job_of(note) for note in open_jobs if note and not note.ended])
    cells = [_cell_status(folders[entry.name], entry, jobs[entry.name], queue) for entry in record.cells]
    return RunStatus(run_dir=run_dir, cells=cells, report_live=bool(report_job and report_job.job_id in queue))


def report_is_current(run_dir: Path) -> bool:
    """Whether the page is of this run's cells, and younger than everything that it tells of."""
    run = RunDir(run_dir)
    if run.report_outdated.exists() or not run.report_page.exists():
        return False
    ends = [cell.done.stat().st_mtime for cell in run.cell_dirs() if cell.done.exists()]
    return run.report_page.stat().st_mtime > max(ends, default=0.0)


def read_job(path: Path) -> JobNote | None:
    """The note of a job; None if there is none. Raises: DataError if it is not what was written."""
    note = JobNote.read(path)
    if note is None:
        return None
    if not _is_known(note.executor):
        note.require(path, "executor")
    if cluster_for(note.executor).ids_are_processes:
        note.require_process(path)
    return note


def job_of(note: JobNote) -> Job:
    """The job that a note in the run folder names."""
    return Job(
        id=note.job_id,
        executor=note.executor,
        cluster=note.cluster,
        name=note.name,
        log=note.log,
        submitted=note.submitted,
        owner=note.user if note.user is not None else note.owner if note.owner >= 0 else None,
        host=note.host or None,
        process_start=note.process_start or None,
        heartbeat=note.heartbeat,
    )


def status_table(status: RunStatus, width: int, every: bool = False) -> Group:
    """What `bushpc status` shows: a row per cell, totals, then a line for each one that failed or stopped.

    width: characters that there is room for; columns that matter less are left out where it is too little.
    every: all cells also of a run of more than MOST_ROWS, where else those that need nobody are only counted.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = status.cells
    if len(shown) > MOST_ROWS and not every:
        shown = [cell for cell in shown if cell.state not in ("done", "queued", "missing") or cell.reason][:MOST_ROWS]
    rows = [_row(cell, status.run_dir) for cell in shown]
    table = Table(title=f"{status.run_dir}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = _fitting(rows, width)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in ("cell", "state", "where", "log") else "right")
    for cell, row in zip(shown, rows, strict=True):
        table.add_row(*(Text(row[name], STYLES[cell.state] if name == "state" else "") for name in columns))
    lines = [Text(totals_line(status))]
    if len(shown) < len(status.cells):
        rest = len(status.cells) - len(shown)
        lines.append(Text(f"{rest} cells that are done, queued or missing are not listed; --all lists them", "dim"))
    lines += [Text(f"{cell.name} {cell.state}: {cell.reason}", STYLES[cell.state]) for cell in shown if cell.reason]
    return Group(table, *lines)


def _row(cell: CellStatus, run_dir: Path) -> dict[str, str]:
    """By COLUMNS."""
    return {
        "cell": cell.name,
        "state": cell.phase or cell.state,
        "where": cell.node if cell.state == "running" else "",
        "step": f"{cell.step}/{cell.total}" if cell.total else "",
        "metric": next((f"{name} {value:.3f}" for name, value in cell.metric.items()), ""),
        "rate": f"{cell.rate:.3g}/s" if cell.rate and cell.state == "running" else "",
        "left": "" if cell.left_s is None else _duration(cell.left_s),
        "restarts": str(cell.restarts or ""),
        "goodput": "" if cell.trained_in else _percent(cell.goodput),
        "log": os.path.relpath(cell.log, run_dir) if cell.log else "",
    }


def _fitting(rows: t.Sequence[t.Mapping[str, str]], width: int) -> list[str]:
    """The columns that have something to say and fit, the more important ones first."""
    chosen, room = {"cell", "state"}, width
    for name in MATTER:
        needed = max([len(name), *(len(row[name]) for row in rows)]) + COLUMN_GAP
        if (name in chosen or any(row[name] for row in rows)) and needed <= room:
            chosen.add(name)
            room -= needed
    return [name for name in COLUMNS if name in chosen]


def totals_line(status: RunStatus) -> str:
    """`20 cells: 12 done, 2 running, 6 queued; 1930/3200 steps, 4.1/s, about 00:05:10 left`."""
    totals = status.totals
    counts = ", ".join(f"{count} {state}" for state, count in totals["states"].items())
    parts = [f"{len(status.cells)} cell{'s' if len(status.cells) > 1 else ''}: {counts}"]
    if totals["total"]:
        parts.append(f"{totals['step']}/{totals['total']} steps")
    if totals["left_s"] is not None:
        parts.append(f"{totals['rate']:.3g} steps/s, about {_duration(totals['left_s'])} left at that")
    if totals["gpu_hours"]:
        parts.append(f"{totals['gpu_hours']:.1f} GPU hours")
    if taken := [CellDir(cell.trained_in).run for cell in status.cells if cell.trained_in]:
        parts.append(f"{len(taken)} trained in {', '.join(map(str, dict.fromkeys(taken)))}, and only evaluated here")
    return "; ".join(parts)


def plain_line(cell: CellStatus) -> str:
    """One cell as a line of a log."""
    parts = [f"{cell.name}: {cell.state}"]
    if cell.phase:
        parts.append(f"({cell.phase})")
    if cell.total:
        parts.append(f"{cell.step}/{cell.total}")
    parts += [f"on {cell.node}"] if cell.node and cell.state == "running" else []
    parts += [f"{name} {value:.3f}" for name, value in cell.metric.items()]
    return " ".join(parts) + (f"  {cell.reason}" if cell.reason else "")


def _is_known(executor: str) -> bool:
    try:
        cluster_for(executor)
    except ConfigError:
        return False
    return True


def _cell_status(cell: CellDir, entry: CellRecord, job: JobNote | None, queue: dict[str, JobState]) -> CellStatus:
    begun = cell.has_begun()
    heartbeat = Heartbeat.read_valid(cell.heartbeat) if begun else Heartbeat()
    state, phase, reason = _state(cell, job, queue, heartbeat, begun)
    if state == "done" and DoneRecord.read_valid(cell.done).config not in (None, entry.hash):
        state, reason = "stale", "done with other settings; submit again"
    is_link = cell.is_link()
    folder = os.path.realpath(cell) if is_link else str(cell)
    if is_link and not _is_the_same(cell, entry.hash):
        heartbeat, job, phase = Heartbeat(), None, ""
        state = "stale" if cell.exists() else "missing"
        reason = f"it was that of {folder}, which {'has other settings now' if cell.exists() else 'is gone'}"
        reason += "; submit again"
    total = heartbeat.total or entry.iterations
    return CellStatus(
        name=entry.name,
        folder=folder,
        state=state,
        phase=phase,
        step=heartbeat.step,
        total=heartbeat.step or total if state == "done" else total,  # an early stop makes it shorter
        metric=heartbeat.metric,
        rate=heartbeat.rate,
        node=heartbeat.node,
        restarts=heartbeat.restarts,
        goodput=goodput(read_attempts(cell, heartbeat), cell.newest_step() if state in DEAD else None)
        if begun
        else None,
        trained_in=trained_in(cell) if begun else "",
        reason=reason,
        log=job.log if job else "",
        job_id=job.job_id if job else "",
        local=bool(job and not cluster_for(job.executor).waits),
    )


def _state(
    cell: CellDir, job: JobNote | None, queue: dict[str, JobState], heartbeat: Heartbeat, begun: bool
) -> tuple[str, str, str]:
    """(state, phase, reason)."""
    if begun and cell.done.exists():
        return "done", "", ""
    failed = begun and cell.failed.exists()
    queued = queue.get(job.job_id) if job else None
    if job and queued:
        if queued.waiting:
            return "queued", "", queued.held
        if job.packed and failed:  # the job goes on, with the cells that share it
            return "failed", "", _first_line(cell.failed)
        if heartbeat.time < job.submitted:
            return "queued", "waiting", ""
        return "running", heartbeat.phase, ""
    if failed:
        return "failed", "", _first_line(cell.failed)
    if job and job.cancelled:
        return "stopped", "", f"job {job.job_id} was cancelled; `bushpc resume` goes on"
    if job:
        log = f" (log: {job.log})" if job.log else ""
        return "stopped", "", f"job {job.job_id} ended early; submit again to go on{log}"
    return "missing", "", ""


def _is_the_same(cell: CellDir, config_hash: str | None) -> bool:
    """Whether the cell that a link leads to is still the one that was meant."""
    try:
        return read_config_hash(cell) in (None, config_hash)
    except OSError:
        return False


def _first_line(path: Path) -> str:
    return path.read_text(errors="replace").partition("\n")[0]


def _percent(account: Goodput | None) -> str:
    return f"{100 * account.share:.0f} %" if account and account.share is not None else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"
