"""`bushpc train`: one cell in this process, as one rank of whatever launched it.

    launcher → one process per rank → rank 0 writes the run folder, the others hear where it is → run_cell

The launcher is torchrun, accelerate, deepspeed or srun. The run folder is the one that `bushpc cv` would write, so
status and report read it, and either command goes on with what the other began. Nothing is queued here: what comes
back after a stop is up to whoever launched the ranks (slurm/train_multinode.sh requeues its job).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import stat
import sys
import threading
import time
import typing as t
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from bushpc.cluster.base import this_job, this_step, time_limit
from bushpc.cluster.records import ThisJob
from bushpc.config import CellConfig, compose
from bushpc.dispatch.job import end_quickly, lost_peer, note_failure, wait_for_the_reason
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.requeue import LOST_PEER, STOPPED, note_attempt, note_outcome
from bushpc.dispatch.run_folder import write_run
from bushpc.dispatch.status import read_status
from bushpc.errors import BushpcError, ConfigError, DispatchError, TrainingError
from bushpc.files import exclusive, write_atomically
from bushpc.process import end_with_parent, process_start
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.lease import LeaseError
from bushpc.runs.records import JobNote
from bushpc.train.preempt import StopFlag

if t.TYPE_CHECKING:
    from bushpc.dist import World
    from bushpc.train.loop import Stopped

# Several folds of a run may start at the same moment; each needs the run folder for about a second.
RUN_FOLDER_TIMEOUT_S = 60
# A launcher ends the other ranks well within this time when one has failed.
LAUNCHER_ENDS_RANKS_S = 5


def train_here(overrides: Sequence[str], run_file: Path | None = None) -> int:
    """Train and evaluate the cell of `fold=`; every rank calls it with the same overrides.

    run_file: where rank 0 writes the run folder's path, for the batch script that the ranks came from.
    Returns the exit status: 0 done, 75 (EX_TEMPFAIL, rank 0 only) stopped and saved, 2 an error that rank 0 reports.
    Raises: ConfigError without a fold, TrainingError for a world of another size than the cluster's settings say,
    DispatchError or LeaseError for a cell that someone else works on, and whatever ends the cell; SystemExit(76) on
    a rank that lost another one.
    """
    with StopFlag() as stop:
        if "RANK" in os.environ:
            end_with_parent(signal.SIGTERM)  # torchrun dies of USR2, and its ranks would live on
        atexit.register(end_quickly)
        # Not earlier: it imports torch, which takes seconds in which a stop signal would go unheard.
        from bushpc.dist import World, leave

        world = World.from_environment(this_step())
        try:
            cell_dir, stopped = _train(world, overrides, run_file, stop)
        except BushpcError:
            if world.size > 1:
                atexit.register(end_without_farewell)
            if world.is_main or not _ended_by_launcher(stop):
                raise
            return 2
        leave()  # not when something failed: NCCL's own farewell may hang then
        if cell_dir is None:
            return 2
        # The other ranks leave quietly: a launcher would count their 75 as a failure, and could kill rank 0.
        return STOPPED if stopped and world.is_main else 0


def end_without_farewell() -> None:
    """At exit of a rank that failed: the group's threads still wait for the others, and would abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def train_in_python(overrides: Sequence[str]) -> CellDir:
    """The same cell in the caller's own process, alone: `bushpc.train_cell`. Its promises and errors are there."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "a training needs the main thread, as only that hears stop signals. Call bushpc.train_cell there, or run "
            "`bushpc train` as a process"
        )
    with StopFlag() as stop:
        from bushpc.dist import World, leave

        try:
            cell_dir, stopped = _train(World(), overrides, None, stop)
        finally:
            leave()
    assert cell_dir is not None, "a single rank is rank 0"
    if stopped:
        raise TrainingError(
            f"stopped by {stopped.signal_name} after step {stopped.step}, saved in {cell_dir}; the same call goes on"
        )
    return cell_dir


def _train(
    world: World, overrides: Sequence[str], run_file: Path | None, stop: StopFlag
) -> tuple[CellDir | None, Stopped | None]:
    """The cell's folder, None on a rank that was told of rank 0's error; and whether it was stopped."""
    # Every rank composes, as it has to know how the ranks meet; the data is rank 0's business.
    config = compose(overrides)
    if config.fold is None:
        raise ConfigError("`bushpc train` trains one cell: say which, e.g. fold=0. `bushpc cv` trains all folds")
    _require_world(world, config)
    _meet(world, config)
    cell_dir = _cell_from_rank_0(world, config, ["bushpc", "train", *overrides], run_file)
    if cell_dir is None:
        _ended_by_launcher(stop)  # after rank 0: the launcher could end that before it has said why
        return None, None
    return cell_dir, _run(cell_dir, world, stop)


def _require_world(world: World, config: CellConfig) -> None:
    """Refuse a world that is not the one asked for; launchers start another one silently."""
    cluster = config.cluster
    if world.size == cluster.world_size:
        return
    asked = f"cluster.nodes={cluster.nodes} x cluster.ranks_per_node={cluster.ranks_per_node}"
    if world.size > 1:
        way_out = f"Set both so that they make {world.size}, or start {cluster.world_size}"
    else:
        way_out = (
            f"Start {cluster.ranks_per_node} per node: torchrun --nproc-per-node={cluster.ranks_per_node}, srun with "
            "as many tasks, or accelerate launch with a file of configs/accelerate (its --cpu always starts a single "
            "process, whatever --num_processes says)"
        )
    raise TrainingError(
        f"{asked} asks for {cluster.world_size} rank(s), and the launcher started {world.size}. {way_out}"
    )


def _meet(world: World, config: CellConfig) -> None:
    """Open the process group: where the launcher says, or else through a file in the runs folder."""
    from bushpc.dist import meeting
    from bushpc.train.engine import start_ranks

    assert config.runs_dir is not None, "composition sets it"
    with meeting(world, Path(config.runs_dir), this_step()):
        start_ranks(config, world)


def _cell_from_rank_0(
    world: World, config: CellConfig, command: Sequence[str], run_file: Path | None
) -> CellDir | None:
    """The cell's folder, ready to run; None on the other ranks when rank 0 could not make it ready."""
    from bushpc.dist import from_main

    if not world.is_main:
        told = from_main("")
        return CellDir(told) if told else None
    try:
        cell_dir = _open_cell(config, command)
        if run_file:
            write_atomically(run_file, str(cell_dir.run))
    except BaseException:
        from_main("")  # they wait for it
        raise
    return CellDir(from_main(str(cell_dir)))


