"""How processes end, and what tells one from another. Without torch; used by trainer, loader and jobs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

# USR1 is left out because NCCL may use it. INT is a user's Ctrl-C on a run in the foreground.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Make the kernel send `number` to this process when its parent ends, for any reason. Linux only, like Slurm.

    parent: its process id, if known before this process started. The kernel watches the parent's thread that started
    this process, so that thread must not end earlier.
    """
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before prctl took effect
        os.kill(os.getpid(), number)


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def machine() -> str:
    """Names the space in which process ids are unique: the running kernel and the container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def process_start(pid: int) -> str | None:
    """When a process started (clock ticks since boot): with its id it names a process for good. None if it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
