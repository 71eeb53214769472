"""What a job runs. Small and importable without torch: submitit pickles it."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
import typing as t
from dataclasses import dataclass
from pathlib import Path

from bushpc import environment
from bushpc.cluster.base import this_job, time_limit
from bushpc.cluster.local import controller
from bushpc.dispatch.requeue import LOST_PEER, STOPPED, note_attempt, note_outcome
from bushpc.dispatch.share import take_share
from bushpc.dispatch.turns import REPORT, TURN, is_taken_away
from bushpc.errors import BushpcError
from bushpc.files import write_atomically
from bushpc.process import children, end_with_parent
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.lease import LeaseError
from bushpc.runs.records import JobNote
from bushpc.train.preempt import StopFlag

POLL_S = 0.5
# In the place of a signal's name: the cell was cancelled, or submitted again.
CANCEL = "cancel"
CANCEL_POLL_S = 5.0
# A rank that failed closes its connections before it has written why; who lost it gives it so long.
FAILED_IS_WRITTEN_S = 5.0
# What gloo says of a peer that is gone, as a plain RuntimeError.
LOST_PEER_WORDS = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused"),
    *("Timed out waiting", "Socket Timeout", "Socket closed"),
)


class Task(t.NamedTuple):
    """One process of a job. rank, ranks: of all its processes. local_rank: on its node."""

    job_id: str
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    nodes: int = 1

    @classmethod
    def of_this_process(cls) -> Task:
        """As submitit's launcher numbers it."""
        import submitit

        job = submitit.JobEnvironment()
        return cls(job.job_id, job.global_rank, job.num_tasks, job.local_rank, job.num_nodes)


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """Trains and evaluates one cell with a task for each of its ranks; or, packed, several cells with a task for each.

    packs: one for each turn of the job (see dispatch.lanes). submission: unique per submit, so that a rendezvous never
    reads a dead predecessor's address. submitted: in seconds since 1970. gpus: of the node.
    """

    run_dir: str
    packs: tuple[tuple[str, ...], ...]
    packed: bool
    submission: str
    submitted: float = 0.0
    gpus: int = 0

    @property
    def turn(self) -> int | None:
        """Number of the pack that is to be worked on; None: the report is to be written."""
        said = os.environ.get(TURN, "0")
        return None if said == REPORT else int(said)

    @property
    def _shared(self) -> bool:
        """Whether the job has other cells, which go on when one of them is cancelled."""
        return self.packed or len(self.packs) > 1

    def __call__(self) -> None:
        """Run the task that this process is, and end the process soon after it. Raises: as `run`."""
        atexit.register(end_quickly)
        self.run(Task.of_this_process)

    def run(self, task_of: t.Callable[[], Task]) -> None:
        """Run one task of the job; task_of: says which, and may take its time.

        Raises whatever ended the cell, after noting it in FAILED; SystemExit for what is no failure of this rank.
        Exit status: 75 on rank 0 when it stopped and saved, 76 when another rank vanished.
        """
        # Before anything that takes time: a stop signal in the seconds of start-up must not be lost.
        with StopFlag() as stop:
            if note := environment.address_space_note():
                print(note, flush=True)
            task, run_dir, turn = task_of(), Path(self.run_dir), self.turn
            if turn is None:
                if task.rank == 0:
                    print(f"report: {ReportJob(run_dir=self.run_dir, wait=False)()}", flush=True)
                return
            cells, number = self.packs[turn], task.rank if self.packed else 0
            if number >= len(cells):
                return  # the last pack may have fewer cells
            # The real folder: a cell that two runs share lies in one of them.
            cell_dir = RunDir(run_dir).cell(cells[number]).resolve()
            try:
                if task.rank == 0:
                    if len(self.packs) > 1:
                        print(f"--- {', '.join(cells)} ({turn + 1} of {len(self.packs)} in this job)", flush=True)
                    note_attempt(run_dir, cells)
                with TakenAway(cell_dir, self.submitted, stop) if self._shared else contextlib.nullcontext() as taken:
                    # Others of the pack may be why the job came back.
                    if not (self.packed and (taken or cell_dir.failed.exists())):
                        self._run(run_dir, cell_dir, task, stop)
            except LeaseError as error:
                note_outcome(run_dir, "refused")
                if not self.packed:
                    end_other_local_ranks()
                raise SystemExit(str(error)) from error
            except BaseException as error:
                lost = lost_peer(error)
                if lost:
                    wait_for_the_reason(cell_dir, error)
                else:
                    note_failure(cell_dir, error)
                if not isinstance(error, SystemExit) and not self.packed:
                    end_other_local_ranks()
                if lost:
                    raise SystemExit(LOST_PEER) from error
                raise

    def _run(self, run_dir: Path, cell_dir: CellDir, task: Task, stop: StopFlag) -> None:
        if controller():
            end_with_parent()
        ranks, rank, local_rank = (1, 0, 0) if self.packed else (task.ranks, task.rank, task.local_rank)
        if self.packed:
            take_share(task.local_rank, task.ranks, self.gpus)
        if ranks > 1:  # alone, these variables would make Accelerate look for a rendezvous
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_RANK=str(local_rank),
                LOCAL_WORLD_SIZE=str(ranks // task.nodes),
            )
        if rank == 0:
            stop.deadline = time_limit()  # the ranks agree at every step, so it takes one that watches the clock

        from bushpc.dispatch.work import run_work
        from bushpc.dist import World, meet

        world = World(rank=rank, size=ranks, local_rank=local_rank)
        ours = this_job()
        attempt = f"{self.submission}-{task.job_id}-{ours.restarts if ours else 0}-{self.turn}"
        meet(world, RunDir(run_dir).jobs, attempt, ours.node if ours else "")
        stopped = run_work(cell_dir, RunDir(run_dir), world, stop)
        # The other ranks leave quietly: it takes one to bring the job back, and rank 0 has saved for all.
        if stopped and world.is_main and stopped.signal_name != CANCEL:
            note_outcome(run_dir, "stopped", stopped.signal_name)
            raise SystemExit(STOPPED)


