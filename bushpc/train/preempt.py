"""Stop signals → a flag. Handlers do nothing else: saving inside a handler can hang or corrupt data.

Slurm's preemption sends TERM to every process of the step (or USR2 first, where the site sets
preempt_send_user_signal); `scontrol requeue` and `scancel` send TERM. The trainer checks the flag at step boundaries,
where all ranks agree, save and exit. A job opens the flag first of all, so this module does not import torch.
"""

from __future__ import annotations

import signal
import time
import types
import typing as t

from bushpc.process import STOP_SIGNALS

TIME_LIMIT = "the time limit"
LEAD_S = 60.0


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
