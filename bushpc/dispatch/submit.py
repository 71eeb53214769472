"""Cells → jobs, through submitit: arrays for all that is missing, and a report job that follows them.

    plan ─write_run→ run folder ─what is missing→ by resources, in parts that the site takes → arrays ─→ job.json each

What is in the queue is written down twice: before sbatch, as jobs/submitting-<id>.json, and after it, in each cell's
job.json. A command that is killed between the two leaves the first, and the next command finds the jobs by it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import typing as t
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bushpc.config import ClusterConfig
from bushpc.dispatch.come_back import shell_lines
from bushpc.dispatch.grid import Plan
from bushpc.dispatch.job import CellJob, ReportJob
from bushpc.dispatch.run_folder import alone_in, owner_of, snapshot, write_run
from bushpc.dispatch.status import CellStatus, job_states, read_status, report_is_current
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import is_own_folder, read_json, write_atomically
from bushpc.runs.goodput import read_note
from bushpc.runs.lease import process_start

if t.TYPE_CHECKING:
    import submitit


FOREIGN_PREFIXES = ("SLURM_", "SRUN_", "PMI", "SUBMITIT_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_")
FOREIGN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
# Tasks of one array, where Slurm does not say what it allows; its own default.
MAX_ARRAY_SIZE = 1001


class Submission(t.NamedTuple):
    """What one call of `submit` did: names of the cells, by what happened to them, and what to look out for.

    elsewhere: cell → the run that it belongs to, where that is another one: it is trained once for both.
    """

    run_dir: Path
    submitted: list[str]
    done: list[str]
    live: list[str]
    elsewhere: dict[str, str]
    warnings: list[str]


def submit(plan: Plan, command: Sequence[str]) -> Submission:
    """Submit those of `plan.wanted` that are neither done nor live, and a report job after them.

    The same call again is safe, whatever became of the jobs, or of the last call, meanwhile.
    Raises: ConfigError if the run folder holds a run with other settings; DispatchError if the cluster refuses; then
    what it had taken stays submitted, and the next call goes on with the rest.
    """
    run_dir, cluster = plan.first.run_dir, plan.first.cluster
    with alone_in([run_dir]):
        write_run(run_dir, plan, command)
        owners = {name: owner_of(run_dir, name) for name in plan.cells}
        with alone_in([owner for owner in owners.values() if owner != run_dir.resolve()]):
            for other in {run_dir.resolve(), *owners.values()}:  # whose submitter may have died as well
                adopt(other)
            status = read_status(run_dir)
            states = {cell.name: cell for cell in status.cells}
            done = [name for name in plan.wanted if states[name].state == "done"]
            live = [name for name in plan.wanted if states[name].live]
            missing = [name for name in plan.wanted if name not in {*done, *live}]
            if missing:
                queue_cells(run_dir, {name: plan.cells[name].cluster for name in _once_each(run_dir, missing)})
            if missing or live or not report_is_current(run_dir):
                _submit_report(run_dir, cluster, renew=bool(missing))
    return Submission(
        run_dir=run_dir,
        submitted=missing,
        done=done,
        live=live,
        elsewhere={name: owner.name for name, owner in owners.items() if owner != run_dir.resolve()},
        warnings=short_grace(run_dir, cluster) if missing else [],
    )


def _once_each(run_dir: Path, names: Sequence[str]) -> list[str]:
    """Without those that are the same cell as an earlier one: two rows may have the same settings."""
    return list({(run_dir / "cells" / name).resolve(): name for name in reversed(names)}.values())[::-1]


def short_grace(run_dir: Path, cluster: ClusterConfig) -> list[str]:
    """A line if a stop of this run may take longer, by what was last measured, than the site gives after a signal."""
    if cluster.grace_s is None:
        return []
    took = 0.0
    for folder in (run_dir / "cells").glob("*/checkpoints"):
        meta = read_note(max(folder.glob("step_*"), default=folder) / "meta.json")  # empty where it is damaged
        seconds = meta.get("stop_s")
        took = max(took, seconds if isinstance(seconds, (int, float)) else 0.0)
    if took <= cluster.grace_s:
        return []
    return [
        f"to stop may take {took:.1f} s (a step, a write under way and a save), and cluster.grace_s="
        f"{cluster.grace_s:g}: a stop signal may lose the steps since the last save, so there will be more saves than "
        "train.save_every asks for. A longer GraceTime of the partition, more ranks or a faster runs_dir would help"
    ]


def adopt(run_dir: Path) -> None:
    """Find the jobs of a submission that was killed before it had noted them with their cells; under the lock."""
    for path in sorted((run_dir / "jobs").glob("submitting-*.json")):
        intent = read_note(path)
        if intent:
            for job_id in _array_tasks(intent["job_name"]):
                number = int(job_id.rpartition("_")[2]) if "_" in job_id else 0
                folder = run_dir / "jobs" / job_id
                if any(folder.glob("*_submitted.pkl")):
                    _note_jobs(run_dir, intent, number, job_id, folder)
                else:  # it was not told yet what to run
                    subprocess.run(["scancel", job_id], check=False, capture_output=True, timeout=60)
        path.unlink()


def _array_tasks(job_name: str) -> list[str]:
    """Ids of the jobs of this name that are in Slurm's queue."""
    command = ["squeue", "--noheader", "--array", "--me", f"--name={job_name}", "--format=%i"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or error
        raise DispatchError(
            f"a submission was killed, and Slurm does not tell which of its jobs it has taken ({detail}); try again"
        ) from error


def queue_cells(run_dir: Path, clusters: Mapping[str, ClusterConfig]) -> None:
    """Submit cells of a written run: those of the same resources in one array, or several where arrays are limited.

    clusters: cell → its resources. Raises: DispatchError if the cluster refuses.
    """
    by_cluster: dict[ClusterConfig, list[str]] = {}
    for name, cluster in clusters.items():
        by_cluster.setdefault(cluster, []).append(name)
    for cluster, group in by_cluster.items():
        after = None
        packs = [group[i : i + cluster.cells_per_job] for i in range(0, len(group), cluster.cells_per_job)]
        at_once = max_array_size() if cluster.executor == "slurm" else len(packs)
        for i in range(0, len(packs), at_once):
            # One array after the other, where so many cells may run at a time and not twice as many.
            after = _submit_array(run_dir, packs[i : i + at_once], cluster, after if cluster.parallel else None)


def _submit_array(run_dir: Path, packs: Sequence[Sequence[str]], cluster: ClusterConfig, after: str | None) -> str:
    """Submit one job per pack of cells. Returns the array's id."""
    submission, packed = uuid.uuid4().hex, cluster.cells_per_job > 1
    intent: dict[str, t.Any] = {
        "job_name": f"{run_dir.name}-{submission[:8]}",
        "packs": [list(pack) for pack in packs],
        "packed": packed,
        "executor": cluster.executor,
        "submitted": time.time(),
        "code": snapshot(run_dir).name,
    }
    executor = executor_for(run_dir, cluster, intent["job_name"])
    if cluster.executor == "local":
        slot = _take_slot(cluster)
        executor.update_parameters(local_setup=[*_detach(run_dir), *slot, *_environment(run_dir, cluster)])
    else:
        # A local job is this command's child, and is noted at once; Slurm's may be there when this command is not.
        write_atomically(run_dir / "jobs" / f"submitting-{submission}.json", json.dumps(intent))
    if after:
        executor.update_parameters(slurm_dependency=f"afterany:{after}")
    work = [CellJob(run_dir=str(run_dir), cells=tuple(pack), packed=packed, submission=submission) for pack in packs]
    with _without_failures(run_dir, [name for pack in packs for name in pack]):
        jobs = submit_work(executor, work)
    for number, job in enumerate(jobs):
        more = _process_note(job.job_id) if cluster.executor == "local" else {}
        _note_jobs(run_dir, intent | more, number, job.job_id, job.paths.folder)
    (run_dir / "jobs" / f"submitting-{submission}.json").unlink(missing_ok=True)
    return jobs[0].job_id.partition("_")[0]


@contextlib.contextmanager
def _without_failures(run_dir: Path, names: Sequence[str]) -> Iterator[None]:
    """Forget why cells failed, as they are tried again; not where the cluster refuses them."""
    paths = [run_dir / "cells" / name / "FAILED" for name in names]
    texts = {path: path.read_text() for path in paths if path.exists()}
    for path in texts:
        path.unlink()
    try:
        yield
    except DispatchError:
        for path, text in texts.items():
            write_atomically(path, text)
        raise


def _note_jobs(run_dir: Path, intent: Mapping[str, t.Any], number: int, job_id: str, folder: Path) -> None:
    """Write which job works on each cell of a pack, and the log of its task."""
    names = ("executor", "submitted", "code", "packed", "process_start", "host")
    kept = {key: intent[key] for key in names if key in intent}
    for task, name in enumerate(intent["packs"][number]):
        note = {**kept, "job_id": job_id, "log": str(folder / f"{job_id}_{task}_log.out")}
        write_atomically(run_dir / "cells" / name / "job.json", json.dumps(note))


def max_array_size() -> int:
    """Tasks that Slurm allows in one array."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", "config"]
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        for line in told.splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "MaxArraySize" and value.strip().isdecimal():
                return max(1, int(value))
    return MAX_ARRAY_SIZE


def _submit_report(run_dir: Path, cluster: ClusterConfig, renew: bool) -> None:
    """One report job after every live cell. Slurm holds it back; on one machine it waits for the cells itself.

    renew: there are new jobs, which a report job that is queued already does not wait for.
    """
    old = read_json(run_dir / "jobs" / "report.json")
    if old and old["job_id"] in job_states([old]):
        if cluster.executor == "local" or not renew:
            return  # a local one watches the cells' states, the new jobs' included
        _cancel_pending(old["job_id"])
    # Slurm can wait for its own jobs only, and a cell of `bushpc train` may be none.
    on_slurm = cluster.executor == "slurm"
    live = [cell for cell in read_status(run_dir).cells if cell.live and cell.local != on_slurm]
    minutes = cluster.report_time_min
    small = dataclasses.replace(
        cluster,
        nodes=1,
        ranks_per_node=1,
        cells_per_job=1,
        gpus_per_node=0,
        cpus_per_rank=1,
        mem_gb=cluster.mem_gb and min(cluster.mem_gb, 8),
        time_min=minutes if on_slurm else minutes + cluster.time_min * max(1, len(live)),
    )
    executor = executor_for(run_dir, small, f"{run_dir.name}-report")
    if cluster.executor == "local":
        executor.update_parameters(local_setup=[*_detach(run_dir), *_environment(run_dir, small)])
    elif live:
        executor.update_parameters(slurm_dependency="afterany:" + ":".join(_waited_for(live)))
    [job] = submit_work(executor, [ReportJob(run_dir=str(run_dir), wait=cluster.executor == "local")])
    note = {"executor": cluster.executor, "job_id": job.job_id, "submitted": time.time(), "log": str(job.paths.stdout)}
    more = _process_note(job.job_id) if cluster.executor == "local" else {}
    write_atomically(run_dir / "jobs" / "report.json", json.dumps(note | more))


def _waited_for(live: Sequence[CellStatus]) -> list[str]:
    """Jobs and whole arrays: a dependency on a thousand tasks one by one is more than sbatch takes."""
    return list(dict.fromkeys(cell.job_id.partition("_")[0] for cell in live))


def executor_for(run_dir: Path, cluster: ClusterConfig, name: str) -> submitit.AutoExecutor:
    """submitit's executor with the cluster's resources, in the form that every job of ours has.

    Raises: DispatchError where the cluster's commands are not there.
    """
    import submitit

    jobs = run_dir / "jobs"
    jobs.mkdir(exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=jobs / "%j", cluster=cluster.executor)
    except RuntimeError as error:
        way_out = "Run this on a login node, or use cluster=local"
        raise DispatchError(f"cluster={cluster.executor}: {error} {way_out}") from error
    executor.update_parameters(
        name=name,
        timeout_min=cluster.time_min,
        nodes=cluster.nodes,
        tasks_per_node=_tasks(cluster),
        cpus_per_task=cluster.cpus_per_rank,
        gpus_per_node=cluster.gpus_per_node or None,
        mem_gb=cluster.mem_gb,
        stderr_to_stdout=True,
        slurm_setup=[*_environment(run_dir, cluster), *shell_lines(run_dir)],
        slurm_partition=cluster.partition,
        slurm_account=cluster.account,
        slurm_qos=cluster.qos,
        slurm_constraint=cluster.constraint,
        slurm_array_parallelism=cluster.parallel or None,
        # Slurm itself tells the ranks, to the minute; never so early that a short job would do nothing else.
        slurm_signal_delay_s=min(cluster.stop_lead_s, cluster.time_min * 60 // 2),
        # Where the site sets JobRequeue=0, a job comes back only if it asks for it.
        slurm_additional_parameters={"requeue": True},
        # A rank that dies ends the others, which would wait for it in a collective; cells that share a job do not.
        slurm_srun_args=[f"--kill-on-bad-exit={int(cluster.cells_per_job == 1)}"],
    )
    return executor


def _environment(run_dir: Path, cluster: ClusterConfig) -> list[str]:
    """Shell lines before the ranks. Paths are quoted; of what a user typed only `cluster.setup` is meant to run."""
    return [
        *cluster.setup,
        # `python -m` looks into the current folder first, and users submit from the clone: its package would win.
        f"cd {shlex.quote(str(run_dir))}",
        f'export PYTHONPATH={shlex.quote(str(snapshot(run_dir)))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"export OMP_NUM_THREADS={cluster.cpus_per_rank}",
    ]


def _detach(run_dir: Path) -> list[str]:
    """First of a local job's lines: it outlives the command that submitted it, and hears what is sent to its id.

    submitit appends its controller, which hands TERM on to the ranks, as the last command of this shell, whose process
    is the job's id. A shell would die of TERM and leave both behind, so it reads its own words again, with `exec`
    before the controller: then this process is the controller.
    """
    log = shlex.quote(str(run_dir / "jobs" / "local_controller.log"))
    controller = f"{shlex.join([sys.executable, '-m', 'submitit.local._local'])} "
    again = (
        f"export SUBMITIT_LOCAL_WITH_SHELL=; last={shlex.quote(controller)}; "
        r"words=$(tr '\0' '\n' </proc/$$/cmdline | sed 1,2d); "  # after `/bin/sh` and `-c`
        'exec /bin/sh -c "${words%"$last"*}exec $last${words##*"$last"}"'
    )
    # The variable, submitit's own, tells the controller whose id the job's is, and us which reading this is.
    once = f'{{ [ -z "$SUBMITIT_LOCAL_WITH_SHELL" ] || {{ {again}; }}; }}'
    return ["trap '' HUP INT", f"exec </dev/null >>{log} 2>&1", once]


def _take_slot(cluster: ClusterConfig) -> list[str]:
    """Wait for one of the places that this machine has, and for its GPUs, before the job's clock starts.

    The lock is held on a descriptor of the job's shell, later its controller, so the kernel frees it when that ends.
    Raises: DispatchError where the folder of the locks is not this user's own.
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
    gpus = cluster.gpus_per_node
    visible = visible_gpus() if gpus else []
    places = []
    for i in range(local_parallel(cluster)):
        devices = ",".join(visible[i * gpus : (i + 1) * gpus])
        lock = shlex.quote(str(folder / str(i)))
        places.append(f"{{ exec 9>>{lock}; flock -n 9 && export CUDA_VISIBLE_DEVICES={devices}; }}")
    return [f"until {' || '.join(places)}; do sleep 0.5; done"]


def submit_work(executor: submitit.AutoExecutor, work: Sequence[t.Callable[[], t.Any]]) -> list[submitit.Job[t.Any]]:
    """Submit callables: one array, or a plain job for one. Raises: DispatchError if the cluster refuses."""
    with clean_environment():
        try:
            with executor.batch():
                return [executor.submit(callable_) for callable_ in work]
        except Exception as error:  # submitit raises its own, subprocess's and plain exceptions alike
            raise DispatchError(f"the cluster refused the job: {error}") from error


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Without the variables of a job or launcher that we may be running in: the new job would take them for its own.

    SBATCH_* stays: a job does not set it, users and sites do.
    """
    kept = dict(os.environ)
    for name in kept:
        if (name.startswith(FOREIGN_PREFIXES) and name != "SLURM_CONF") or name in FOREIGN_NAMES:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _process_note(job_id: str) -> dict[str, t.Any]:
    """What tells a local job, whose id is that of its process, from a later process."""
    return {"process_start": process_start(int(job_id)), "host": socket.gethostname()}


def local_parallel(cluster: ClusterConfig) -> int:
    """Cells that fit on this machine side by side: by cores, and by GPUs where cells use them."""
    by_cores = max(1, len(os.sched_getaffinity(0)) // (_tasks(cluster) * cluster.cpus_per_rank))
    if not cluster.gpus_per_node:
        return cluster.parallel or by_cores
    by_gpus = len(visible_gpus()) // cluster.gpus_per_node
    if by_gpus < max(1, cluster.parallel):
        raise ConfigError(
            f"cluster.gpus_per_node={cluster.gpus_per_node} with cluster.parallel={cluster.parallel} needs more GPUs "
            f"than the {len(visible_gpus())} that this machine shows; use fewer, or cluster.gpus_per_node=0 for the CPU"
        )
    return cluster.parallel or min(by_cores, by_gpus)


def _tasks(cluster: ClusterConfig) -> int:
    """Tasks of a job on each of its nodes."""
    return cluster.ranks_per_node * cluster.cells_per_job


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _cancel_pending(job_id: str) -> None:
    subprocess.run(["scancel", "--state=PENDING", job_id], check=False, capture_output=True, timeout=60)
