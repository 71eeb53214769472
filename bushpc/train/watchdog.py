"""The watchdog ends a hung rank after a set time and records its stacks. The loop reports progress to it.

    rank → "step 37" through a pipe → guard process → silence: stacks to <cell>/hang/rank<r>.txt, FAILED, KILL

The guard is a separate process, because if a rank hangs in C code, its Python threads may never get the GIL. It
requests the stacks with QUIT, which faulthandler handles without the GIL; `kill -QUIT` on a rank does the same at any
time without ending it. This module does not import torch, so that the guard starts at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import subprocess
import sys
import time
import typing as t
from pathlib import Path

from bushpc import environment
from bushpc.files import write_atomically
from bushpc.process import STOP_SIGNALS, children
from bushpc.runs.layout import CellDir

TICK_S = 1.0
# In a hung collective all ranks hang at nearly the same time; once the first one ends, srun kills the others.
OTHERS_WRITE_S = 5.0


class Watchdog:
    """Context manager. While open, `alive` must be called at least every `hang_s` seconds; 0 disables the watchdog.

    A suspended job does not count as hung, because only time in which the guard itself runs is counted.
    """

    def __init__(self, cell_dir: Path | CellDir, rank: int, hang_s: float) -> None:
        self.cell_dir, self.rank, self.hang_s = CellDir(cell_dir), rank, hang_s
        self._guard: subprocess.Popen[bytes] | None = None
        self._stacks: t.TextIO | None = None

    def __enter__(self) -> Watchdog:
        if self.hang_s:
            path = self.cell_dir.stacks(self.rank)
            path.parent.mkdir(exist_ok=True)
            self._stacks = path.open("a")
            faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True)
            self._guard = self._start_guard()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._guard is None:
            return
        assert self._stacks is not None
        assert self._guard.stdin is not None
        # Kill the guard and its killer process. Closing the pipe would not: DataLoader workers have it open too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()
        self._guard.stdin.close()
        faulthandler.unregister(signal.SIGQUIT)
        self._stacks.close()
        if not self.cell_dir.stacks(self.rank).stat().st_size:
            self.cell_dir.stacks(self.rank).unlink()

    def alive(self, where: str) -> None:
        """Report progress with a few words, such as `step 37`. Takes microseconds."""
        if self._guard is not None:
            assert self._guard.stdin is not None
            # A guard that was killed, or is suspended with a full pipe, must not stop the run.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._guard.stdin.fileno(), f"{where}\n".encode())

    def _start_guard(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "bushpc.train.watchdog"]
        command += [str(os.getpid()), str(self.rank), str(self.hang_s), str(self.cell_dir)]
        # Preemption signals every process of the Slurm step; a child inherits blocked signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            env = environment.for_process(environment.WORKER)
            guard = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert guard.stdin is not None
        os.set_blocking(guard.stdin.fileno(), False)
        return guard


def guard(pid: int, rank: int, hang_s: float, cell_dir: CellDir) -> None:
    """Watch `pid` through standard input until it ends. If it hangs, make it write its stacks, and kill it."""
    where, since, silent_s = "start", time.time(), 0.0
    tick = min(TICK_S, hang_s / 4)
    while silent_s < hang_s:
        if os.getppid() != pid:  # DataLoader workers keep the pipe open when the rank is killed
            return
        if not select.select([0], [], [], tick)[0]:
            silent_s += tick
            continue
        received = os.read(0, 1 << 16)
        if not received:
            return
        where, since, silent_s = received.decode(errors="replace").splitlines()[-1], time.time(), 0.0
    _end(pid, rank, hang_s, cell_dir, f"{where} ({time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))})")


def _end(pid: int, rank: int, hang_s: float, cell_dir: CellDir, last: str) -> None:
    # Start the killer first, as a separate process: the file system we write to may be the cause of the hang.
    killer = _kill_after(OTHERS_WRITE_S, [pid, *_descendants(pid)])
    stacks = cell_dir.stacks(rank)
    reason = f"rank {rank} made no progress for {hang_s:g} s, last: {last}; stacks: {stacks}"
    print(reason, file=sys.stderr, flush=True)
    with stacks.open("a") as file:
        file.write(f"\n{reason}\n")
    os.kill(pid, signal.SIGQUIT)
    if not cell_dir.failed.exists():
        write_atomically(cell_dir.failed, f"{reason}\n")
    killer.wait()


def _kill_after(seconds: float, pids: list[int]) -> subprocess.Popen[bytes]:
    command = ["sh", "-c", f"sleep {seconds:g}; kill -KILL {' '.join(map(str, pids))}"]
    return subprocess.Popen(command, env=environment.for_process(environment.WORKER))


def _descendants(pid: int) -> list[int]:
    """All descendants, such as DataLoader workers, except this guard."""
    found = [child for child in children(pid) if child != os.getpid()]
    return found + [below for child in found for below in _descendants(child)]


if __name__ == "__main__":
    guard(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), CellDir(sys.argv[4]))
