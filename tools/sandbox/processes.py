"""Which processes belong to a sandbox, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import typing as t
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layout import Layout

STOP_SECONDS = 10
DAEMON_MARK = "SLURM_SANDBOX_DAEMON"  # set for daemons only, never by `env`: tells our slurmd from anybody else's
NODE_MARK = "SLURM_SANDBOX_NODE"


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with the same pid.

    started: clock ticks after boot, field 22 of /proc/<pid>/stat.
    """

    pid: int
    started: int

    def alive(self) -> bool:
        stat = read_stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX"


class Stat(t.NamedTuple):
    """The fields of /proc/<pid>/stat that are used here."""

    state: str
    parent: int
    started: int


def read_stat(pid: int) -> Stat | None:
    try:
        # The command's name is in brackets and may itself contain spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(fields[0], int(fields[1]), int(fields[19]))


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_environ(pid: int) -> dict[str, str]:
    """A process's environment as it was at its start; empty where we may not look."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if b"=" in entry)
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs}


def everything_of(layout: Layout, node: str | None = None) -> list[Process]:
    """All live processes of this sandbox: daemons, slurmstepd, and whatever jobs started; of one node if given.

    Daemons and their slurmstepd carry our mark. A job's processes have the environment of whoever submitted it, so
    they are recognised by this sandbox's SLURM_CONF with a SLURM_JOB_ID, or by their parents. A shell that merely
    evaluated `env` has no SLURM_JOB_ID and is left alone, and so are this process and those above it.
    """
    stats = {int(p.name): stat for p in Path("/proc").glob("[0-9]*") if (stat := read_stat(int(p.name)))}
    spared = set()
    pid = os.getpid()
    while pid in stats:
        spared.add(pid)
        pid = stats[pid].parent
    ours = {pid for pid in stats if _belongs(pid, layout, node)} - spared
    grown = -1
    while grown != len(ours):
        grown = len(ours)
        ours |= {pid for pid, stat in stats.items() if stat.parent in ours} - spared
    return [Process(pid, stats[pid].started) for pid in sorted(ours) if stats[pid].state not in "ZX"]


def daemon_in_place(layout: Layout, name: str) -> Process | None:
    """A daemon of this sandbox that its user started by hand (`slurmctld`), after the recorded one had ended."""
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        stat = read_stat(pid)
        if stat and stat.state not in "ZX" and read_name(pid) == name and _is_turned_to(read_environ(pid), layout):
            return Process(pid, stat.started)
    return None


def read_name(pid: int) -> str:
    """Of the program that a process runs, at most 15 characters; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _is_turned_to(environ: Mapping[str, str], layout: Layout) -> bool:
    return environ.get("SLURM_CONF") == str(layout.slurm_conf)


def _belongs(pid: int, layout: Layout, node: str | None) -> bool:
    environ = read_environ(pid)
    if environ.get(DAEMON_MARK) == str(layout.root):
        return node is None or environ.get(NODE_MARK) == node
    if node is None and _is_turned_to(environ, layout) and read_name(pid) in ("slurmctld", "slurmdbd"):
        return True
    in_a_job = _is_turned_to(environ, layout) and "SLURM_JOB_ID" in environ
    return in_a_job and (node is None or environ.get("SLURMD_NODENAME") == node)


def end(processes: list[Process], patience: float = STOP_SECONDS) -> None:
    """TERM, and KILL for those that are still there after `patience` seconds."""
    for kind, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, STOP_SECONDS)):
        for process in processes:
            if process.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, kind)
        deadline = time.monotonic() + seconds
        while (processes := [p for p in processes if p.alive()]) and time.monotonic() < deadline:
            time.sleep(0.02)
