"""Cells → jobs, through submitit: one array for all that is missing, and a report job that follows it.

runs/<name>/
  run.json        what this run is: cells and their hashes, data, folds, versions, command
  folds.csv       the folds it uses, whatever becomes of the dataset's own
  cells/<cell>/   see bushpc.run; job.json there names the job that works on it
  code/<hash>/    the package as it was at submission; jobs import it from there
  jobs/           submitit's scripts, pickles and logs
  report/         see bushpc.report
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import typing as t
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import bushpc
from bushpc.config import ROOT, CellConfig, ClusterConfig, differences
from bushpc.dispatch.job import CellJob, ReportJob
from bushpc.dispatch.status import job_states, process_start, read_status
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import read_json, sha256_of, write_atomically
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import find_folds

if t.TYPE_CHECKING:
    import submitit


class Submission(t.NamedTuple):
    """What one call of `submit` did: names of the cells, by what happened to them."""

    run_dir: Path
    submitted: list[str]
    done: list[str]
    live: list[str]


def submit(cells: Mapping[str, CellConfig], command: Sequence[str]) -> Submission:
    """Submit the cells that are neither done nor live, and a report job after them; the same call again is safe.

    Raises: ConfigError if the run folder holds a run with other settings; DispatchError if the cluster refuses.
    """
    first = next(iter(cells.values()))
    run_dir = Path(first.runs_dir) / t.cast(str, first.name)
    with _locked(run_dir):
        _write_run(run_dir, cells, command)
        states = {cell.name: cell for cell in read_status(run_dir).cells}
        done = [name for name in cells if states[name].state == "done"]
        live = [name for name in cells if states[name].live]
        missing = [name for name in cells if name not in done and name not in live]
        if missing:
            _submit_cells(run_dir, missing, first.cluster)
        if missing or (not live and not (run_dir / "report" / "index.html").exists()):
            _submit_report(run_dir, first.cluster)
    return Submission(run_dir=run_dir, submitted=missing, done=done, live=live)


def _write_run(run_dir: Path, cells: Mapping[str, CellConfig], command: Sequence[str]) -> None:
    """Create the run directory, or check that the one that is there is this run."""
    known = read_json(run_dir / "run.json")
    first = next(iter(cells.values()))
    folder = first.data.folder
    manifest = Manifest.load(folder)
    folds_file = find_folds(manifest, folder, first.folds)
    facts: dict[str, t.Any] = {
        "manifest_sha256": manifest.hash,
        "folds": {"source": first.folds, "sha256": sha256_of(folds_file)},
    }
    if known:
        for key, value in facts.items():
            if known[key] != value:
                raise ConfigError(
                    f"{run_dir} was started on other data: {key} was {known[key]}, now {value}. Choose another name=…, "
                    "or restore the shards and folds it was started with"
                )
    write_atomically(run_dir / "folds.csv", folds_file.read_bytes())
    for name, cell in cells.items():
        path = run_dir / "cells" / name / "config.yaml"
        if path.exists():
            changed = differences(CellConfig.load(path), cell)
            if changed:
                raise ConfigError(
                    f"{run_dir} holds a run with other settings: {'; '.join(changed)}. Choose another name=…"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, cell.to_yaml())
    listed: dict[str, t.Any] = {cell["name"]: cell for cell in (known or {}).get("cells", [])}
    listed |= {name: {"name": name, "fold": cell.fold, "hash": cell.hash} for name, cell in cells.items()}
    run = {
        "name": first.name,
        "kind": "cv",
        "created": (known or {}).get("created") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "command": list(command),
        "model": first.choices["model"],
        "data": first.data.name,
        "prompts": first.prompt_sources[0],
        "shards": str(folder),
        **facts,
        "versions": _versions(),
        "cells": sorted(listed.values(), key=lambda cell: cell["fold"]),
    }
    write_atomically(run_dir / "run.json", json.dumps(run, indent=1))


def _submit_cells(run_dir: Path, names: Sequence[str], cluster: ClusterConfig) -> None:
    submission = uuid.uuid4().hex
    executor = _executor(run_dir, cluster, f"{run_dir.name}")
    slots = local_parallel(cluster) if cluster.executor == "local" else 0
    for name in names:
        (run_dir / "cells" / name / "FAILED").unlink(missing_ok=True)
    submitted = time.time()
    work = [CellJob(run_dir=str(run_dir), cell=name, submission=submission, slots=slots) for name in names]
    for name, job in zip(names, _submit(executor, work), strict=True):
        write_atomically(run_dir / "cells" / name / "job.json", json.dumps(_job_note(job, cluster, submitted)))


def _submit_report(run_dir: Path, cluster: ClusterConfig) -> None:
    """One report job after every live cell. Slurm holds it back; on one machine it waits for the cells itself."""
    live = [cell.job_id for cell in read_status(run_dir).cells if cell.live]
    old = read_json(run_dir / "jobs" / "report.json")
    if old and job_states([old]):
        if cluster.executor == "local":
            return  # it watches the cells' states, the new jobs included
        _cancel_pending(old["job_id"])  # it depends on the old jobs only
    executor = _executor(run_dir, cluster, f"{run_dir.name}-report", dependency=live, small=True)
    [job] = _submit(executor, [ReportJob(run_dir=str(run_dir), wait=cluster.executor == "local")])
    write_atomically(run_dir / "jobs" / "report.json", json.dumps(_job_note(job, cluster, time.time())))


def _executor(
    run_dir: Path, cluster: ClusterConfig, name: str, dependency: Sequence[str] = (), small: bool = False
) -> submitit.AutoExecutor:
    import submitit

    jobs = run_dir / "jobs"
    jobs.mkdir(exist_ok=True)
    # Paths go to a shell in these lines, so they are quoted; nothing else that a user typed gets here but `setup`.
    setup = [
        *cluster.setup,
        f"export PYTHONPATH={shlex.quote(str(_snapshot(run_dir)))}",
        f"export OMP_NUM_THREADS={cluster.cpus_per_rank}",
    ]
    try:
        executor = submitit.AutoExecutor(folder=jobs / "%j", cluster=cluster.executor)
    except RuntimeError as error:
        raise DispatchError(
            f"cluster={cluster.executor}: {error} Run this on a login node, or use cluster=local"
        ) from error
    executor.update_parameters(
        name=name,
        timeout_min=cluster.time_min,
        nodes=1 if small else cluster.nodes,
        tasks_per_node=1 if small else cluster.ranks_per_node,
        cpus_per_task=1 if small else cluster.cpus_per_rank,
        gpus_per_node=None if small or not cluster.gpus_per_node else cluster.gpus_per_node,
        mem_gb=4 if small and cluster.mem_gb else cluster.mem_gb,
        stderr_to_stdout=True,
    )
    if cluster.executor == "local":
        # The job outlives this command, its terminal and its pipes.
        log = shlex.quote(str(jobs / "local_controller.log"))
        executor.update_parameters(local_setup=[*setup, "trap '' HUP INT", f"exec </dev/null >>{log} 2>&1"])
        return executor
    executor.update_parameters(
        slurm_setup=setup,
        slurm_partition=cluster.partition,
        slurm_account=cluster.account,
        slurm_qos=cluster.qos,
        slurm_constraint=cluster.constraint,
        slurm_dependency="afterany:" + ":".join(dependency) if dependency else None,
        slurm_array_parallelism=cluster.parallel or None,
    )
    return executor


def _submit(executor: submitit.AutoExecutor, work: Sequence[t.Callable[[], t.Any]]) -> list[submitit.Job[t.Any]]:
    with _clean_environment():
        try:
            with executor.batch():
                return [executor.submit(callable_) for callable_ in work]
        except Exception as error:  # submitit raises its own, subprocess's and plain exceptions alike
            raise DispatchError(f"the cluster refused the job: {error}") from error


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Without the variables of a job that we may be running in: sbatch would take its limits for the new job."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI", "SUBMITIT_")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _job_note(job: submitit.Job[t.Any], cluster: ClusterConfig, submitted: float) -> dict[str, t.Any]:
    note = {"executor": cluster.executor, "job_id": job.job_id, "submitted": submitted, "log": str(job.paths.stdout)}
    if cluster.executor == "local":
        note["process_start"] = process_start(int(job.job_id))
    return note


def _snapshot(run_dir: Path) -> Path:
    """Copy the package into the run, once per content, so that editing code never changes a queued job."""
    package = Path(bushpc.__file__).parent
    files = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    listing = "".join(f"{path.relative_to(package)} {sha256_of(path)}\n" for path in files)
    target = run_dir / "code" / hashlib.sha256(listing.encode()).hexdigest()[:12]
    if not target.exists():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(package, aside / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        aside.rename(target)
    return target


def local_parallel(cluster: ClusterConfig) -> int:
    """Cells that fit on this machine side by side: by cores, and by GPUs where cells use them."""
    if cluster.parallel:
        return cluster.parallel
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (cluster.ranks_per_node * cluster.cpus_per_rank))


def _cancel_pending(job_id: str) -> None:
    subprocess.run(["scancel", "--state=PENDING", job_id], check=False, capture_output=True, timeout=60)


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """One submit at a time per run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".submit.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DispatchError(
                f"another command is submitting {run_dir} right now; wait for it and try again"
            ) from None
        yield


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
