"""Stop signals → a flag. Handlers do nothing else: saving inside one hangs or corrupts now and then.

Slurm's preemption sends TERM to every process of the step (or USR2 first, where the site sets
preempt_send_user_signal); `scontrol requeue` and `scancel` send TERM. The trainer asks at step boundaries, all
ranks agree there, save and leave.
"""

from __future__ import annotations

import signal
import types
import typing as t

# Not USR1: NCCL may own it. INT is a user's Ctrl-C on a run in the foreground.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Context manager: while it is open, a stop signal sets `signal_name` and nothing else."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, t.Any] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            # Jobs of the local executor are started with INT ignored: a Ctrl-C in the terminal that submitted them
            # reaches them too, and is not meant for them.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
