"""What a job runs. Small and importable without torch: submitit pickles it."""

from __future__ import annotations

import os
import subprocess
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from bushpc.errors import BushpcError
from bushpc.files import exclusive, write_atomically

POLL_S = 0.5
# Far below any grace time that is worth the name.
SLURM_ANSWERS_S = 10


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """Trains and evaluates one cell; one call per rank, each its own task.

    submission: unique per submit, so that a rendezvous never reads a dead predecessor's address.
    """

    run_dir: str
    cell: str
    submission: str

    def __call__(self) -> None:
        """Raises whatever ended the cell, after noting it in FAILED."""
        cell_dir = Path(self.run_dir) / "cells" / self.cell
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

        from bushpc.dist import World, meet
        from bushpc.run import run_cell

        world = World(rank=job.global_rank, size=job.num_tasks, local_rank=job.local_rank)
        with exclusive(cell_dir / f".rank{world.rank}.lock") as alone:
            if not alone:
                raise SystemExit(f"another process works on {cell_dir}; this one leaves it alone")
            if world.is_main:
                (cell_dir / "FAILED").unlink(missing_ok=True)  # of an attempt before a requeue
            attempt = f"{self.submission}-{job.job_id}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
            meet(world, Path(self.run_dir) / "jobs", attempt, os.environ.get("SLURMD_NODENAME", ""))
            stopped = run_cell(cell_dir, world)
        # The other ranks leave quietly: one that exits with an error would have rank 0 killed before it has requeued.
        if stopped and world.is_main and not come_back(os.environ.get("SLURM_JOB_ID")):
            raise SystemExit(f"stopped by {stopped.signal_name} at step {stopped.step}; submit again to go on")


def come_back(job_id: str | None) -> bool:
    """Requeue the Slurm job that we are in, after a preemption; leave a cancelled one alone. True if requeued.

    Slurm requeues a preempted job only if it is still there when its grace time ends; one that saves and leaves
    early, as ours does, counts as failed. While Slurm preempts it its state is RUNNING; a job that was cancelled,
    or requeued from outside, is COMPLETING or CANCELLED by now.
    """
    if job_id is None:
        return False
    try:
        if _slurm("squeue", "--noheader", f"--jobs={job_id}", "--format=%T").strip() != "RUNNING":
            return False
        _slurm("scontrol", "requeue", job_id)
    except (OSError, subprocess.SubprocessError) as error:  # no client tools on this node, or a busy controller
        print(f"job {job_id} could not be requeued: {getattr(error, 'stderr', None) or error}", flush=True)
        return False
    return True


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SLURM_ANSWERS_S).stdout


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
        while True:
            while self.wait and any(cell.live for cell in read_status(run_dir).cells):
                time.sleep(POLL_S)
            before = [cell.state for cell in read_status(run_dir).cells]
            page = build_report(run_dir).html
            # Cells may have been submitted, or have ended, while the page was written.
            if not self.wait or before == [cell.state for cell in read_status(run_dir).cells]:
                return str(page)


def note_failure(cell_dir: Path, error: BaseException) -> None:
    """Write FAILED: one line for status and report, the traceback below it. A stop signal is no failure."""
    if isinstance(error, SystemExit):
        return
    reason = str(error) if isinstance(error, BushpcError) else f"{type(error).__name__}: {error}"
    line = " ".join(reason.split()) or type(error).__name__
    # With several ranks the first reason is the cause; the others only lost their peer.
    if not (cell_dir / "FAILED").exists():
        write_atomically(cell_dir / "FAILED", f"{line}\n\n{traceback.format_exc()}")
