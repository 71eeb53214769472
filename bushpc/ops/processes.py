"""The processes of a run on one node, also those whose parents have died. Imports no torch, because it runs often.

    python -m bushpc.ops.processes RUN            one JSON object per process
    python -m bushpc.ops.processes RUN --kill 1   SIGKILL for rank 1, if it is on this node

A process belongs to a run when its command line or its environment names the run's folder. So it is found when its
parents are gone, and nobody else's is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
import typing as t
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc.cluster.base import all_clusters, rank_in, this_job

SEARCH = "bushpc.ops.processes"
TASK = "submitit.core._submit"


@dataclass(frozen=True, kw_only=True)
class RunProcess:
    """started: in seconds since 1970, by the node's clock. rank: None for other processes. job: its id, or ""."""

    node: str
    pid: int
    started: float
    rank: int | None
    job: str
    command: str

    def __str__(self) -> str:
        return f"{self.command[:60]} (process {self.pid} on {self.node})"


def processes_of(run_dir: Path) -> list[RunProcess]:
    """The run's processes on this node; those that search, and what this process runs in, are left out."""
    needles = (os.fsencode(run_dir) + b"/", os.fsencode(run_dir) + b"\0")
    words_of, ours = {}, []
    spared = _ancestry()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            command, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            words_of[int(path.name)] = command.split(b"\0")
            named = any(needle in text for needle in needles for text in (command + b"\0", environment))
            if named and int(path.name) not in spared and SEARCH.encode() not in command:
                ours.append((int(path.name), environment))
    found = []
    for pid, environment in ours:
        stat = _stat(pid)
        if stat is not None:
            variables = dict(entry.partition(b"=")[::2] for entry in environment.split(b"\0"))
            # A DataLoader worker is a copy of its rank, command line included.
            is_rank = _is_task(words_of[pid]) and not _is_task(words_of.get(stat.parent, []))
            found.append(_describe(pid, stat, words_of[pid], variables, is_rank))
    return found


def kill_rank(run_dir: Path, rank: int) -> bool:
    """SIGKILL for a rank of the run; False if it is not on this node."""
    victims = [process.pid for process in processes_of(run_dir) if process.rank == rank]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return bool(victims)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {SEARCH}", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kill", type=int, metavar="RANK")
    arguments = parser.parse_args(argv)
    if arguments.kill is not None:
        kill_rank(arguments.run_dir, arguments.kill)
        return
    for process in processes_of(arguments.run_dir):
        print(json.dumps(dataclasses.asdict(process)), flush=True)


class _Stat(t.NamedTuple):
    parent: int
    ticks: int


def _stat(pid: int) -> _Stat | None:
    """From /proc/<pid>/stat; None if the process has ended, also as a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else _Stat(parent=int(fields[1]), ticks=int(fields[19]))


def _ancestry() -> set[int]:
    pid, found = os.getpid(), set()
    while pid > 1 and (stat := _stat(pid)) is not None:
        found.add(pid)
        pid = stat.parent
    return found


def _is_task(words: Sequence[bytes]) -> bool:
    """Whether this is what the cluster's launcher starts per rank; the launcher itself names it, too."""
    launchers = {backend.launcher for backend in all_clusters() if backend.launcher}
    return TASK.encode() in words and os.fsdecode(os.path.basename(words[0])) not in launchers


def _describe(
    pid: int, stat: _Stat, words: Sequence[bytes], variables: dict[bytes, bytes], is_rank: bool
) -> RunProcess:
    environment = {os.fsdecode(name): os.fsdecode(value) for name, value in variables.items()}
    rank, job = rank_in(environment), this_job(environment)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - stat.ticks / os.sysconf("SC_CLK_TCK")
    return RunProcess(
        node=(job and job.node) or socket.gethostname(),
        pid=pid,
        started=time.time() - age,
        rank=rank if is_rank else None,
        job=job.queue_id if job else "",
        command=os.fsdecode(b" ".join(words)).strip(),
    )


if __name__ == "__main__":
    main()
