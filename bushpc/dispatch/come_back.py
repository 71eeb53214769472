"""What the batch shell runs when its ranks have ended: is this job to be queued again? No torch: it has seconds.

    ranks end → srun's exit status → `python -m bushpc.dispatch.come_back STATUS RUN` in the shell's EXIT trap

Not the ranks themselves: one that requeues its own job has the others killed under it, and a rank that died in its
start-up could not. Slurm requeues by itself what fell with its node, and what is still there when its time of grace
ends; a job that saved and left early counts as failed, and is ours to bring back.

jobs/attempt-<job>.json   what rank 0 noted of this start: the job's cells, the step they began at (the sum of several),
                          whether it left on purpose and why
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing as t
from collections.abc import Sequence
from pathlib import Path

from bushpc.files import write_atomically
from bushpc.runs.goodput import newest_saved, read_note
from bushpc.runs.lease import slurm_job, slurm_restart
from bushpc.train.preempt import TIME_LIMIT

# sysexits.h: a rank that stopped on request and saved; a rank whose peer vanished.
STOPPED = os.EX_TEMPFAIL
LOST_PEER = os.EX_PROTOCOL
KILLED = 128  # and above: the number of the signal that ended a rank
TERMINATED = KILLED + signal.SIGTERM
USER_SIGNALS = (KILLED + signal.SIGUSR1, KILLED + signal.SIGUSR2)
# So often a job is started again that TERM ended before it could listen, without Slurm saying that it preempts it:
# srun sends TERM as well, to the other ranks of one that cannot even start. And so often one that the time limit, or
# a KILL, ends before its first save.
STARTS = 3
SLURM_ANSWERS_S = 30
# A controller that has hundreds of jobs to preempt at once answers nobody for minutes.
ASK_FOR_S = 600.0
# One that was told to stop stays until Slurm ends it, which requeues what it preempts; grace times are shorter.
STAY_FOR_S = 3600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
# In answers of a controller that is well: asking again would change nothing.
REFUSALS = ("Invalid job id", "denied", "disabled", "already completing or completed")


class JobFacts(t.NamedTuple):
    """What Slurm says of a job.

    limit_min: its time limit; None without one. requeue_as: its name for `scontrol requeue`, which takes the id of an
    array's last task for the whole array, and ends and requeues the tasks beside it.
    """

    state: str
    reason: str
    preempted: bool
    restarts: int
    limit_min: int | None
    requeue_as: str

    @property
    def is_ours_to_requeue(self) -> bool:
        """Not one that was cancelled, or that Slurm requeues itself: those are COMPLETING by now, as is a late one."""
        return self.state == "RUNNING" or (self.state == "COMPLETING" and self.reason == "TimeLimit")


def note_attempt(run_dir: Path, cells: Sequence[str]) -> None:
    """Note which cells this start of our Slurm job works on, and how far they are; outside Slurm nobody would ask."""
    job_id = slurm_job()
    if job_id is not None:
        path, step, restart = _note_path(run_dir, job_id), _saved(run_dir, cells), slurm_restart()
        before = read_note(path)
        same = (before.get("cells"), before.get("from_step")) == (list(cells), step)
        note = {
            "cells": list(cells),
            "restart": restart,
            "from_step": step,
            "stands_since": before.get("stands_since", restart) if same else restart,
            "outcome": None,
            "signal": None,
        }
        write_atomically(path, json.dumps(note))


def note_outcome(run_dir: Path, outcome: str, signal_name: str | None = None) -> None:
    """Note that rank 0 leaves on purpose: `stopped` or `refused`. Ranks that are killed meanwhile hide its status.

    signal_name: what stopped it, as StopFlag calls it.
    """
    job_id = slurm_job()
    if job_id is not None:
        path = _note_path(run_dir, job_id)
        note = read_note(path)
        if note.get("restart") != slurm_restart():
            return  # a later start's: this one has lived longer than Slurm believes
        with contextlib.suppress(OSError):  # a full disk; then the exit status alone tells
            write_atomically(path, json.dumps({**note, "outcome": outcome, "signal": signal_name}))


def shell_lines(run_dir: Path) -> list[str]:
    """Lines of a batch script before its `srun`."""
    command = f'{shlex.quote(sys.executable)} -m bushpc.dispatch.come_back "$?" {shlex.quote(str(run_dir))}'
    return [
        "# A shell that has a handler waits for srun to end before it minds the signal.",
        "trap : TERM USR2",
        f"trap {shlex.quote(command)} EXIT",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Requeue the Slurm job that we are in, if it is worth it; say in its log what is done and why."""
    parser = argparse.ArgumentParser(prog="python -m bushpc.dispatch.come_back", description=__doc__)
    parser.add_argument("status", type=int, help="exit status of srun")
    parser.add_argument("run_dir", type=Path, nargs="?", help="run folder; without it only clean stops come back")
    arguments = parser.parse_args(argv)
    job_id = slurm_job()
    if job_id is not None and arguments.status != 0:
        _come_back(job_id, arguments.status, arguments.run_dir, _attempt(arguments.run_dir, job_id))


