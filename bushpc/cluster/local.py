"""This machine as a cluster: a job is a process tree under submitit's local controller.

    shell (setup lines, waits for a place) ─exec→ controller, same process id ─→ one process per rank

The job's id is the process id of the shell, which becomes the controller: TERM sent to it reaches the ranks. A job
survives the command that submitted it, and hears neither Ctrl-C nor the end of its terminal.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing as t
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bushpc import environment
from bushpc.cluster import setup
from bushpc.cluster.base import Cluster, submit_all
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check
from bushpc.cluster.profile import resources, tasks_per_node
from bushpc.cluster.records import Job, JobRequest, JobState
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import is_own_folder
from bushpc.process import children, process_start

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# A job of another machine counts as ended when its log has been silent for this long.
FOREIGN_HOST_S = 600.0
# Set in a job: the process id of its shell, later of its controller, whose children the ranks are.
CONTROLLER = "BUSHPC_LOCAL_CONTROLLER"


class LocalCluster(Cluster):
    """Cells as processes of this machine, as many at a time as `cluster.parallel` says.

    `direct` is what `bushpc train` writes into its note outside a batch job: a process that nobody submitted.
    """

    executor = "local"
    aliases = ("direct",)
    ids_are_processes = True
    one_machine = True

    def require(self, profile: ClusterConfig) -> None:
        super().require(profile)
        if environment.few_addresses():
            raise ConfigError(f"{environment.address_space_note()}. Repeat it in a shell with `ulimit -v unlimited`")

    def environment_notes(self, profile: ClusterConfig) -> list[str]:
        note = environment.address_space_note()
        return [note] if note else []

    def submit(self, request: JobRequest) -> list[Job]:
        lines = [*detach_lines(request.folder), *_after_lines(request), *_slot_lines(request), *request.setup]
        jobs = submit_all(_executor(request, lines), request.work, self.executor, "the job could not be started")
        here = socket.gethostname()
        return [replace(job, host=here, process_start=process_start(int(job.id))) for job in jobs]

    def states(self, jobs: Sequence[Job]) -> dict[str, JobState]:
        return {job.id: JobState(waiting=False, word="RUNNING") for job in jobs if _lives(job)}

    def signal(self, job: Job, name: str) -> None:
        """Send it to each rank; the controller itself would die of anything but TERM."""
        ranks = children(int(job.id)) if _lives(job) else []
        if not ranks:
            raise DispatchError(f"no rank of job {job.id} runs on this machine")
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[f"SIG{name}"])

    def cancel(self, jobs: Sequence[Job], *, now: bool = False, waiting_only: bool = False) -> None:
        if waiting_only:
            return  # all of them have started
        for job in jobs:
            if job.host not in (None, socket.gethostname()):
                raise DispatchError(f"job {job.id} runs on {job.host}: cancel it there")
        for job in jobs:
            if job.process_start is not None and job.process_start == process_start(int(job.id)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(job.id), signal.SIGKILL if now else signal.SIGTERM)

    def rank(self, environment: Mapping[str, str]) -> int | None:
        number = environment.get("SUBMITIT_LOCAL_GLOBALID", "")
        return int(number) if number.isdecimal() else None

    def checks(self) -> Sequence[tuple[str, Callable[[ClusterConfig], Iterable[Check]]]]:
        return (("this machine", self.check), ("setup lines", setup.check))

    def check(self, profile: ClusterConfig) -> Iterator[Check]:
        cores = len(os.sched_getaffinity(0))
        if shutil.which("flock") is None:
            found = "the command `flock` is missing; cells queue with it"
            yield Check(name="this machine", verdict=BROKEN, found=found, advice="install the package util-linux")
            return
        needed = profile.ranks_per_node * profile.cpus_per_rank
        found = f"{cores} cores; a cell takes {needed}, {cells_at_once(profile)} run at a time"
        advice = "" if needed <= cores else "lower cluster.ranks_per_node or cluster.cpus_per_rank"
        yield Check(name="this machine", verdict=OK if needed <= cores else WARNING, found=found, advice=advice)


def controller() -> int | None:
    """Process id of the controller of the local job that this process is a rank of; None elsewhere."""
    told = os.environ.get(CONTROLLER, "")
    return int(told) if told.isdecimal() and int(told) == os.getppid() else None


def cells_at_once(profile: ClusterConfig) -> int:
    """Cells that this machine has room for at a time: by cores, and by GPUs where cells use them."""
    by_cores = max(1, len(os.sched_getaffinity(0)) // (tasks_per_node(profile) * profile.cpus_per_rank))
    if not profile.gpu_count:
        return profile.parallel or by_cores
    by_gpus = len(visible_gpus()) // profile.gpu_count
    if by_gpus < max(1, profile.parallel):
        raise ConfigError(
            f"cluster.gpus={profile.gpu_count} with cluster.parallel={profile.parallel} needs more GPUs "
            f"than the {len(visible_gpus())} that this machine shows; use fewer, or cluster.gpus=0 for the CPU"
        )
    return profile.parallel or min(by_cores, by_gpus)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def detach_lines(folder: Path) -> list[str]:
    """A local job survives the command that submitted it and its terminal, and holds none of its pipes open."""
    log = shlex.quote(str(folder / "local_controller.log"))
    return ["trap '' HUP INT", f"exec </dev/null >>{log} 2>&1", f"bushpc_job=$$; export {CONTROLLER}=$$"]


def _after_lines(request: JobRequest) -> list[str]:
    """Wait until the jobs before it have ended, without taking a place on the machine."""
    return [f"while kill -0 {int(job_id)} 2>/dev/null; do sleep 0.5; done" for job_id in request.after]


def _slot_lines(request: JobRequest) -> list[str]:
    """Wait for a place on this machine; a report job takes none, as it waits for the cells that do."""
    return slot_lines(request.profile) if request.takes_place else []


def slot_lines(profile: ClusterConfig) -> list[str]:
    """Wait for one of the places that this machine has, and for its GPUs, before the job's clock starts.

    The lock is held on a descriptor of the job's shell, later its controller, so the kernel frees it when that ends.
    Raises: DispatchError where the folder of the locks does not belong to this user.
    """
    if shutil.which("flock") is None:
        raise DispatchError("cluster=local needs the command `flock` (package util-linux) to queue cells")
    folder = Path(tempfile.gettempdir()) / f"bushpc-slots-{os.getuid()}"  # of this machine, for all runs of a user
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_own_folder(folder):  # a link, or someone else's, could lead our locks anywhere
        raise DispatchError(
            f"{folder} is not a folder of yours (owner {folder.lstat().st_uid}, you are {os.getuid()}), and "
            "cells queue by locks in it. Move it away, or name another place with TMPDIR=FOLDER"
        )
    folder.chmod(0o700)
    gpus = profile.gpu_count
    visible = visible_gpus() if gpus else []
    places = []
    for i in range(cells_at_once(profile)):
        devices = ",".join(visible[i * gpus : (i + 1) * gpus])
        lock = shlex.quote(str(folder / str(i)))
        places.append(f"{{ exec 9>>{lock}; flock -n 9 && export CUDA_VISIBLE_DEVICES={devices}; }}")
    # Only the first of those that wait for the same places looks at them; the others sleep until it is their turn.
    turn = shlex.quote(str(folder / f"turn-{len(places)}-{gpus}"))
    return [f"exec 8>>{turn}", "flock 8", f"until {' || '.join(places)}; do sleep 0.5; done", "exec 8>&-"]


def job_script(lines: Sequence[str], jobs_dir: Path) -> str:
    """The shell's words: the lines, then the controller in the shell's place, so that the job's id is its id."""
    controller_command = shlex.join([sys.executable, "-m", "submitit.local._local", str(jobs_dir)])
    return " && ".join([*lines, f"exec {controller_command}"])


