"""What ends processes: the signals of a job, and the end of a parent. Used by trainer, loader and jobs; no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

# Not USR1: NCCL may own it. INT is a user's Ctrl-C on a run in the foreground.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send `number` to this process when its parent ends, however it does. Linux only, as Slurm is.

    parent: its process id, where that was known before this process began. The kernel goes by the parent's thread: it
    has to be one that lasts.
    """
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended while we asked
        os.kill(os.getpid(), number)


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found
