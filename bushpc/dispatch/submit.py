"""Cells → jobs, through submitit: one array for all that is missing, and a report job that follows it.

runs/<name>/
  run.json        what this run is: cells and their hashes, data, folds, versions, command
  folds.csv       the folds it uses, whatever becomes of the dataset's own
  cells/<cell>/   see bushpc.run; job.json there names the job that works on it
  code/<hash>/    package and configs as they were at submission; jobs import them from there
  jobs/           submitit's scripts, pickles and logs
  report/         see bushpc.report
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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

import bushpc
from bushpc.config import CONFIG_DIR, ROOT, CellConfig, ClusterConfig, differences, way_on
from bushpc.dispatch.come_back import shell_lines
from bushpc.dispatch.job import CellJob, ReportJob
from bushpc.dispatch.status import job_states, read_status, report_is_current
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import exclusive, is_own_folder, read_json, sha256_of, write_atomically
from bushpc.goodput import read_note
from bushpc.lease import process_start
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import find_folds

if t.TYPE_CHECKING:
    import submitit


FOREIGN_PREFIXES = ("SLURM_", "SRUN_", "PMI", "SUBMITIT_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_")
FOREIGN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class Submission(t.NamedTuple):
    """What one call of `submit` did: names of the cells, by what happened to them, and what to look out for."""

    run_dir: Path
    submitted: list[str]
    done: list[str]
    live: list[str]
    warnings: list[str]


def submit(cells: Mapping[str, CellConfig], command: Sequence[str], only: Sequence[str] | None = None) -> Submission:
    """Submit the cells that are neither done nor live, and a report job after them; the same call again is safe.

    only: submit just these; the run is made of all of `cells` nevertheless, and is complete when all are done.
    Raises: ConfigError if the run folder holds a run with other settings; DispatchError if the cluster refuses.
    """
    first = next(iter(cells.values()))
    run_dir = first.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(run_dir / ".submit.lock") as alone:
        if not alone:
            raise DispatchError(f"another command is submitting {run_dir}; wait for it and try again")
        write_run(run_dir, cells, command)
        states = {cell.name: cell for cell in read_status(run_dir).cells}
        wanted = list(cells) if only is None else list(only)
        done = [name for name in wanted if states[name].state == "done"]
        live = [name for name in wanted if states[name].live]
        missing = [name for name in wanted if name not in done and name not in live]
        if missing:
            _submit_cells(run_dir, missing, first.cluster)
        if missing or live or not report_is_current(run_dir):
            _submit_report(run_dir, first.cluster, renew=bool(missing))
    warnings = short_grace(run_dir, first.cluster) if missing else []
    return Submission(run_dir=run_dir, submitted=missing, done=done, live=live, warnings=warnings)


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


def write_run(run_dir: Path, cells: Mapping[str, CellConfig], command: Sequence[str]) -> None:
    """Create the run directory, or check that the one that is there is this run. Call it under `.submit.lock`.

    Raises: ConfigError when it was started on other data or with other settings.
    """
    known = read_json(run_dir / "run.json") or {}
    first = next(iter(cells.values()))
    folder = first.data.folder
    manifest = Manifest.load(folder)
    folds_file = find_folds(manifest, folder, first.folds)
    facts: dict[str, t.Any] = {
        "manifest_sha256": manifest.hash,
        "folds": {"source": first.folds, "sha256": sha256_of(folds_file)},
    }
    for key, value in facts.items():
        if known and known[key] != value:
            raise ConfigError(
                f"{run_dir} was started on other data: {key} was {known[key]}, now {value}. Choose another name=…, "
                "or restore the shards and folds it was started with"
            )
    edited = []
    for name, cell in cells.items():
        path = run_dir / "cells" / name / "config.yaml"
        before = CellConfig.load(path) if path.exists() else cell
        changed = differences(before, cell)
        if changed:
            names = [line.partition(":")[0] for line in changed]
            raise ConfigError(f"{run_dir} has other settings: {'; '.join(changed)}; {way_on(names)}")
        if before.hash != cell.hash:
            edited.append(name)
    running = [cell.name for cell in read_status(run_dir).cells if cell.live and cell.name in edited] if edited else []
    if running:
        raise ConfigError(f"{', '.join(running)} of {run_dir} are running with other settings: cancel them first")
    for name, cell in cells.items():
        folder_of_cell = run_dir / "cells" / name
        folder_of_cell.mkdir(parents=True, exist_ok=True)
        if name in edited:
            (folder_of_cell / "DONE").unlink(missing_ok=True)
        write_atomically(folder_of_cell / "config.yaml", cell.to_yaml())
    write_atomically(run_dir / "folds.csv", folds_file.read_bytes())
    now = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "code": _snapshot(run_dir).name,
        "command": list(command),
        "versions": _versions(),
    }
    run = {
        "name": first.name,
        "kind": "cv",
        "created": known.get("created", now["time"]),
        "commit": now["commit"],
        "command": now["command"],
        "model": first.choices["model"],
        "data": first.data.name,
        "excerpt": manifest.excerpt,
        "prompts": first.prompt_sources[0],
        "shards": str(folder),
        **facts,
        "versions": now["versions"],
        "submissions": [*known.get("submissions", []), now],
        "cells": [{"name": name, "fold": cell.fold, "hash": cell.hash} for name, cell in cells.items()],
    }
    write_atomically(run_dir / "run.json", json.dumps(run, indent=1))


def _submit_cells(run_dir: Path, names: Sequence[str], cluster: ClusterConfig) -> None:
    executor = executor_for(run_dir, cluster, run_dir.name)
    if cluster.executor == "local":
        slot = _take_slot(cluster)
        executor.update_parameters(local_setup=[*_detach(run_dir), *slot, *_environment(run_dir, cluster)])
    for name in names:
        (run_dir / "cells" / name / "FAILED").unlink(missing_ok=True)
    submission, submitted, code = uuid.uuid4().hex, time.time(), _snapshot(run_dir).name
    work = [CellJob(run_dir=str(run_dir), cell=name, submission=submission) for name in names]
    for name, job in zip(names, submit_work(executor, work), strict=True):
        note = _job_note(job, cluster, submitted) | {"code": code}
        write_atomically(run_dir / "cells" / name / "job.json", json.dumps(note))


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
    live = [cell.job_id for cell in read_status(run_dir).cells if cell.live and cell.local != on_slurm]
    minutes = cluster.report_time_min
    small = dataclasses.replace(
        cluster,
        nodes=1,
        ranks_per_node=1,
        gpus_per_node=0,
        cpus_per_rank=1,
        mem_gb=cluster.mem_gb and min(cluster.mem_gb, 8),
        time_min=minutes if on_slurm else minutes + cluster.time_min * max(1, len(live)),
    )
    executor = executor_for(run_dir, small, f"{run_dir.name}-report")
    if cluster.executor == "local":
        executor.update_parameters(local_setup=[*_detach(run_dir), *_environment(run_dir, small)])
    elif live:
        executor.update_parameters(slurm_dependency="afterany:" + ":".join(live))
    [job] = submit_work(executor, [ReportJob(run_dir=str(run_dir), wait=cluster.executor == "local")])
    write_atomically(run_dir / "jobs" / "report.json", json.dumps(_job_note(job, cluster, time.time())))


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
        tasks_per_node=cluster.ranks_per_node,
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
        # A rank that dies ends the others, which would wait for it in a collective.
        slurm_srun_args=["--kill-on-bad-exit=1"],
    )
    return executor


def _environment(run_dir: Path, cluster: ClusterConfig) -> list[str]:
    """Shell lines before the ranks. Paths are quoted; of what a user typed only `cluster.setup` is meant to run."""
    return [
        *cluster.setup,
        # `python -m` looks into the current folder first, and users submit from the clone: its package would win.
        f"cd {shlex.quote(str(run_dir))}",
        f'export PYTHONPATH={shlex.quote(str(_snapshot(run_dir)))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
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


def _job_note(job: submitit.Job[t.Any], cluster: ClusterConfig, submitted: float) -> dict[str, t.Any]:
    note = {"executor": cluster.executor, "job_id": job.job_id, "submitted": submitted, "log": str(job.paths.stdout)}
    if cluster.executor == "local":
        note |= {"process_start": process_start(int(job.job_id)), "host": socket.gethostname()}
    return note


def _snapshot(run_dir: Path) -> Path:
    """Copy package and configs into the run, once per content, so that editing never changes a queued job."""
    folders = (Path(bushpc.__file__).parent, CONFIG_DIR)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    kept = [path for path in files if "__pycache__" not in path.parts]
    listing = "".join(f"{path.relative_to(ROOT)} {sha256_of(path)}\n" for path in kept)
    target = run_dir / "code" / hashlib.sha256(listing.encode()).hexdigest()[:12]
    if not target.exists():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        for folder in folders:
            shutil.copytree(folder, aside / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        aside.rename(target)
    return target


def local_parallel(cluster: ClusterConfig) -> int:
    """Cells that fit on this machine side by side: by cores, and by GPUs where cells use them."""
    by_cores = max(1, len(os.sched_getaffinity(0)) // (cluster.ranks_per_node * cluster.cpus_per_rank))
    if not cluster.gpus_per_node:
        return cluster.parallel or by_cores
    by_gpus = len(visible_gpus()) // cluster.gpus_per_node
    if by_gpus < max(1, cluster.parallel):
        raise ConfigError(
            f"cluster.gpus_per_node={cluster.gpus_per_node} with cluster.parallel={cluster.parallel} needs more GPUs "
            f"than the {len(visible_gpus())} that this machine shows; use fewer, or cluster.gpus_per_node=0 for the CPU"
        )
    return cluster.parallel or min(by_cores, by_gpus)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _cancel_pending(job_id: str) -> None:
    subprocess.run(["scancel", "--state=PENDING", job_id], check=False, capture_output=True, timeout=60)


def _commit() -> str | None:
    """The checkout's commit, with +changes when the tree differs from it; None outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return head.stdout.strip() + ("+changes" if dirty.strip() else "")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("bushpc", "torch", "accelerate", "deepspeed", "timm", "open_clip_torch", "submitit"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
