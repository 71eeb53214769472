"""What runs inside the job that `bushpc doctor --slurm` submits: it writes down every signal, and when it was killed.

    batch shell ─launcher→ one rank per task ─Popen→ one child per rank
    each ─→ <folder>/<attempt>-<batch | rank0 | child0>.jsonl, one event a line, read by bushpc.ops.survey

A rank ignores signals and writes a line every tenth of a second, so the last line says when KILL came. It
leaves by itself when the command that submitted it has been silent for two minutes. Importable without torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import typing as t
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bushpc import environment
from bushpc.cluster import slurm_site
from bushpc.cluster.base import this_job
from bushpc.cluster.scratch import Unusable, place
from bushpc.ops.gpu_build import gpu_lines, try_gpu

if t.TYPE_CHECKING:
    from submitit import JobEnvironment

SIGNALS = ("TERM", "USR1", "USR2", "INT", "HUP", "CONT", "QUIT", "XCPU")
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
BEAT_S = 0.1
SILENCE_S = 120.0
# A child whose rank is gone goes on for so long: long enough to be seen, short enough to disturb nobody.
ORPHAN_S = 20.0
ANSWERS_S = 10.0
FAREWELL = "farewell"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The callable that submitit pickles; one call per rank.

    folder: takes the logs; visible from all nodes. pulse: the file in which the login node says that it still listens.
    staging, scratch: as in the profile, and the variables that it may mean.
    """

    folder: str
    pulse: str
    staging: str | None = None
    scratch: tuple[str, ...] = ()

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        log = EventLog(Path(self.folder), attempt(), f"rank{job.global_rank}")
        log.listen()
        log.write("start")
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, self.folder, self.pulse, f"child{job.global_rank}", str(os.getpid())],
            env=environment.for_process(environment.WORKER),
        )
        try:
            log.write("facts", **node_facts(job), staging=_staging(self.staging, self.scratch))
            log.write("ready")
            beat(log, Path(self.pulse))
        finally:
            child.kill()
            child.wait()


class EventLog:
    """One process's events, a JSON line each. Lines are written by one call each, so a handler never splits one."""

    def __init__(self, folder: Path, attempt: int, source: str) -> None:
        self._file = os.open(folder / f"{attempt}-{source}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, kind: str, **facts: t.Any) -> None:
        """Append an event; all but beats are forced out to the file server, where the login node looks."""
        os.write(self._file, (json.dumps({"time": time.time(), "kind": kind, **facts}) + "\n").encode())
        if kind != "beat":
            os.fsync(self._file)

    def listen(self) -> None:
        """Note every signal that can be caught, and do nothing else on it."""

        def heard(number: int, frame: types.FrameType | None) -> None:
            self.write("signal", name=signal.Signals(number).name.removeprefix("SIG"))

        for name in SIGNALS:
            signal.signal(signal.Signals[f"SIG{name}"], heard)


def attempt() -> int:
    """How often the cluster has started this job again."""
    job = this_job()
    return job.restarts if job else 0


def beat(log: EventLog, pulse: Path, parent: int | None = None) -> None:
    """Write beats until the login node says farewell or falls silent; answer each new pulse, to compare the clocks.

    parent: process id of the rank that a child belongs to.
    """
    last, spoke = "", time.monotonic()
    orphaned: float | None = None
    while time.monotonic() - spoke < SILENCE_S:
        said = pulse.read_text() if pulse.exists() else FAREWELL
        if said == FAREWELL:
            break
        if said and said != last:  # empty while it is being rewritten
            last, spoke = said, time.monotonic()
            log.write("pong", pulse=said)
        else:
            log.write("beat")
        if parent is not None and orphaned is None and os.getppid() != parent:
            orphaned = time.monotonic()
        if orphaned is not None and time.monotonic() - orphaned > ORPHAN_S:
            break
        time.sleep(BEAT_S)
    log.write("left")


def batch_lines(folder: Path) -> list[str]:
    """Shell lines that make the probe's batch script note its own signals in `folder`."""
    return slurm_site.traced_batch_lines(f"{shlex.quote(str(folder))}/", "-batch.jsonl", SIGNALS)


def node_facts(job: JobEnvironment) -> dict[str, t.Any]:
    """What a rank sees on its node. Sizes in bytes; `names` and `commands` hold "" where all is well, else why not."""
    shm, scratch = Path("/dev/shm"), Path(tempfile.gettempdir())
    first_on_node, ours, gpus = job.local_rank == 0, this_job(), gpu_lines()
    trial = try_gpu() if gpus and first_on_node else None  # once per node, as it imports torch
    return {
        "host": socket.gethostname(),
        "node": ours.node if ours else "",
        "environment": {name: os.environ.get(name) for name in slurm_site.JOB_VARIABLES},
        "cpus": len(os.sched_getaffinity(0)),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm_bytes": shutil.disk_usage(shm).total if shm.exists() else 0,
        "scratch": str(scratch),
        "scratch_free": shutil.disk_usage(scratch).free,
        "gpus": gpus,
        "gpu_trial": dataclasses.asdict(trial) if trial else None,
        "nccl": _nccl(),
        "names": {name: _resolves(name) for name in job.hostnames},
        "commands": _commands() if first_on_node else {},
    }


def _staging(wanted: str | None, scratch: Sequence[str]) -> dict[str, t.Any] | None:
    """Where the node's own disk is and how many bytes are free, or why there is none."""
    if wanted is None:
        return None
    try:
        folder = place(wanted, scratch)
        return {"folder": str(folder), "free": shutil.disk_usage(folder).free, "why": ""}
    except (Unusable, OSError) as error:
        return {"folder": None, "free": 0, "why": str(error)}


def _nccl() -> str | None:
    for package in NCCL_PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _resolves(name: str) -> str:
    try:
        address = str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        return str(error)
    return f"{address} is loopback" if address.startswith("127.") else ""


def _commands() -> dict[str, str]:
    job = this_job()
    asked = slurm_site.commands_on_node(job.id) if job else {}
    return {name: _why_not(command) for name, command in asked.items()}


def _why_not(command: Sequence[str]) -> str:
    try:
        env = environment.for_process(environment.COMMAND)
        answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=ANSWERS_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return " ".join(answer.stderr.split()) or f"exit status {answer.returncode}" if answer.returncode else ""


def _child(folder: str, pulse: str, source: str, parent: str) -> None:
    log = EventLog(Path(folder), attempt(), source)
    log.listen()
    log.write("ready")
    beat(log, Path(pulse), parent=int(parent))


if __name__ == "__main__":
    _child(*sys.argv[1:])
