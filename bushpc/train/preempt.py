"""Stop signals → a flag. Handlers do nothing else: saving inside a handler can hang or corrupt data.

Slurm's preemption sends TERM to every process of the step (or USR2 first, where the site sets
preempt_send_user_signal); `scontrol requeue` and `scancel` send TERM. The trainer checks the flag at step boundaries,
where all ranks agree, save and exit. A job opens the flag first of all, so this module does not import torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import types
import typing as t

from bushpc.process import STOP_SIGNALS
from bushpc.runs.lease import slurm_job

TIME_LIMIT = "the time limit"
LEAD_S = 60.0
# Much shorter than any useful grace time.
SLURM_ANSWERS_S = 10


class StopFlag:
    """Context manager. While open, a stop signal only sets `signal_name`; so does an approaching deadline.

    deadline: end of the job in seconds since the epoch; None if it has no limit or the limit is unknown.
    lead_s: the flag is raised this long before the deadline; the trainer sets it to the time of a step and a save.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.deadline: float | None = None
        self.lead_s = LEAD_S
        self._opened = time.time()
        self._before: dict[signal.Signals, t.Any] = {}

    def __bool__(self) -> bool:
        if self.signal_name is None and self.deadline is not None and time.time() >= self.deadline - self._lead():
            self.signal_name = TIME_LIMIT
        return self.signal_name is not None

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            # The local executor starts jobs with INT ignored, because a Ctrl-C in the submitting terminal reaches them
            # too but is not meant for them.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _lead(self) -> float:
        # A lead longer than the job would stop every attempt at its first step.
        assert self.deadline is not None
        return min(self.lead_s, (self.deadline - self._opened) / 2)


def time_limit() -> float | None:
    """When Slurm ends the job that we are in, in seconds since the epoch; None outside a job, or if it does not say."""
    job_id = slurm_job()
    if job_id is None:
        return None
    if "SLURM_JOB_END_TIME" in os.environ:  # not before Slurm 23.02
        return float(os.environ["SLURM_JOB_END_TIME"])
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%A %e"]
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}  # a user's own format would not be understood
    try:
        answer = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=SLURM_ANSWERS_S
        )
        # The last task of an array has the array's number, so asking for it may name its neighbours, too.
        limits = dict(line.split() for line in answer.stdout.splitlines())
        return time.mktime(time.strptime(limits[job_id], "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        print(f"the time limit of job {job_id} is not known here, only its signal will tell: {error}", flush=True)
        return None
