"""Run folder + queue → the state of every cell. Reads files, and asks the cluster once."""

from __future__ import annotations

import json
import math
import os
import typing as t
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bushpc.cluster.base import NoAnswer, cluster_for, job_states
from bushpc.cluster.records import Job, JobState
from bushpc.cluster.setup import failure_file
from bushpc.errors import ConfigError
from bushpc.runs.goodput import Goodput, goodput, read_attempts, trained_in
from bushpc.runs.layout import BEFORE_ITS_START, DONE_FILE, FAILED_FILE, TAKEN_OVER_FILE, CellDir, RunDir
from bushpc.runs.records import DoneRecord, Heartbeat, JobNote, LaneNote, read_config_hash
from bushpc.runs.run_record import CellRecord, RunRecord

STYLES = {
    "done": "green",
    "running": "cyan",
    "queued": "yellow",
    "failed": "red",
    "stopped": "magenta",
    "stale": "magenta",
    "missing": "dim",
}


# States in which nothing works on a cell that is not done.
DEAD = ("failed", "stopped")
_NO_HEARTBEAT = Heartbeat()


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """One cell. state: done, running, queued, failed, stopped (its job ended early), missing (never submitted) or
    stale (done, with other settings than the run has now).

    folder: where it really lies, which may be in another run. node: where it runs, or ran last. rate: steps per second.
    goodput: where its time went up to its last sign of life; None before its first start.
    trained_in: folder of the cell whose weights it took over; "" where it trains by itself, or has not started.
    reason: why it failed, stopped, or stays in the queue where it will not leave it by itself. behind: the cell that
    its job works on before this one.
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
    behind: str = ""

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
    """All cells of a run, and what is to become of its report.

    report_live: a job that writes the report exists. report_due: all cells are done, and nobody is about to write their
    report. report_failed: a sentence, where the report's job has ended without writing it; "" otherwise. queued: jobs
    of the run that exist. silent: why the queue is not known, and the cells' states are those of their heartbeats; ""
    where it answered.
    """

    run_dir: Path
    cells: list[CellStatus]
    report_live: bool
    report_due: bool = False
    report_failed: str = ""
    queued: int = 0
    silent: str = ""

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
        whole = {"run": str(self.run_dir), "complete": self.complete, "totals": self.totals}
        whole |= {"report_live": self.report_live, "report_failed": self.report_failed}
        whole |= {"silent": self.silent, "cells": cells}
        return json.dumps(whole, indent=1)


def read_status(run_dir: Path, record: RunRecord | None = None, *, only_show: bool = False) -> RunStatus:
    """record: the run's, where the caller has read it. only_show: where the queue does not answer, every job counts as
    there, and `RunStatus.silent` says so; otherwise it is waited for (`bushpc.cluster.base.patiently`).
    Raises: DataError if `run_dir` is not a run, or a note in it is damaged; DispatchError.
    """
    run = RunDir(run_dir)
    record = record or RunRecord.open(run)
    folders = {entry.name: run.cell(entry.name) for entry in record.cells}
    jobs = {name: read_job(folder.job_note) for name, folder in folders.items()}
    report_job = read_job(run.report_job)
    current = report_is_current(run_dir)
    open_jobs = [jobs[name] for name, folder in folders.items() if not folder.is_done()]
    if open_jobs or not current:  # else nothing has to be asked, and a finished run reads without its cluster
        # Of jobs that work on one cell after the other the last one writes the report.
        open_jobs += [report_job, *(note for note in jobs.values() if note and note.lane)]
    # Many cells may share a job.
    distinct = {(note.executor, note.job_id, note.name): note for note in open_jobs if note and not note.ended}
    queue, silent = _ask_queue([job_of(note) for note in distinct.values()], only_show)
    lanes = _Lanes()
    cells = [_cell_status(folders[entry.name], entry, jobs[entry.name], queue, lanes) for entry in record.cells]
    writers = [report_job, *(note for note in jobs.values() if note and note.lane and not current)]
    report_live = any(note.job_id in queue for note in writers if note)
    failed = ""
    if report_job and not (current or report_live or report_job.cancelled or any(cell.live for cell in cells)):
        failed = f"job {report_job.job_id} ended without writing the report of these cells (log: {report_job.log})"
    return RunStatus(
        run_dir=run_dir,
        cells=cells,
        report_live=report_live,
        report_due=not current and not report_live and all(cell.state == "done" for cell in cells),
        report_failed=failed,
        queued=len(queue),
        silent=silent,
    )


def _ask_queue(jobs: list[Job], only_show: bool) -> tuple[dict[str, JobState], str]:
    """The jobs' states, and why they are not known."""
    try:
        return job_states(jobs, 0 if only_show else None), ""
    except NoAnswer as error:
        if not only_show:
            raise
        return {job.id: JobState(waiting=False) for job in jobs}, str(error)


