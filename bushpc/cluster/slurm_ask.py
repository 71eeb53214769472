"""What every part that asks Slurm needs: its configuration, partitions, what it says of a job, how it writes times."""

from __future__ import annotations

import getpass
import math
import re
import subprocess
import typing as t

from bushpc.cluster.base import NoAnswer, ask
from bushpc.cluster.records import JobFacts
from bushpc.errors import DispatchError, unknown_name

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# Jobs of one array, where Slurm does not say what it allows; its own default.
MAX_ARRAY_SIZE = 1001
# In the error about a job of the same number with another name.
NOT_OURS = "is not ours"


# Of a controller that is away or has too much to do: the same question may be answered in a minute.
AWAY = re.compile(
    r"unable to contact slurm controller|socket timed out|connection (refused|reset|timed out)|transport endpoint|"
    r"zero bytes were transmitted|slurm backup controller|communication connection failure|temporarily unable|"
    r"slurmctld is (busy|not responding)|unexpected message received",
    re.IGNORECASE,
)


def is_away(error: DispatchError) -> bool:
    """Whether the controller did not answer, rather than refuse."""
    return isinstance(error.__cause__, subprocess.TimeoutExpired) or bool(AWAY.search(str(error)))


def ask_controller(*command: str) -> str:
    """As `ask`. Raises: NoAnswer where the controller is away; DispatchError."""
    try:
        return ask(*command)
    except DispatchError as error:
        if is_away(error):
            raise NoAnswer(str(error)) from error
        raise


def site_settings() -> dict[str, str]:
    """Slurm's own configuration, as `scontrol show config` tells it: KillWait, JobRequeue, PreemptMode …"""
    pairs = (line.partition("=") for line in ask_controller("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def minutes_of(limit: str) -> float:
    """A time limit in Slurm's notation, in minutes; infinite where there is none.

    >>> [minutes_of(text) for text in ("90", "1:30:00", "2-00:00:00", "UNLIMITED")]
    [90.0, 90.0, 2880.0, inf]
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return math.inf
    days, first, second, third = (int(part) if part else None for part in match.groups())
    assert first is not None
    if days is not None or third is not None:  # D-HH[:MM[:SS]] or HH:MM:SS
        return (days or 0) * 1440.0 + first * 60 + (second or 0) + (third or 0) / 60
    return first + (second or 0) / 60


def partitions() -> dict[str, dict[str, str]]:
    """Name → what `scontrol show partition` says of it, of all partitions."""
    lines = ask("scontrol", "show", "partition", "--all", "--oneliner").splitlines()
    found = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line.strip()]
    return {partition["PartitionName"]: partition for partition in found}


def partition_facts(profile: ClusterConfig) -> list[dict[str, str]]:
    """What `scontrol show partition` says of each of the profile's partitions (`low,high`), or of the default one.

    Raises: DispatchError for one that does not exist.
    """
    by_name = partitions()
    if profile.partition is None:
        default = [partition for partition in by_name.values() if partition.get("Default") == "YES"]
        if not default:
            raise DispatchError(
                f"this cluster has no default partition: set cluster.partition to one of {', '.join(sorted(by_name))}"
            )
        return default[:1]
    names = profile.partition.split(",")
    for name in names:
        if name not in by_name:
            raise DispatchError(unknown_name("cluster.partition", name, by_name))
    return [by_name[name] for name in names]


def associations() -> list[tuple[str, list[str]]]:
    """Accounts that accounting knows this user to have, each with its qualities of service. Raises: DispatchError."""
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc"]
    rows = ask(*command, f"user={getpass.getuser()}", "format=account,qos").splitlines()
    pairs = [line.partition("|") for line in rows if line]
    return [(account, qos.split(",")) for account, _, qos in pairs]


def enforces_accounts() -> bool:
    """Whether the site holds jobs to accounts; without it Slurm takes any name. Raises: DispatchError."""
    return site_settings().get("AccountingStorageEnforce", "none") != "none"


def job_facts(text: str, job_id: str, name: str = "") -> JobFacts:
    """From `scontrol --oneliner show job`, which has a line for every task when asked for an array's last one.

    Raises: DispatchError if the job of that number has another name.
    """
    lines = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines())
    words = next((words for words in lines if words.get("JobId") == job_id), {})
    if name and words.get("JobName", name) != name.split(" ")[0]:  # the line is taken apart at blanks
        raise DispatchError(f"job {job_id} {NOT_OURS}: here it is '{words['JobName']}', and ours is '{name}'")
    in_array = words.get("ArrayTaskId", "").isdecimal()
    state, reason = words.get("JobState", ""), words.get("Reason", "")
    limit = minutes_of(words.get("TimeLimit", ""))
    return JobFacts(
        # A job that was cancelled, or that Slurm requeues itself, is COMPLETING by now, as is one that ran out of time.
        ours_to_requeue=state == "RUNNING" or (state == "COMPLETING" and reason == "TimeLimit"),
        preempted=words.get("PreemptTime", "None") != "None",
        restarts=int(words.get("Restarts", 0)),
        limit_min=None if limit == math.inf else math.ceil(limit),
        # `scontrol requeue` takes the id of an array's last task for the whole array, and stops the other tasks.
        requeue_as=f"{words['ArrayJobId']}_{words['ArrayTaskId']}" if in_array else job_id,
    )
