"""Kinds of real sites for `up --like KIND`; several go together where they don't contradict.

Where Slurm's own limits can refuse a job, they do; the rest is job_submit/lua, as on the sites themselves.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configuration import Draft
from layout import SandboxError, say

ORDINARY_USER = "researcher"
GPUS = 4


@dataclass(frozen=True)
class Kind:
    """One kind of site.

    summary: one line for --help.
    change: what it changes in the draft; the number is that of `KIND=number`.
    number: its default; None where the kind takes none.
    topic: two kinds of one topic contradict each other.
    cpus: CPUs that a node needs, unless --cpus is given.
    """

    summary: str
    change: Callable[[Draft, int], None]
    number: int | None = None
    topic: str = ""
    cpus: int = 2


def gpus(draft: Draft, _: int) -> None:
    draft.gpus = {node: ("", GPUS) for node in draft.nodes}
    draft.append("AccountingStorageTRES", "gres/gpu")


def typed_gpus(draft: Draft, _: int) -> None:
    names = list(draft.nodes)
    draft.gpus = {node: ("v100" if len(names) > 1 and node == names[-1] else "a100", GPUS) for node in names}
    for node, (kind, _count) in draft.gpus.items():
        draft.nodes[node]["Features"] = kind
    draft.append("AccountingStorageTRES", "gres/gpu", "gres/gpu:a100", "gres/gpu:v100")


def type_required(draft: Draft, _: int) -> None:
    draft.rules.append(
        'if gpus and not string.find(gpus, "gpu:%a") then return refuse("GPU jobs must name a type: gpu:a100:N") end'
    )


def whole_nodes(draft: Draft, _: int) -> None:
    for partition in draft.partitions.values():
        partition["OverSubscribe"] = "EXCLUSIVE"


def gpu_partition(draft: Draft, _: int) -> None:
    draft.partitions["gpu"] = dict(draft.partitions["low"], Default="NO")
    draft.partitions["cpu"] = dict(draft.partitions["low"], Default="NO")
    draft.rules += [
        'if partition == "gpu" and not gpus then return refuse("partition gpu takes only jobs with GPUs") end',
        'if partition == "cpu" and gpus then return refuse("partition cpu takes no jobs with GPUs") end',
    ]


def accounts(draft: Draft, _: int) -> None:
    draft.enforce("associations")
    user = draft.settings.user
    for account in ("lab_gpu", "lab_cpu"):
        draft.accounting += [["add", "account", account], ["add", "user", user, f"account={account}"]]
    draft.rules += [
        'if gpus and job.account ~= "lab_gpu" then return refuse("GPU jobs need --account=lab_gpu") end',
        'if not gpus and job.account ~= "lab_cpu" then return refuse("CPU jobs need --account=lab_cpu") end',
    ]


def refuses_mem(draft: Draft, _: int) -> None:
    draft.rules.append('if memory then return refuse("--mem is not allowed: jobs get all memory of a node") end')
    del draft.keys["DefMemPerCPU"]


def refuses_gpu_options(draft: Draft, _: int) -> None:
    draft.rules.append('if gpus then return refuse("--gres and --gpus are not allowed: choose a GPU queue") end')


def submit_limit(draft: Draft, number: int) -> None:
    draft.enforce("associations", "limits", "qos")
    draft.accounting.append(["modify", "user", draft.settings.user, "set", f"MaxSubmitJobs={number}"])


def qos_submit_limit(draft: Draft, number: int) -> None:
    draft.enforce("associations", "limits", "qos")
    draft.accounting.append(["add", "qos", "limited", f"MaxSubmitJobsPerUser={number}"])
    draft.partitions["low"]["QOS"] = "limited"


def job_limit(draft: Draft, number: int) -> None:
    draft.enforce("associations", "limits", "qos")
    draft.accounting.append(["modify", "user", draft.settings.user, "set", f"MaxJobs={number}"])


def array_limit(draft: Draft, number: int) -> None:
    draft.keys["MaxArraySize"] = number + 1


def job_count(draft: Draft, number: int) -> None:
    draft.keys["MaxJobCount"] = number


def time_limit(draft: Draft, number: int) -> None:
    for partition in draft.partitions.values():
        partition["MaxTime"] = number
    draft.partitions["high"]["MaxTime"] = "UNLIMITED"


def wckeys(draft: Draft, _: int) -> None:
    draft.enforce("associations", "wckeys")
    draft.keys["TrackWCKey"] = "yes"
    draft.dbd["TrackWCKey"] = "yes"
    draft.accounting.append(["add", "user", draft.settings.user, "wckeys=thesis"])


def autobind(draft: Draft, _: int) -> None:
    machine = len(os.sched_getaffinity(0))
    if draft.settings.cpus > machine:
        raise SandboxError(f"--like autobind binds to real CPUs: give --cpus {machine} or less")
    draft.keys["TaskPlugin"] = "task/affinity"
    draft.keys["TaskPluginParam"] = "autobind=cores"


def local_disk(draft: Draft, _: int) -> None:
    draft.append("GresTypes", "nvme")
    for node in draft.nodes.values():
        own = str(node.get("Gres", ""))
        node["Gres"] = f"{own},nvme:1000" if own else "nvme:1000"
    draft.prolog += [
        'folder="$(dirname "$SLURM_CONF")/../local/$SLURMD_NODENAME/$SLURM_JOB_ID"',
        'mkdir -p "$folder" && echo "export SLURM_TMPDIR=$(realpath "$folder")"',
    ]


def ordinary_user(draft: Draft, _: int) -> None:
    """What differs is Settings.user, which whoever makes the settings has set."""


KINDS = {
    "gpus": Kind("4 fake GPUs on each node, without a type", gpus, topic="gpus", cpus=4),
    "typed-gpus": Kind(
        "4 fake GPUs on each node: gpu:a100:4, on the last of several gpu:v100:4",
        typed_gpus,
        topic="gpus",
        cpus=4,
    ),
    "type-required": Kind("jobs that ask for GPUs without a type are refused", type_required),
    "gpu-partition": Kind(
        "further partitions: gpu refuses jobs without GPUs, cpu refuses those with GPUs", gpu_partition
    ),
    "whole-nodes": Kind("a job gets all of its nodes (OverSubscribe=EXCLUSIVE)", whole_nodes),
    "accounts": Kind("GPU jobs need --account=lab_gpu, all others --account=lab_cpu", accounts),
    "refuses-mem": Kind("--mem, --mem-per-cpu and --mem-per-gpu are refused", refuses_mem),
    "refuses-gpu-options": Kind("--gres, --gpus and --gpus-per-… are refused", refuses_gpu_options),
    "submit-limit": Kind("MaxSubmitJobs of the user's association", submit_limit, number=4),
    "qos-submit-limit": Kind("MaxSubmitJobsPerUser of the QOS of partition low", qos_submit_limit, number=4),
    "job-limit": Kind("MaxJobs (running) of the user's association", job_limit, number=2),
    "job-count": Kind("jobs of all users together (MaxJobCount)", job_count, number=10_000),
    "array-limit": Kind("largest array (MaxArraySize less one)", array_limit, number=10),
    "time-limit": Kind("longest time of jobs outside partition high, minutes", time_limit, number=60),
    "wckeys": Kind("wckeys are enforced: thesis or none", wckeys),
    "autobind": Kind("task/affinity with TaskPluginParam=autobind=cores", autobind),
    "local-disk": Kind("generic resource nvme, and $SLURM_TMPDIR in each task", local_disk),
    "ordinary-user": Kind(
        f"daemons as root, jobs as the user {ORDINARY_USER}, made if missing; see run --as-user", ordinary_user
    ),
}


def parse(text: str) -> tuple[str, int]:
    """`submit-limit=2` → kind and number. Raises: SandboxError."""
    name, given, number = text.partition("=")
    if name not in KINDS:
        raise SandboxError(f"--like {name!r} is not a kind of site. Valid: {', '.join(KINDS)}.")
    default = KINDS[name].number
    if given and default is None:
        raise SandboxError(f"--like {name} takes no number")
    if given and (not number.isdecimal() or int(number) < 1):
        raise SandboxError(f"--like {text}: {number!r} is not a whole number of 1 or more")
    return name, int(number) if given else default or 0


def check(like: Sequence[str]) -> None:
    """Raises: SandboxError for an unknown kind, or two that contradict each other."""
    by_topic: dict[str, str] = {}
    for text in like:
        name, _ = parse(text)
        topic = KINDS[name].topic or name
        if topic in by_topic:
            raise SandboxError(f"--like {by_topic[topic]} and --like {text} contradict each other")
        by_topic[topic] = text
    if "ordinary-user" in like and os.getuid() != 0:
        raise SandboxError("--like ordinary-user needs root: its daemons start jobs for another user")


def cpus_needed(like: Sequence[str]) -> int:
    return max((KINDS[parse(text)[0]].cpus for text in like), default=2)


def apply(draft: Draft) -> None:
    """Change the draft into what the settings' kinds of site are like."""
    asked = dict(parse(text) for text in draft.settings.like)
    for name in KINDS:  # in this order: what makes partitions comes before what changes all of them
        if name in asked:
            KINDS[name].change(draft, asked[name])
    if draft.accounting and not draft.settings.accounting:
        raise SandboxError(f"--like {' --like '.join(draft.settings.like)} needs accounting; drop --no-accounting")


def ensure_user() -> None:
    """Make the ordinary user, with a home folder, where it is missing."""
    try:
        pwd.getpwnam(ORDINARY_USER)
        return
    except KeyError:
        say(f"making the user {ORDINARY_USER} (stays on this machine; userdel --remove {ORDINARY_USER} undoes it)")
    command = ["useradd", "--create-home", "--shell", "/bin/bash", ORDINARY_USER]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise SandboxError(f"{' '.join(command)}: {made.stderr.strip()}")
