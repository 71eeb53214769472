"""What a job runs. Small and importable without torch: it is pickled by submitit, and local cells queue in here."""

from __future__ import annotations

import fcntl
import os
import time
import traceback
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bushpc.errors import BushpcError
from bushpc.files import write_atomically

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """Trains and evaluates one cell; one call per rank, each its own task.

    submission: unique per submit, so that a rendezvous never reads a dead predecessor's address.
    slots: how many cells may run at once on this machine (local executor); 0 leaves that to Slurm.
    """

    run_dir: str
    cell: str
    submission: str
    slots: int

    def __call__(self) -> None:
        """Raises whatever ended the cell, after noting it in FAILED."""
        cell_dir = Path(self.run_dir) / "cells" / self.cell
        with slot(Path(self.run_dir) / "jobs" / "slots", self.slots):
            try:
                self._run(cell_dir)
            except BaseException as error:
                note_failure(cell_dir, error)
                raise

    def _run(self, cell_dir: Path) -> None:
        import submitit

        job = submitit.JobEnvironment()
        if job.num_tasks > 1:  # alone, these variables would make Accelerate look for a rendezvous
            os.environ.update(
                RANK=str(job.global_rank),
                WORLD_SIZE=str(job.num_tasks),
                LOCAL_RANK=str(job.local_rank),
                LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),
            )

        from bushpc.dist import meet, world_from_environment
        from bushpc.run import run_cell

        world = world_from_environment()
        attempt = f"{self.submission}-{job.job_id}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        meet(world, Path(self.run_dir) / "jobs", attempt)
        stopped = run_cell(cell_dir, world)
        if stopped:
            raise SystemExit(f"stopped by {stopped.signal_name} at step {stopped.step}")


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """Writes the report when all cells ended, complete or not. Slurm starts it then; locally it waits itself."""

    run_dir: str
    wait: bool

    def __call__(self) -> str:
        """Returns the path of the page."""
        from bushpc.dispatch.status import read_status
        from bushpc.report.page import build_report

        run_dir = Path(self.run_dir)
        while self.wait and any(cell.live for cell in read_status(run_dir).cells):
            time.sleep(POLL_S)
        return str(build_report(run_dir).html)


@contextmanager
def slot(folder: Path, count: int) -> t.Iterator[None]:
    """Hold one of `count` places; the kernel frees it when the process dies, however it dies. 0: no limit."""
    if count == 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for i in range(count):
            with (folder / str(i)).open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(POLL_S)


def note_failure(cell_dir: Path, error: BaseException) -> None:
    """Write FAILED: one line for status and report, the traceback below it. A stop signal is no failure."""
    if isinstance(error, SystemExit):
        return
    reason = str(error) if isinstance(error, BushpcError) else f"{type(error).__name__}: {error}"
    line = " ".join(reason.split()) or type(error).__name__
    # With several ranks the first reason is the cause; the others only lost their peer.
    if not (cell_dir / "FAILED").exists():
        write_atomically(cell_dir / "FAILED", f"{line}\n\n{traceback.format_exc()}")