def _open_cell(config: CellConfig, command: Sequence[str]) -> CellDir:
    """Write the run folder as `bushpc cv` does, and that this process works on the cell."""
    plan = cv_plan(config)
    name = f"fold{config.fold}"
    run_dir = plan.first.run_dir
    cell_dir = RunDir(run_dir).cell(name)
    cell_dir.run.jobs.mkdir(parents=True, exist_ok=True)
    with _alone_in(run_dir):
        code = write_run(run_dir, plan, command)
        print(f"run: {run_dir}\nstatus: bushpc status {run_dir}", flush=True)
        if cell_dir.done.exists():
            print(f"already done: {name}", flush=True)
            return cell_dir
        for warning in plan.warnings:
            print(f"warning: {warning}", flush=True)
        _refuse_if_live(run_dir, name)
        cell_dir.failed.unlink(missing_ok=True)
        note_attempt(run_dir, [name])
        _job_note(cell_dir, code.name).write(cell_dir.job_note)
    return cell_dir


def _run(cell_dir: CellDir, world: World, stop: StopFlag) -> Stopped | None:
    """The cell on this rank, and on rank 0 the notes of how it ended."""
    from bushpc.cell import run_cell

    run_dir = cell_dir.run.path
    if world.is_main:
        stop.deadline = time_limit()  # the ranks agree at every step, so it takes one that watches the clock
    try:
        stopped = run_cell(cell_dir, world, stop)
        if stopped and world.is_main:
            note_outcome(run_dir, "stopped", stopped.signal_name)
        return stopped
    except LeaseError:  # the cell is someone else's, and so is FAILED
        note_outcome(run_dir, "refused")
        raise
    except BaseException as error:
        if lost_peer(error):
            wait_for_the_reason(cell_dir, error)
            raise SystemExit(LOST_PEER) from error
        note_failure(cell_dir, error)
        raise
    finally:
        if world.is_main:
            _note_end(cell_dir)


def _note_end(cell_dir: CellDir) -> None:
    """Note that this process works on the cell no more, which cannot be seen from another host.

    Not in a batch job that may be queued again: then the queue tells.
    """
    note = JobNote.read(cell_dir.job_note)
    if note is None or (note.host, note.process_start) != (socket.gethostname(), process_start(os.getpid())):
        return
    if cell_dir.has_ended() or not _batch_job():
        msgspec.structs.replace(note, ended=True).write(cell_dir.job_note)


@contextlib.contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Hold the lock under which run folders are written. Raises: DispatchError when another command keeps it."""
    deadline = time.monotonic() + RUN_FOLDER_TIMEOUT_S
    while time.monotonic() < deadline:
        with exclusive(RunDir(run_dir).lock) as alone:
            if alone:
                yield
                return
        time.sleep(0.1)
    raise DispatchError(
        f"another command has been writing {run_dir} for {RUN_FOLDER_TIMEOUT_S} s; wait for it and try again"
    )


def _refuse_if_live(run_dir: Path, name: str) -> None:
    """Leave a cell alone that another job works on or will; a job that was requeued meets its own note."""
    try:
        [cell] = [cell for cell in read_status(run_dir).cells if cell.name == name]
    except DispatchError as error:  # not every compute node can ask the queue, and the cell's lease guards it besides
        print(f"{error}; whether another job waits for {name} is not known", flush=True)
        return
    if cell.live and cell.job_id != _job_id():
        raise DispatchError(
            f"{name} of {run_dir} is {cell.state}: job {cell.job_id} works on it. Wait for it (`bushpc status "
            f"{run_dir} --watch`), or end it first"
        )


def _job_note(cell_dir: CellDir, code: str) -> JobNote:
    """Who works on the cell: a batch job, which the cluster knows, or else a process of this host."""
    job = _batch_job()
    return JobNote(
        executor=job.executor if job else "direct",
        job_id=_job_id(),
        cluster=job.cluster if job else "",
        name=job.name if job else "",
        user=os.getuid(),
        submitted=time.time(),
        log=_log(),
        heartbeat=str(cell_dir.heartbeat),
        process_start=process_start(os.getpid()),
        host=socket.gethostname(),
        code=code,
    )


def _batch_job() -> ThisJob | None:
    """The batch job that we run in. An interactive allocation outlives what runs in it, so it tells nothing of us."""
    job = this_job()
    return job if job and job.batch else None


def _job_id() -> str:
    """As the queue names it, or the process id."""
    job = _batch_job()
    return job.queue_id if job else str(os.getpid())


def _log() -> str:
    """The file that this process prints to; empty where that is a terminal or a pipe."""
    return os.readlink("/proc/self/fd/1") if stat.S_ISREG(os.fstat(1).st_mode) else ""


def _ended_by_launcher(stop: StopFlag) -> bool:
    """Whether the launcher ends this rank now, as it does when rank 0 has failed, by the same error as a rule."""
    deadline = time.monotonic() + LAUNCHER_ENDS_RANKS_S
    while not stop and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(stop)
