"""Run directory + queue → the state of every cell. Reads files and asks squeue once; works without sacct."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from bushpc.errors import DataError, DispatchError
from bushpc.files import read_json

if t.TYPE_CHECKING:
    from rich.console import Group

STYLES = {
    "done": "green",
    "running": "cyan",
    "queued": "yellow",
    "failed": "red",
    "stopped": "magenta",
    "missing": "dim",
}


# A local job of another machine counts as dead when its log has been silent for so long, in seconds.
FOREIGN_HOST_S = 600.0


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """One cell. state: done, running, queued, failed, stopped (its job ended early) or missing (never submitted)."""

    name: str
    state: str
    phase: str
    step: int
    total: int
    metric: dict[str, float]
    rate: float | None
    restarts: int
    reason: str
    log: str
    job_id: str
    local: bool

    @property
    def live(self) -> bool:
        """True while a job exists that will go on by itself."""
        return self.state in ("running", "queued")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """All cells of a run, and whether its report job still exists."""

    run_dir: Path
    cells: list[CellStatus]
    report_live: bool

    @property
    def complete(self) -> bool:
        return all(cell.state == "done" for cell in self.cells)

    def to_json(self) -> str:
        """The table for machines."""
        cells = [{**vars(cell), "live": cell.live} for cell in self.cells]
        return json.dumps({"run": str(self.run_dir), "complete": self.complete, "cells": cells}, indent=1)


def read_status(run_dir: Path) -> RunStatus:
    """Raises: DataError if `run_dir` is not a run."""
    run = read_json(run_dir / "run.json")
    if run is None:
        raise DataError(f"{run_dir} is not a run folder: it has no run.json. Runs lie below `runs/`; see `ls runs`")
    names = [cell["name"] for cell in run["cells"]]
    jobs = {name: read_json(run_dir / "cells" / name / "job.json") for name in names}
    report_job = read_json(run_dir / "jobs" / "report.json")
    open_jobs = [jobs[name] for name in names if not (run_dir / "cells" / name / "DONE").exists()]
    if open_jobs or not report_is_current(run_dir):
        open_jobs.append(report_job)  # else nothing has to be asked, and a finished run reads without its cluster
    queue = job_states([job for job in open_jobs if job])
    cells = [_cell_status(run_dir, name, jobs[name], queue) for name in names]
    return RunStatus(run_dir=run_dir, cells=cells, report_live=bool(report_job and report_job["job_id"] in queue))


def report_is_current(run_dir: Path) -> bool:
    """Whether the page is younger than everything that it tells of."""
    page = run_dir / "report" / "index.html"
    ends = [path.stat().st_mtime for path in (run_dir / "cells").glob("*/DONE")]
    return page.exists() and page.stat().st_mtime > max(ends, default=0.0)


def job_states(jobs: t.Sequence[dict[str, t.Any]]) -> dict[str, str]:
    """job id → PENDING, RUNNING … for every job that still exists; jobs that ended are absent."""
    states = {job["job_id"]: "RUNNING" for job in jobs if job["executor"] == "local" and _process_lives(job)}
    slurm_ids = {job["job_id"] for job in jobs if job["executor"] == "slurm"}
    if slurm_ids:
        states |= {job_id: state for job_id, state in _squeue().items() if job_id in slurm_ids}
    return states


def process_start(pid: int) -> str | None:
    """When a process started (clock ticks since boot): with its id it names a process for good. None if it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def status_table(status: RunStatus) -> Group:
    """What `bushpc status` shows: a row per cell, then a line for each one that failed or stopped."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{status.run_dir}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("cell", "state", "step", "metric", "left", "restarts"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("cell", "state") else "right")
    table.add_column("log", overflow="fold", min_width=14)
    for cell in status.cells:
        metric = next((f"{name} {value:.3f}" for name, value in cell.metric.items()), "")
        left = _duration((cell.total - cell.step) / cell.rate) if cell.rate and cell.phase == "training" else ""
        table.add_row(
            escape(cell.name),
            f"[{STYLES[cell.state]}]{cell.phase or cell.state}[/]",
            f"{cell.step}/{cell.total}" if cell.total else "",
            metric,
            left,
            str(cell.restarts),
            escape(os.path.relpath(cell.log, status.run_dir) if cell.log else ""),
        )
    reasons = [Text(f"{cell.name} {cell.state}: {cell.reason}", style=STYLES[cell.state]) for cell in status.cells]
    return Group(table, *(line for line, cell in zip(reasons, status.cells, strict=True) if cell.reason))


def plain_line(cell: CellStatus) -> str:
    """One cell as a line of a log."""
    parts = [f"{cell.name}: {cell.state}"]
    if cell.phase:
        parts.append(f"({cell.phase})")
    if cell.total:
        parts.append(f"{cell.step}/{cell.total}")
    parts += [f"{name} {value:.3f}" for name, value in cell.metric.items()]
    return " ".join(parts) + (f"  {cell.reason}" if cell.reason else "")


def _cell_status(run_dir: Path, name: str, job: dict[str, t.Any] | None, queue: dict[str, str]) -> CellStatus:
    cell_dir = run_dir / "cells" / name
    heartbeat = read_json(cell_dir / "state.json") or {}
    state, phase, reason = _state(cell_dir, job, queue, heartbeat)
    return CellStatus(
        name=name,
        state=state,
        phase=phase,
        step=heartbeat.get("step", 0),
        total=heartbeat.get("total", 0),
        metric=heartbeat.get("metric", {}),
        rate=heartbeat.get("rate"),
        restarts=heartbeat.get("restarts", 0),
        reason=reason,
        log=job["log"] if job else "",
        job_id=job["job_id"] if job else "",
        local=bool(job and job["executor"] == "local"),
    )


def _state(
    cell_dir: Path, job: dict[str, t.Any] | None, queue: dict[str, str], heartbeat: dict[str, t.Any]
) -> tuple[str, str, str]:
    """(state, phase, reason)."""
    if (cell_dir / "DONE").exists():
        return "done", "", ""
    queued_as = queue.get(job["job_id"]) if job else None
    if queued_as == "PENDING" or (queued_as and heartbeat.get("time", 0) < job["submitted"]):  # type: ignore[index]
        return "queued", "" if queued_as == "PENDING" else "waiting", ""
    if queued_as:
        return "running", heartbeat.get("phase", ""), ""
    if (cell_dir / "FAILED").exists():
        return "failed", "", (cell_dir / "FAILED").read_text().partition("\n")[0]
    if job:
        return "stopped", "", f"job {job['job_id']} ended early; submit again to go on (log: {job['log']})"
    return "missing", "", ""


def _process_lives(job: dict[str, t.Any]) -> bool:
    if job["host"] != socket.gethostname():
        # Its processes cannot be seen from here; its log can.
        log = Path(job["log"])
        spoke = max(job["submitted"], log.stat().st_mtime if log.exists() else 0.0)
        return time.time() - spoke < FOREIGN_HOST_S
    return job["process_start"] is not None and job["process_start"] == process_start(int(job["job_id"]))


def _squeue() -> dict[str, str]:
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T"]
    try:
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or error
        raise DispatchError(f"Slurm does not tell its queue ({detail}); asked with: {' '.join(command)}") from error
    pairs = (line.partition("|") for line in out.splitlines())
    return {job_id: state for job_id, _, state in pairs}


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))
