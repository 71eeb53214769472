"""A profile in the words of sbatch and srun: what each job asks for, and which free options are no such options.

profile ─parameters→ submitit's parameters ─submitit→ #SBATCH lines and the srun line
"""

from __future__ import annotations

import functools
import os
import re
import typing as t
from collections.abc import Iterable

from bushpc.cluster.base import NoClient, ask
from bushpc.cluster.profile import tasks_per_node
from bushpc.errors import ConfigError, DispatchError, unknown_name

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# Every job is submitted with these; `sbatch: {propagate: null}` takes one away. Slurm would hand on the limits of the
# login shell, of which `ulimit -v` makes ranks hang; and where JobRequeue=0 only jobs that ask for it come back.
OWN_SBATCH: dict[str, str | bool | None] = {"propagate": "NONE", "requeue": True}
BY_FIELD = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "ntasks": "ranks_per_node",
    "cpus-per-task": "cpus_per_rank",
    "cpus-per-gpu": "cpus_per_rank",
    "time": "time_min",
    "mem": "mem_gb",
    "mem-per-gpu": "mem_per",
    "mem-per-cpu": "mem_per",
    "gpus": "gpus",
    "gpus-per-node": "gpus",
    "gpus-per-task": "gpus",
    "gpus-per-socket": "gpus",
    "ntasks-per-gpu": "gpus",
    "gres": "gres",
    "exclusive": "exclusive",
    "signal": "stop_lead_s",
}
# bushpc finds its jobs, logs and tasks again by these.
OURS = {
    "sbatch": (
        *("array", "job-name", "output", "error", "open-mode", "dependency", "chdir", "wrap", "parsable", "wait"),
        *("test-only", "clusters", "uid", "gid", "input", "kill-on-invalid-dep"),
    ),
    "srun": (
        *("output", "error", "input", "unbuffered", "label", "multi-prog", "jobid", "overlap", "chdir", "job-name"),
        "array",
    ),
}
# Slurm takes them, and its help does not list all of them everywhere.
UNLISTED = ("hint", "prefer", "network", "wait-all-nodes", "acctg-freq")
# Of the srun that starts the ranks; it may say how GPUs are bound and shared out among them.
OF_THE_STEP = ("gpus-per-task", "ntasks-per-gpu", "gres", "exclusive", "signal", "mem")


def parameters(profile: ClusterConfig) -> dict[str, t.Any]:
    """submitit's parameters for what a job of this profile asks for."""
    gres, count = list(profile.gres), profile.gpu_count
    free = _given({**OWN_SBATCH, **profile.sbatch})
    gpus = f"{profile.gpu_type}:{count}" if profile.gpu_type else str(count)
    asked: dict[str, t.Any] = {}
    if count and profile.gpus_by == "gpus_per_node":
        asked["gpus_per_node"] = gpus
    elif count and profile.gpus_by == "gres":
        gres.insert(0, f"gpu:{gpus}")
    elif count and profile.gpus_by == "gpus":
        total = str(count * profile.nodes)
        free["gpus"] = f"{profile.gpu_type}:{total}" if profile.gpu_type else total
    if profile.mem_gb is not None:
        name = {"node": "mem", "gpu": "mem_per_gpu", "cpu": "mem_per_cpu"}[profile.mem_per]
        asked[name] = f"{profile.mem_gb}GB" if profile.mem_gb else "0"
    asked |= {
        "time": profile.time_min,
        "nodes": profile.nodes,
        "ntasks_per_node": tasks_per_node(profile),
        "cpus_per_task": profile.cpus_per_rank,
        "gres": ",".join(gres) or None,
        "exclusive": profile.exclusive or None,
        # Empty where a block of the profile asks for the cluster's default instead.
        **{name: getattr(profile, name) or None for name in ("partition", "account", "qos", "constraint")},
    }
    return {
        **{name: value for name, value in asked.items() if value is not None},
        "wckey": None,  # submitit's own, which sites that enforce wckeys refuse
        "additional_parameters": free,
        "srun_args": srun_options(profile),
        "stderr_to_stdout": True,
    }