def _executor(request: JobRequest, lines: Sequence[str]) -> t.Any:
    """submitit's local executor, whose controller takes the place of the shell that starts it."""
    from submitit.local.local import LocalExecutor, LocalJob

    class Detached(LocalExecutor):
        def _submit_command(self, command: str) -> LocalJob[t.Any]:
            ranks = tasks_per_node(request.profile)
            words = {
                **environment.for_process(environment.JOB),
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_COMMAND": command,
                "SUBMITIT_LOCAL_NTASKS": str(ranks),
                "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * request.profile.time_min),
                "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
                "SUBMITIT_LOCAL_NODEID": "0",
                "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
                "SUBMITIT_STDERR_TO_STDOUT": "1",
                "SUBMITIT_LOCAL_WITH_SHELL": "",  # the controller's own process id names the job
                "CUDA_VISIBLE_DEVICES": "",
            }
            process = subprocess.Popen([setup.bash(), "-c", job_script(lines, Path(self.folder))], env=words)
            return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(ranks)))

    jobs = request.folder
    jobs.mkdir(parents=True, exist_ok=True)
    executor = Detached(folder=jobs / "%j")
    executor.update_parameters(**resources(request.profile))
    return executor


def _lives(job: Job) -> bool:
    if job.host != socket.gethostname():
        # Its processes cannot be seen from here; what they write can.
        signs = [Path(path) for path in (job.log, job.heartbeat) if path]
        last = max(job.submitted, *(path.stat().st_mtime for path in signs if path.exists()), 0.0)
        return time.time() - last < FOREIGN_HOST_S
    return job.process_start is not None and job.process_start == process_start(int(job.id))
