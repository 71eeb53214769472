"""Environment variables that Slurm's commands read: which of them count, and which are removed.

SBATCH_* variables beat the options in a job's script, so one from a login profile would silently replace what the
cluster profile says. Where the profile says nothing, the variable is written into the profile instead: sites recommend
SBATCH_ACCOUNT and SBATCH_PARTITION in login profiles. Variables that filter the answers of squeue and the like never
count: a job that they hide would be taken for one that has ended, and submitted again.
"""

from __future__ import annotations

import dataclasses
import os
import typing as t
from collections.abc import Iterator

from bushpc.environment import COMMAND, JOB, Rule

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# Variable → the field of the cluster profile that says the same.
WRITTEN_INTO_PROFILE = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "sbatch.reservation",
    "SBATCH_WCKEY": "sbatch.wckey",
    "SBATCH_HINT": "sbatch.hint",
}
# They say where Slurm is and how to sign in.
NEEDED = ("SLURM_CONF", "SLURM_JWT")

RULES = (
    Rule(
        names=("SLURM_*", "SRUN_*"),
        but=(*NEEDED, "SLURM_CLUSTERS"),
        kinds=(COMMAND, JOB),
        why="They describe the job that this process runs in, or are meant for an srun typed by hand.",
    ),
    Rule(
        names=("SLURM_CLUSTERS",),
        kinds=(COMMAND, JOB),
        said=True,
        why="It sends a command to another cluster than the one of SLURM_CONF, in which the run's jobs are.",
    ),
    Rule(
        names=("SQUEUE_*", "SCANCEL_*", "SCONTROL_*", "SINFO_*", "SACCT_*"),
        kinds=(COMMAND, JOB),
        said=True,
        why="They filter or reformat answers; a job that is filtered out would count as ended.",
    ),
    Rule(
        names=("SBATCH_*",),
        kinds=(COMMAND, JOB),
        why="They beat the options in a job's script; `bushpc cv` and `grid` say which are set. "
        + ", ".join(f"`{name}`" for name in WRITTEN_INTO_PROFILE)
        + " are written into the script where the cluster profile leaves that setting null.",
    ),
    Rule(names=("SALLOC_*",), kinds=(COMMAND, JOB), why="They are meant for salloc, which bushpc never starts."),
    Rule(names=("SLURM_TIME_FORMAT",), kinds=(COMMAND,), sets="standard", why="Times in answers can then be read."),
)


def in_force(profile: ClusterConfig) -> ClusterConfig:
    """The profile with what the user's SBATCH_* variables say where it says nothing."""
    used = {field: value for _, field, value in _used(profile)}
    options = {field.removeprefix("sbatch."): value for field, value in used.items() if field.startswith("sbatch.")}
    changes: dict[str, t.Any] = {field: value for field, value in used.items() if not field.startswith("sbatch.")}
    return dataclasses.replace(profile, **changes, sbatch=profile.sbatch | options)


def notes(profile: ClusterConfig) -> list[str]:
    """For whoever submits: which SBATCH_* variables count and which do not, in one line each."""
    used = {name: field for name, field, _ in _used(profile)}
    ignored = [name for name in sorted(os.environ) if name.startswith("SBATCH_") and name not in used]
    lines = []
    if used:
        told = ", ".join(f"{name}={os.environ[name]} (cluster.{field} is null)" for name, field in used.items())
        lines.append(f"your environment counts where the cluster profile says nothing: {told}")
    if ignored:
        told = ", ".join(f"{name}={os.environ[name]}" for name in ignored)
        lines.append(f"not used from your environment: {told}; jobs get what the cluster profile says")
    return lines


def _used(profile: ClusterConfig) -> Iterator[tuple[str, str, str]]:
    """Variable, field and value of those that count."""
    for name, field in WRITTEN_INTO_PROFILE.items():
        option = field.removeprefix("sbatch.")
        unsaid = option not in profile.sbatch if option != field else getattr(profile, field) is None
        if os.environ.get(name) and unsaid:
            yield name, field, os.environ[name]