def report_is_current(run_dir: Path) -> bool:
    """Whether the page is of this run's cells, and younger than everything that it tells of."""
    run = RunDir(run_dir)
    try:
        written = run.report_page.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):  # none, or another one is just taking its place
        return False
    if run.report_outdated.exists():
        return False
    ends = [cell.done.stat().st_mtime for cell in run.cell_dirs() if cell.done.exists()]
    return written > max(ends, default=0.0)


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


def _is_known(executor: str) -> bool:
    try:
        cluster_for(executor)
    except ConfigError:
        return False
    return True


class _Lanes:
    """The notes of jobs that work on one pack of cells after the other, each read once."""

    def __init__(self) -> None:
        self._read: dict[str, LaneNote | None] = {}

    def of(self, job: JobNote | None) -> LaneNote | None:
        if job is None or job.lane is None:
            return None
        if job.lane not in self._read:
            self._read[job.lane] = LaneNote.read_whole(Path(job.lane))
        return self._read[job.lane]


def _cell_status(
    cell: CellDir, entry: CellRecord, job: JobNote | None, queue: dict[str, JobState], lanes: _Lanes
) -> CellStatus:
    there = cell.names()
    begun = not there <= BEFORE_ITS_START
    heartbeat = Heartbeat.read_valid(cell.heartbeat) if begun else _NO_HEARTBEAT
    is_link = cell.is_link()
    folder = os.path.realpath(cell) if is_link else str(cell)
    lane = lanes.of(job)
    state, phase, reason = _state(cell, job, queue, heartbeat, there, lane)
    if state == "done" and DoneRecord.read_valid(cell.done).config not in (None, entry.hash):
        state, reason = "stale", "done with other settings; submit again"
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
        trained_in=trained_in(cell) if TAKEN_OVER_FILE in there else "",
        reason=reason,
        log=job.log if job else "",
        job_id=job.job_id if job else "",
        local=bool(job and not cluster_for(job.executor).waits),
        behind=_behind(job, lane) if job and lane and state == "queued" else "",
    )


def _behind(job: JobNote, lane: LaneNote) -> str:
    """The cell that the job works on before this one; "" where it is its turn."""
    before = lane.packs[job.turn - 1 : job.turn] if job.turn > lane.turn else []
    return next((name for pack in before for name in pack), "")


def _state(
    cell: CellDir,
    job: JobNote | None,
    queue: dict[str, JobState],
    heartbeat: Heartbeat,
    there: frozenset[str],
    lane: LaneNote | None,
) -> tuple[str, str, str]:
    """(state, phase, reason). there: the names in the cell's folder."""
    if DONE_FILE in there:
        return "done", "", ""
    failed = FAILED_FILE in there
    queued = queue.get(job.job_id) if job else None
    if job and queued and not _is_left(job, lane, failed, heartbeat):
        if queued.waiting:
            return "queued", "", queued.held
        if lane and job.turn > lane.turn:
            return "queued", "", ""
        if heartbeat.time < job.submitted:
            return "queued", "waiting", ""
        return "running", heartbeat.phase, ""
    if failed:
        return "failed", "", _first_line(cell.failed)
    if job and job.cancelled:
        return "stopped", "", f"{'it' if queued else f'job {job.job_id}'} was cancelled; `bushpc resume` goes on"
    if job and not queued and (failure := _setup_failure(job, cell.run)):
        return "failed", "", failure
    if job:
        log = f" (log: {job.log})" if job.log else ""
        end = "goes on without it" if queued else "ended early"
        return "stopped", "", f"job {job.job_id} {end}; submit again to go on{log}"
    return "missing", "", ""


def _setup_failure(job: JobNote, run: RunDir) -> str:
    """Which line of cluster.setup ended the job; "" for none."""
    path = failure_file(run.jobs, job.job_id)
    return f"{_first_line(path)} (output: {path})" if path.exists() else ""


def _is_left(job: JobNote, lane: LaneNote | None, failed: bool, heartbeat: Heartbeat) -> bool:
    """Whether a job that exists works on this cell no more, but on others."""
    if not (job.packed or lane):
        return False
    if failed or (lane and lane.turn > job.turn):
        return True
    return job.cancelled is not None and (heartbeat.time < job.submitted or heartbeat.phase == "stopped")


def _is_the_same(cell: CellDir, config_hash: str | None) -> bool:
    """Whether the cell that a link leads to is still the one that was meant."""
    try:
        return read_config_hash(cell) in (None, config_hash)
    except OSError:
        return False


def _first_line(path: Path) -> str:
    return path.read_text(errors="replace").partition("\n")[0]