class TakenAway:
    """Context manager that raises the stop flag when the cell is cancelled, or submitted again, while others share its
    job, so that no signal can be for it alone. True if that has happened.
    """

    def __init__(self, cell: CellDir, submitted: float, stop: StopFlag) -> None:
        self._cell, self._submitted, self._stop = cell, submitted, stop
        self._left = threading.Event()

    def __bool__(self) -> bool:
        return is_taken_away(JobNote.read_whole(self._cell.job_note), self._submitted)

    def __enter__(self) -> TakenAway:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(CANCEL_POLL_S):
            if self:
                self._stop.signal_name = CANCEL
                return


def lost_peer(error: BaseException) -> bool:
    """Whether this rank failed only because another one is gone: then its word would hide the real reason."""
    torch_distributed = sys.modules.get("torch.distributed")  # not imported for this: it takes seconds
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, BushpcError):
            return False  # raised while a failure of our own was on its way out
        seen = seen.__context__
    if torch_distributed is not None and isinstance(error, torch_distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER_WORDS)


def wait_for_the_reason(cell_dir: CellDir, error: BaseException) -> None:
    """Leave the rank that failed the time to write FAILED: when this one has ended, the cluster ends that one."""
    print(f"another rank is gone, and this one cannot go on alone: {error}", flush=True)
    deadline = time.monotonic() + FAILED_IS_WRITTEN_S
    while not cell_dir.failed.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def end_quickly() -> None:
    """Register it before torch is imported: handlers at exit run in reverse order, and this one has to be the last.

    Collecting the garbage of thousands of modules takes seconds, and a short grace time is soon over. Libraries built
    with nanobind would then report each object that was not collected as leaked, so nothing more is printed.
    """
    gc.freeze()
    gc.disable()
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def end_other_local_ranks() -> None:
    """End a local job's other ranks, which would wait for this one for long; a cluster's launcher does it itself."""
    parent = controller()
    for pid in children(parent) if parent else ():
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """Writes the report when all cells have ended, complete or not. wait: it waits for them itself."""

    run_dir: str
    wait: bool

    def __call__(self) -> str:
        """Returns the path of the page."""
        from bushpc.dispatch.status import read_status
        from bushpc.report.page import build_report

        run_dir = Path(self.run_dir)
        if not self.wait:  # the cluster started it when the cells had ended; some compute nodes could not ask the queue
            return str(build_report(run_dir).html)
        while True:
            while any(cell.live for cell in read_status(run_dir).cells):
                time.sleep(POLL_S)
            before = [cell.state for cell in read_status(run_dir).cells]
            page = build_report(run_dir).html
            # Cells may have been submitted, or have ended, while the page was written.
            if before == [cell.state for cell in read_status(run_dir).cells]:
                return str(page)


def note_failure(cell_dir: CellDir, error: BaseException) -> None:
    """Write FAILED: one line for status and report, the traceback below it. A stop signal is no failure."""
    if isinstance(error, SystemExit):
        return
    reason = str(error) if isinstance(error, BushpcError) else f"{type(error).__name__}: {error}"
    line = " ".join(reason.split()) or type(error).__name__
    # With several ranks the first reason is the cause; the others only lost their peer.
    if not cell_dir.failed.exists():
        try:
            write_atomically(cell_dir.failed, f"{line}\n\n{traceback.format_exc()}")
        except OSError as unwritten:  # a full disk must not hide the reason, nor keep us from ending the other ranks
            print(f"{line}\n({cell_dir.failed} cannot be written: {unwritten})", flush=True)
