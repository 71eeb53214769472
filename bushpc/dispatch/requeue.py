"""What the batch shell asks when its ranks have ended: should this job be queued again? No torch: it has seconds.

    ranks end → exit status → `python -m bushpc.dispatch.requeue STATUS RUN` in the shell's EXIT trap

The ranks themselves can't do it: one that requeues its own job has the others killed under it, and a rank that died
during start-up could not. The cluster requeues by itself what fell with its node, and what is still there when its
grace time ends; a job that saved and left early counts as failed, and is requeued here.

jobs/attempt-<job>.json   what rank 0 noted of this start: the job's cells, the step they began at (the sum of several),
                          whether it left on purpose and why
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bushpc.cluster.base import NoClient, cluster_for, this_job
from bushpc.cluster.records import JobFacts, ThisJob
from bushpc.errors import DispatchError
from bushpc.files import write_atomically
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import AttemptNote
from bushpc.train.preempt import TIME_LIMIT

# sysexits.h: a rank that stopped on request and saved; a rank whose peer vanished.
STOPPED = os.EX_TEMPFAIL
LOST_PEER = os.EX_PROTOCOL
KILLED = 128  # and above: the number of the signal that ended a rank
TERMINATED = KILLED + signal.SIGTERM
USER_SIGNALS = (KILLED + signal.SIGUSR1, KILLED + signal.SIGUSR2)
# A job that TERM ended before it could listen, without a preemption being reported, is started again this many times:
# a cluster's launcher sends TERM as well, to the other ranks of one that cannot even start. The same number holds for a
# job that its time limit, or a KILL, ends before its first save.
STARTS = 3
# A controller that has hundreds of jobs to preempt at once answers nobody for minutes.
ASK_FOR_S = 600.0
# A job that was told to stop waits until the cluster ends it, which requeues what it preempts; grace times are shorter.
STAY_FOR_S = 3600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0


def note_attempt(run_dir: Path, cells: Sequence[str]) -> None:
    """Note which cells this start of our job works on, and how far they are; outside a job nobody would ask."""
    job = this_job()
    if job is None:
        return
    path, step = RunDir(run_dir).attempt_note(job.id), _saved(run_dir, cells)
    before = AttemptNote.read_whole(path)
    same = before is not None and (before.cells, before.from_step) == (list(cells), step)
    since = before.stands_since if before is not None and same else job.restarts
    AttemptNote(cells=list(cells), restart=job.restarts, from_step=step, stands_since=since).write(path)


def note_outcome(run_dir: Path, outcome: str, signal_name: str | None = None) -> None:
    """Note that rank 0 leaves on purpose: `stopped` or `refused`. Ranks that are killed meanwhile hide its status.

    signal_name: what stopped it, as StopFlag calls it.
    """
    job = this_job()
    if job is None:
        return
    path = RunDir(run_dir).attempt_note(job.id)
    note = AttemptNote.read_whole(path)
    if note is None or note.restart != job.restarts:
        return  # a later start's: this one has lived longer than the cluster believes
    with contextlib.suppress(OSError):  # a full disk; then the exit status alone tells
        msgspec.structs.replace(note, outcome=outcome, signal=signal_name).write(path)


def command_at_end(run_dir: Path) -> list[str]:
    """What the batch shell runs when its ranks have ended; `{status}` stands for their exit status."""
    return [sys.executable, "-m", "bushpc.dispatch.requeue", "{status}", str(run_dir)]


def main(argv: Sequence[str] | None = None) -> None:
    """Requeue the job that we are in, if it is worth it; say in its log what is done and why."""
    parser = argparse.ArgumentParser(prog="python -m bushpc.dispatch.requeue", description=__doc__)
    parser.add_argument("status", type=int, help="exit status of the ranks' launcher")
    parser.add_argument("run_dir", type=Path, nargs="?", help="run folder; without it only clean stops come back")
    arguments = parser.parse_args(argv)
    job = this_job()
    if job is not None and arguments.status != 0:
        requeue(job, arguments.status, arguments.run_dir)


def requeue(
    job: ThisJob, status: int, run_dir: Path | None, cells: Sequence[str] | None = None, since: int = 0
) -> bool:
    """Ask the cluster until it answers, and have it requeue our job if `why_again` has a reason.

    cells: those that the ranks worked on, where the job has others to work on after them; it began with them in its
    restart number `since`. Returns whether the job ends here: it is requeued, or was cancelled, or was told to stop.
    """
    cluster = cluster_for(job.executor)
    attempt = _attempt(run_dir, job, cells)
    stays = (status == STOPPED or _stopped(attempt)) and not (attempt and attempt.signal == TIME_LIMIT)
    deadline = time.monotonic() + (STAY_FOR_S if stays else ASK_FOR_S)
    wait_s = FIRST_WAIT_S
    while True:
        try:
            # Asked again each time: a requeue whose answer was lost has happened all the same.
            facts = cluster.facts(job)
            if not facts.ours_to_requeue:
                return True
            facts = dataclasses.replace(facts, restarts=facts.restarts - since)
            reason = why_again(status, facts, run_dir, attempt)
            if reason:
                print(f"job {job.id} goes back into the queue: {reason}", flush=True)
                cluster.requeue(facts.requeue_as)
                return True
            if run_dir and attempt and _stopped(attempt) and _is_in_vain(status, facts, run_dir, attempt):
                for cell in _unfinished(run_dir, attempt):
                    _fail(cell, facts)
            return False
        except DispatchError as error:  # no client tools on this node, or a busy controller
            never = isinstance(error, NoClient) and not stays
            if never or cluster.is_final(error) or time.monotonic() + wait_s > deadline:
                print(f"job {job.id} could not be requeued ({error}); submit again to go on", flush=True)
                return stays
            print(f"job {job.id} cannot be requeued yet ({error}); next try in {wait_s:g} s", flush=True)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def why_again(status: int, facts: JobFacts, run_dir: Path | None, attempt: AttemptNote | None) -> str | None:
    """Why a job whose ranks ended with `status` should run again; None if it should not.

    attempt: what rank 0 noted; None if it did not come so far. Whoever wrote FAILED failed for good. What died
    without a word comes back if it got further in this attempt, and else a few times from the same step: a crash that
    always comes at the same place can then not loop; neither can a time limit that is over before the first save.
    """
    if attempt and (attempt.outcome == "refused" or (run_dir and not _unfinished(run_dir, attempt))):
        return None
    if _is_in_vain(status, facts, run_dir, attempt):
        return None
    if status == STOPPED or _stopped(attempt):
        return "it was told to stop, and saved"
    if status in USER_SIGNALS or (status == TERMINATED and (facts.preempted or facts.restarts < STARTS)):
        return "it was told to stop before it could listen"
    if run_dir and attempt and (status > KILLED or status == LOST_PEER):
        saved = _saved(run_dir, attempt.cells)
        if saved > attempt.from_step:
            return f"a rank was killed; it had got from step {attempt.from_step} to {saved}"
        if not _stands_still(attempt):
            return f"a rank was killed before the first save after step {attempt.from_step}"
    return None


def _is_in_vain(status: int, facts: JobFacts, run_dir: Path | None, attempt: AttemptNote | None) -> bool:
    """Whether the time limit ends every start before it has saved anything: then so would the next one's."""
    # The signal that the cluster was asked to send before the limit; a site may send the same one when it preempts.
    signal_name = attempt.signal if attempt else None
    early = status in USER_SIGNALS or signal_name in ("SIGUSR1", "SIGUSR2")
    if signal_name != TIME_LIMIT and (facts.preempted or not early):
        return False
    if not (run_dir and attempt):
        return status in USER_SIGNALS and facts.restarts >= STARTS
    if _saved(run_dir, attempt.cells) > attempt.from_step:
        return False
    return _stands_still(attempt)


