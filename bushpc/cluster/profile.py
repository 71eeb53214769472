"""What a site's profile (ClusterConfig) means for a job: its resources, its shell lines, how cells are shared out."""

from __future__ import annotations

import dataclasses
import shlex
import typing as t
from collections.abc import Mapping
from pathlib import Path

from bushpc import environment
from bushpc.cluster import setup

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig
    from bushpc.config.fields import Options

# The report job reads CSV files and draws figures.
REPORT_GB = 8


def tasks_per_node(profile: ClusterConfig) -> int:
    """Processes of a job on each of its nodes."""
    return profile.ranks_per_node * profile.cells_per_job


def resources(profile: ClusterConfig) -> dict[str, t.Any]:
    """submitit's parameters that every backend shares."""
    return {
        "timeout_min": profile.time_min,
        "nodes": profile.nodes,
        "tasks_per_node": tasks_per_node(profile),
        "stderr_to_stdout": True,
    }


def shell_lines(profile: ClusterConfig, run_dir: Path, code: Path) -> list[str]:
    """Shell lines before the ranks. Paths are quoted; of what a user typed only `cluster.setup` is meant to run."""
    return [
        *setup.guarded(profile.setup, run_dir / "jobs"),
        *environment.shell_lines(),
        # `python -m` looks into the current folder first, and users submit from the clone: its package would win.
        f"cd {shlex.quote(str(run_dir))}",
        f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"export OMP_NUM_THREADS={profile.cpus_per_rank}",
    ]


def packs_by_profile(profiles: Mapping[str, ClusterConfig]) -> dict[ClusterConfig, list[list[str]]]:
    """Cell → its profile, as profile → packs of cells that share a job."""
    by_profile: dict[ClusterConfig, list[str]] = {}
    for name, profile in profiles.items():
        by_profile.setdefault(profile, []).append(name)
    return {
        profile: [list(names[i : i + profile.cells_per_job]) for i in range(0, len(names), profile.cells_per_job)]
        for profile, names in by_profile.items()
    }


def report_profile(profile: ClusterConfig, minutes_to_wait: int = 0) -> ClusterConfig:
    """The small job that writes the report: one process without a GPU. minutes_to_wait: for the cells, in the job."""
    return cpu_profile(profile, time_min=profile.report_time_min + minutes_to_wait)


def cpu_profile(profile: ClusterConfig, *, time_min: int, cores: int = 1) -> ClusterConfig:
    """A job of one process without a GPU: `cpu_jobs` says where it goes. What the cells ask for GPUs is left out."""
    theirs = profile.cpu_jobs
    most = theirs.mem_gb
    if most is None and profile.mem_gb is not None:
        # An amount per GPU says nothing here, and nobody needs all memory of a node.
        most = min(profile.mem_gb, REPORT_GB) if profile.mem_gb and profile.mem_per == "node" else REPORT_GB
    return dataclasses.replace(
        profile,
        nodes=1,
        ranks_per_node=1,
        cells_per_job=1,
        gpus=0,
        cpus_per_rank=cores,
        mem_gb=most or None,
        mem_per="node",
        exclusive=False,
        gres=(),
        staging=None,
        time_min=time_min,
        sbatch=_without_gpus(profile.sbatch) | theirs.sbatch,
        srun=_without_gpus(profile.srun),
        **{
            name: getattr(profile if getattr(theirs, name) is None else theirs, name)
            for name in ("partition", "account", "qos", "constraint")
        },
    )


def _without_gpus(options: Options) -> Options:
    """Without those that are about GPUs, such as gpu-bind."""
    return type(options)({name: value for name, value in options.items() if "gpu" not in name})


def stop_lead_s(profile: ClusterConfig) -> int:
    """Seconds before the time limit at which ranks are told; never so early that a short job would do nothing else."""
    return min(profile.stop_lead_s, profile.time_min * 60 // 2)