def srun_options(profile: ClusterConfig) -> list[str]:
    """Options of the srun that starts a job's ranks."""
    options = {
        # From Slurm 22.05 on srun takes it from nowhere else; with autobind=cores a rank would get a single core.
        "cpus-per-task": str(profile.cpus_per_rank),
        # A rank that dies ends the others, which would wait for it in a collective; cells that share a job do not.
        "kill-on-bad-exit": str(int(profile.cells_per_job == 1)),
        **profile.srun,
    }
    return _words(options)


def require_known(profile: ClusterConfig) -> None:
    """Refuse free options that a typed setting says, that bushpc sets itself, or that Slurm doesn't have.

    Raises: ConfigError.
    """
    for key, command, options in (
        ("sbatch", "sbatch", profile.sbatch),
        ("cpu_jobs.sbatch", "sbatch", profile.cpu_jobs.sbatch),
        ("srun", "srun", profile.srun),
    ):
        for name, value in options.items():
            _require_free(f"cluster.{key}.{name}", name, value, command)
        if given := _words(options):
            require_accepted(command, tuple(given), os.environ.get("SLURM_CONF"))


@functools.lru_cache
def require_accepted(command: str, words: tuple[str, ...], conf: str | None) -> None:
    """Ask sbatch or srun whether it takes these options; where there is none, nobody asks.

    conf: the Slurm configuration that it reads. Its help alone would not do: it leaves out --hint, --prefer and others
    that it takes. Raises: ConfigError with the nearest option that its help does list.
    """
    try:
        ask(command, *words, "--version")
    except NoClient:
        return
    except DispatchError as error:
        try:
            ask(command, "--version")
        except DispatchError:
            return  # it has no configuration here
        unknown = re.search(r"unrecognized option '--([\w-]+)", str(error))
        if unknown is None:
            reason = re.sub(r".*? failed: (?:\w+: error: )?", "", str(error))
            raise ConfigError(f"{command} refuses {' '.join(words)}: {reason}") from error
        listed = options_in(ask(command, "--help").splitlines()).union(UNLISTED)
        valid = listed - BY_FIELD.keys() - set(OURS[command])
        raise ConfigError(unknown_name(f"option of {command}", unknown[1], valid)) from error


def _require_free(key: str, name: str, value: str | bool | None, command: str) -> None:
    of_step = command == "srun" and name in OF_THE_STEP
    if name in BY_FIELD and not of_step and not (command == "srun" and value is None):
        raise ConfigError(f"{key}={_shown(value)}: --{name} follows from cluster.{BY_FIELD[name]}; set that instead")
    if name in OURS[command]:
        raise ConfigError(f"{key}={_shown(value)}: bushpc sets --{name} itself; leave it out")
    if value is not None and name in ("no-requeue", "no-kill"):
        raise ConfigError(f"{key}={_shown(value)}: a stopped job would not come back; leave it out")


def options_in(lines: Iterable[str]) -> frozenset[str]:
    """The long options in a help text.

    >>> sorted(options_in(["  -A, --account=name   charge job to it", "      --hint=no  see --extra-node-info"]))
    ['account', 'hint']
    """
    found = (re.match(r"\s*(?:-\w, ?)?--([a-z][\w-]*)", line) for line in lines)
    return frozenset(match[1] for match in found if match)


def _words(options: t.Mapping[str, str | bool | None]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in _given(options).items()]


def _given(options: t.Mapping[str, str | bool | None]) -> dict[str, str | bool]:
    return {name: value for name, value in options.items() if value is not None}


def _shown(value: str | bool | None) -> str:
    return {True: "true", None: "null"}.get(value) or str(value)  # type: ignore[arg-type]  # a text is no key of it
