"""What a job does that works on one pack of cells after the other (a lane, see lanes.py).

    batch shell: asks `python -m bushpc.dispatch.turns` for the next pack, starts the ranks for it, asks again …

Nobody submits on a compute node, and no process stays on the login node: the batch shell starts the ranks anew for each
pack. A job that is stopped goes back into the queue as any other, and then goes on with the pack that it was at.

jobs/lane-<submission>-<n>.json   the packs of the n-th job, and which of them it is at (records.LaneNote)
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bushpc.cluster.base import cluster_for, this_job, time_limit
from bushpc.cluster.records import ThisJob
from bushpc.dispatch.requeue import requeue
from bushpc.dispatch.status import read_status
from bushpc.errors import ConfigError, DataError, DispatchError
from bushpc.runs.layout import RunDir
from bushpc.runs.records import JobNote, LaneNote
from bushpc.runs.run_record import RunRecord

# In the ranks' environment: the number of their pack, or REPORT.
TURN = "BUSHPC_TURN"
REPORT = "report"
NONE_YET = "none"


def command_for_turns(run_dir: Path, submission: str) -> list[str]:
    """What the batch shell of a lane asks before it starts ranks, with the exit status of the last ones added."""
    return [sys.executable, "-m", "bushpc.dispatch.turns", str(run_dir), submission]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the turn that comes next. Exit status 1: there is none, or this job ends here."""
    parser = argparse.ArgumentParser(prog="python -m bushpc.dispatch.turns", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("submission")
    parser.add_argument("status", help=f"exit status of the last turn's ranks, or `{NONE_YET}`")
    given = parser.parse_args(argv)
    job = this_job()
    if job is None:
        raise DispatchError("this is for the batch shell of a job: there is none here")
    with contextlib.redirect_stdout(sys.stderr):  # the shell reads what is printed
        name = lane_name(given.submission, number_of(job.queue_id))
        turn = next_turn(RunDir(given.run_dir), name, job, _status(given.status))
    if turn is None:
        return 1
    print(turn)
    return 0


def next_turn(run: RunDir, name: str, job: ThisJob, status: int | None) -> str | None:
    """What the job is to work on now: the number of a pack, or REPORT; None if it is to end.

    status: of the ranks that have just ended; None at the start of the batch shell.
    """
    note = LaneNote.read(run.lane(name))
    if note is None:
        raise DataError(f"{run.lane(name)} is gone: it says what this job is to do. Submit again to go on")
    turn = note.turn
    if status is not None:
        if turn >= len(note.packs):
            return None  # the report was written, or could not be
        if status and requeue(job, status, run.path, cells=note.packs[turn], since=note.since):
            return None
        turn += 1
    while turn < len(note.packs) and not any(_is_open(run, cell, note.submitted) for cell in note.packs[turn]):
        turn += 1
    if turn != note.turn:
        note = msgspec.structs.replace(note, turn=turn, since=job.restarts)
        note.write(run.lane(name))
    if turn < len(note.packs):
        return None if status is not None and _comes_back_for_more_time(job, note.lead_s) else str(turn)
    return REPORT if note.report and is_last(run) else None


def is_last(run: RunDir) -> bool:
    """Whether no job works, or will work, on a cell of this run."""
    record = RunRecord.open(run)
    if all(run.cell(cell.name).has_ended() for cell in record.cells):
        return True
    try:
        return not any(cell.live for cell in read_status(run.path, record).cells)
    except (DataError, DispatchError) as error:  # not every compute node can ask the queue
        print(f"{error}; whether other cells still run is not known, so no report is written here", flush=True)
        return False


def lane_name(submission: str, number: int) -> str:
    """Of the `number`-th job of a submission."""
    return f"{submission}-{number}"


def number_of(queue_id: str) -> int:
    """A job's number in its submission."""
    return int(queue_id.rpartition("_")[2]) if "_" in queue_id else 0


def _is_open(run: RunDir, name: str, submitted: float) -> bool:
    """Whether a cell is this job's to work on."""
    cell = run.cell(name)
    return not cell.has_ended() and not is_taken_away(JobNote.read_whole(cell.job_note), submitted)


def is_taken_away(note: JobNote | None, submitted: float) -> bool:
    """Whether a cell was cancelled, or submitted again, since its job was submitted."""
    return note is not None and (note.cancelled is not None or note.submitted > submitted)


def _comes_back_for_more_time(job: ThisJob, lead_s: float) -> bool:
    """Requeue our job if the cluster is about to tell it to stop: between two packs nobody would hear that."""
    end = time_limit()
    if end is None or time.time() < end - lead_s:
        return False
    cluster = cluster_for(job.executor)
    try:
        facts = cluster.facts(job)
        if facts.ours_to_requeue:
            print(f"job {job.id} goes back into the queue: its time is over, and cells are left", flush=True)
            cluster.requeue(facts.requeue_as)
    except DispatchError as error:
        print(f"job {job.id} cannot be requeued ({error}); it begins the next cell", flush=True)
        return False
    return True


def _status(text: str) -> int | None:
    if text != NONE_YET and not text.isdecimal():
        raise ConfigError(f"'{text}' is no exit status; it is a number, or `{NONE_YET}`")
    return None if text == NONE_YET else int(text)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR2):  # what ends it is KILL
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main())