def _saved(run_dir: Path, cells: Sequence[str]) -> int:
    """Steps saved of all cells of a job together."""
    return sum(RunDir(run_dir).cell(cell).newest_step() for cell in cells)


def _stopped(attempt: AttemptNote | None) -> bool:
    return attempt is not None and attempt.outcome == "stopped"


def _unfinished(run_dir: Path, attempt: AttemptNote) -> list[CellDir]:
    """Folders of the job's cells that neither are done nor failed for good."""
    return [cell for cell in map(RunDir(run_dir).cell, attempt.cells) if not cell.has_ended()]


def _stands_still(attempt: AttemptNote) -> bool:
    """Whether the job has been started again so often from the same step that one more start would be no better."""
    return attempt.restart - attempt.stands_since >= STARTS


def _fail(cell: CellDir, facts: JobFacts) -> None:
    """Write FAILED for a job that its time limit never lets save, as status and report show it."""
    known = facts.limit_min is not None
    limit = f"the time limit of {facts.limit_min} min" if known else "the time that the cluster gives"
    line = f"{limit} is over before the first save; raise cluster.time_min"
    print(f"not queued again: {line}", flush=True)
    with contextlib.suppress(OSError):  # a full disk; the log has it
        write_atomically(cell.failed, f"{line}\n")


def _attempt(run_dir: Path | None, job: ThisJob, cells: Sequence[str] | None) -> AttemptNote | None:
    """What rank 0 noted of this start of the job with these cells; None if it did not come so far."""
    note = AttemptNote.read_whole(RunDir(run_dir).attempt_note(job.id)) if run_dir else None
    of_this_start = note and note.restart == job.restarts and (cells is None or note.cells == list(cells))
    return note if of_this_start else None


if __name__ == "__main__":
    # The cluster's next signals reach this process, too, while it waits for an answer; what ends it is KILL.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    main()