def _come_back(job_id: str, status: int, run_dir: Path | None, attempt: dict[str, t.Any]) -> None:
    """Ask Slurm until it answers, and have it requeue the job if `why_again` has a reason."""
    stays = (status == STOPPED or attempt.get("outcome") == "stopped") and attempt.get("signal") != TIME_LIMIT
    deadline = time.monotonic() + (STAY_FOR_S if stays else ASK_FOR_S)
    wait_s = FIRST_WAIT_S
    while True:
        try:
            # Anew each time: a requeue whose answer was lost has happened all the same.
            facts = job_facts(_slurm("scontrol", "--oneliner", "show", "job", job_id), job_id)
            if not facts.is_ours_to_requeue:
                return
            reason = why_again(status, facts, run_dir, attempt)
            if reason:
                print(f"job {job_id} goes back into the queue: {reason}", flush=True)
                _slurm("scontrol", "requeue", facts.requeue_as)
            elif run_dir and attempt.get("outcome") == "stopped" and _is_in_vain(status, facts, run_dir, attempt):
                for cell_dir in _unfinished(run_dir, attempt):
                    _fail(cell_dir, facts)
            return
        except (OSError, subprocess.SubprocessError) as error:  # no client tools on this node, or a busy controller
            detail = str(getattr(error, "stderr", None) or error).strip()
            never = isinstance(error, FileNotFoundError) and not stays
            if never or any(word in detail for word in REFUSALS) or time.monotonic() + wait_s > deadline:
                print(f"job {job_id} could not be requeued ({detail}); submit again to go on", flush=True)
                return
            print(f"job {job_id} cannot be requeued yet ({detail}); next try in {wait_s:g} s", flush=True)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def why_again(status: int, facts: JobFacts, run_dir: Path | None, attempt: dict[str, t.Any]) -> str | None:
    """Why a job whose srun ended with `status` should run again; None if it should not.

    attempt: what rank 0 noted; empty if it did not come so far. Whoever wrote FAILED failed for good. What died
    without a word comes back if it got further in this attempt, and else a few times from the same step: a crash that
    always comes at the same place can then not loop; neither can a time limit that is over before the first save.
    """
    if attempt.get("outcome") == "refused" or (run_dir and attempt and not _unfinished(run_dir, attempt)):
        return None
    if _is_in_vain(status, facts, run_dir, attempt):
        return None
    if status == STOPPED or attempt.get("outcome") == "stopped":
        return "it was told to stop, and saved"
    if status in USER_SIGNALS or (status == TERMINATED and (facts.preempted or facts.restarts < STARTS)):
        return "it was told to stop before it could listen"
    if run_dir and attempt and (status > KILLED or status == LOST_PEER):
        saved = _saved(run_dir, attempt["cells"])
        if saved > attempt["from_step"]:
            return f"a rank was killed; it had got from step {attempt['from_step']} to {saved}"
        if not _stands_still(attempt):
            return f"a rank was killed before the first save after step {attempt['from_step']}"
    return None


def _is_in_vain(status: int, facts: JobFacts, run_dir: Path | None, attempt: dict[str, t.Any]) -> bool:
    """Whether the time limit ends every start before it has saved anything: then so would the next one's."""
    # The signal that sbatch was asked to send before the limit; a site may send the same one when it preempts.
    early = status in USER_SIGNALS or attempt.get("signal") in ("SIGUSR1", "SIGUSR2")
    if attempt.get("signal") != TIME_LIMIT and (facts.preempted or not early):
        return False
    if not (run_dir and attempt):
        return status in USER_SIGNALS and facts.restarts >= STARTS
    if _saved(run_dir, attempt["cells"]) > attempt["from_step"]:
        return False
    return _stands_still(attempt)


def _saved(run_dir: Path, cells: Sequence[str]) -> int:
    """Steps saved of all cells of a job together."""
    return sum(newest_saved(run_dir / "cells" / cell) for cell in cells)


def _unfinished(run_dir: Path, attempt: dict[str, t.Any]) -> list[Path]:
    """Folders of the job's cells that neither are done nor failed for good."""
    folders = [run_dir / "cells" / cell for cell in attempt["cells"]]
    return [folder for folder in folders if not any((folder / end).exists() for end in ("DONE", "FAILED"))]


def _stands_still(attempt: dict[str, t.Any]) -> bool:
    """Whether the job has been started again so often from the same step that one more start would be no better."""
    return bool(attempt["restart"] - attempt.get("stands_since", 0) >= STARTS)


def _fail(cell_dir: Path, facts: JobFacts) -> None:
    """Write FAILED for a job that its time limit never lets save, as status and report show it."""
    limit = f"the time limit of {facts.limit_min} min" if facts.limit_min is not None else "the time that Slurm gives"
    line = f"{limit} is over before the first save; raise cluster.time_min"
    print(f"not queued again: {line}", flush=True)
    with contextlib.suppress(OSError):  # a full disk; the log has it
        write_atomically(cell_dir / "FAILED", f"{line}\n")


def job_facts(text: str, job_id: str) -> JobFacts:
    """From `scontrol --oneliner show job`, which has a line for every task when asked for an array's last one."""
    lines = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines())
    words = next((words for words in lines if words.get("JobId") == job_id), {})
    in_array = words.get("ArrayTaskId", "").isdecimal()
    return JobFacts(
        state=words.get("JobState", ""),
        reason=words.get("Reason", ""),
        preempted=words.get("PreemptTime", "None") != "None",
        restarts=int(words.get("Restarts", 0)),
        limit_min=_minutes(words.get("TimeLimit", "")),
        requeue_as=f"{words['ArrayJobId']}_{words['ArrayTaskId']}" if in_array else job_id,
    )


def _minutes(limit: str) -> int | None:
    """From `1-02:30:00` or `00:30:00`, rounded up; None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if not match:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return (days * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)


def _attempt(run_dir: Path | None, job_id: str) -> dict[str, t.Any]:
    """What rank 0 noted of this start of the job; empty if it did not come so far."""
    note = read_note(_note_path(run_dir, job_id)) if run_dir else {}
    return note if note.get("restart") == slurm_restart() else {}


def _note_path(run_dir: Path, job_id: str) -> Path:
    return run_dir / "jobs" / f"attempt-{job_id}.json"


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SLURM_ANSWERS_S).stdout


if __name__ == "__main__":
    # Slurm's next signals reach this process, too, while it waits for an answer; what ends it is KILL.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    main()
