"""What a site's Slurm allows, held against a profile: the part of `bushpc doctor` that asks Slurm."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import typing as t
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from bushpc.cluster import container, slurm_trial
from bushpc.cluster.base import ask
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check, is_broken
from bushpc.cluster.profile import report_profile
from bushpc.cluster.slurm_ask import (
    associations,
    enforces_accounts,
    minutes_of,
    partition_facts,
    partitions,
    site_settings,
)
from bushpc.cluster.slurm_limits import check_limits
from bushpc.cluster.slurm_nodes import asks_gpus, has_feature, lacks, needed_cores, needed_mb, node_kinds, why_none_fits
from bushpc.errors import ConfigError, DispatchError, unknown_name

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

QUESTIONS = {
    "squeue": ("squeue", "--noheader", f"--user={os.getuid()}"),
    "sbatch": ("sbatch", "--version"),
    "scontrol": ("scontrol", "ping"),
    "sacct": ("sacct", "--noheader", "--allocations", "--starttime=now"),
}
# bushpc works without it.
NOT_NEEDED = ("sacct",)
# What jobs would like to find in their environment; Slurm sets the second from version 23.02 on.
ONLY_AFTER_RESTART = ("SLURM_RESTART_COUNT",)
JOB_VARIABLES = ("SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME", "SLURMD_NODENAME", "SLURM_CONF")


def refuse_impossible(profile: ClusterConfig) -> None:
    """Refuse what no job of this profile could ever get, before anything is queued; once per profile.

    Where Slurm does not answer here, the submission will tell. Raises: ConfigError with the site's own numbers.
    """
    conf = os.environ.get("SLURM_CONF")
    _refuse_impossible(profile, conf)
    if profile.report != "job":
        return
    try:
        _refuse_impossible(report_profile(profile), conf)
    except ConfigError as error:
        text = str(error).replace("cluster.time_min", "cluster.report_time_min")
        for name in ("partition", "constraint", "mem_gb"):
            text = text.replace(f"cluster.{name}", f"cluster.cpu_jobs.{name}")
        raise ConfigError(f"the report job, which needs no GPU: {text}") from error


@functools.lru_cache
def _refuse_impossible(profile: ClusterConfig, conf: str | None) -> None:
    try:
        all_partitions = partitions()
        nodes = node_kinds(profile.partition)
    except DispatchError:
        return
    names = profile.partition.split(",") if profile.partition else list(all_partitions)
    for name in names:
        if name not in all_partitions:
            raise ConfigError(unknown_name("cluster.partition", name, all_partitions))
    # Without a partition, a site's own rules may choose one by account or constraint.
    if why := why_none_fits(profile, nodes):
        raise ConfigError(why)
    longest = max(minutes_of(all_partitions[name]["MaxTime"]) for name in names)
    if profile.time_min > longest and profile.qos is None:  # a quality of service may allow more
        raise ConfigError(
            f"cluster.time_min={profile.time_min}: {' and '.join(names)} allow at most {longest:.0f} minutes, so jobs "
            f"would never start; set cluster.time_min={longest:.0f}. A cell that is stopped by the limit goes on in "
            "its next turn"
        )
    widest = [all_partitions[name].get("MaxNodes", "") for name in names]
    if all(wide.isdecimal() and int(wide) < profile.nodes for wide in widest):
        most = max(map(int, widest))
        raise ConfigError(
            f"cluster.nodes={profile.nodes}: {' and '.join(names)} allow at most {most} nodes per job; set "
            f"cluster.nodes={most}"
        )


def concerns(profile: ClusterConfig) -> list[str]:
    """Why jobs of this profile may wait for long, though they could run: a closed partition, nodes out of service."""
    checks = [*_partition(profile), *_nodes(profile)]
    return [f"{check.found}; {check.advice}" for check in checks if check.verdict != OK and check.advice]


def longest_minutes(profile: ClusterConfig) -> float:
    """The longest time limit that one of the profile's partitions allows, in minutes; infinite without one."""
    return max(minutes_of(facts["MaxTime"]) for facts in partition_facts(profile))


def how_jobs_end(profile: ClusterConfig) -> Check:
    """What Slurm's own settings say about it."""
    site = site_settings()
    names = ("KillWait", "OverTimeLimit", "PreemptMode", "ProctrackType")
    told = ", ".join(f"{name}={site.get(name, 'unknown')}" for name in names)
    user_signal = "preempt_send_user_signal" in site.get("SlurmctldParameters", "")
    user_signal |= "send_user_signal" in site.get("PreemptParameters", "")
    for partition in partition_facts(profile):
        told += f"; partition {partition['PartitionName']}: GraceTime={partition['GraceTime']} sec, "
        told += f"PreemptMode={partition['PreemptMode']}"
    found = f"{told}; preemption sends {'USR2 first' if user_signal else 'TERM only'}"
    return Check(name="Slurm says", verdict=OK, found=found)


def gpu_types(profile: ClusterConfig) -> list[str]:
    """The types of GPUs in the profile's partitions, as sinfo writes them, on nodes with the plain feature it asks for.

    Raises: DispatchError.
    """
    nodes = node_kinds(",".join(facts["PartitionName"] for facts in partition_facts(profile)))
    return list(dict.fromkeys(kind for node in nodes if has_feature(profile, node) for kind in node.gpus if kind))


def commands_on_node(job_id: str) -> dict[str, tuple[str, ...]]:
    """What a job may want to ask on a compute node: command → the question."""
    return {
        "squeue": ("squeue", "--noheader", f"--jobs={job_id}"),
        "scontrol": ("scontrol", "show", "job", job_id),
        "sacct": ("sacct", "--noheader", "--allocations", f"--jobs={job_id}"),
    }


def traced_batch_lines(log_prefix: str, log_suffix: str, signals: Sequence[str]) -> list[str]:
    """Shell lines that make a batch script write down the signals it gets, to <prefix><restart count><suffix>.

    A shell runs traps only when its foreground command has ended, so `srun` becomes a function that starts it in the
    background and looks every tenth of a second whether it still runs. The function sets the traps itself, in the
    place of those by which a cell's job puts itself back into the queue.

    Two things make bash 5.2 lose signals, as measured: in `wait`, one that comes within a millisecond of another, as
    TERM comes after CONT; and now and then any whose trap has a `$(...)`. So the time comes from the shell where it
    can (bash 5); elsewhere from `date`, which may die of the very signal that it should note, as Slurm signals the
    script's whole process group.
    """
    log = f'{log_prefix}"${{SLURM_RESTART_COUNT:-0}}"{log_suffix}'
    event = """'{"time": %s, "kind": "signal", "name": "%s"}\\n'"""
    return [
        f'note() {{ local at="$EPOCHREALTIME"; printf {event} "${{at/,/.}}" "$1" >> {log}; }}',
        f'[ -n "${{EPOCHREALTIME:-}}" ] || note() {{ printf {event} "$(date +%s.%N)" "$1" >> {log}; }}',
        "srun() {",
        "  trap - EXIT",
        f'  for name in {" ".join(signals)}; do trap "note $name" "$name"; done',
        '  command srun "$@" & step=$!',
        # Nothing ever comes from this pipe: a sleep without a process, which Slurm's signals would end.
        "  local nothing; exec {nothing}<> <(:)",
        '  while kill -0 "$step" 2>/dev/null; do read -rt 0.1 -u "$nothing" || :; done',
        '  wait "$step"',
        "}",
    ]


# --- the checks ----------------------------------------------------------------------------------------------------


def _commands(profile: ClusterConfig) -> Iterator[Check]:
    for name, question in QUESTIONS.items():
        needed = name not in NOT_NEEDED
        advice = "run this on a login node, or use cluster=local" if needed else "nothing: bushpc works without it"
        try:
            found, verdict = ask(*question).strip().partition("\n")[0][:60], OK
        except DispatchError as error:
            found, verdict = str(error), BROKEN if needed else WARNING
        told = "answers" + (f": {found}" if name in ("sbatch", "scontrol") else "") if verdict == OK else found
        yield Check(name=name, verdict=verdict, found=told, advice="" if verdict == OK else advice)


def _partition(profile: ClusterConfig) -> Iterator[Check]:
    """Slurm starts a job in whichever of its partitions can first, so it takes one that fits."""
    judged = [list(_one_partition(profile, facts)) for facts in partition_facts(profile)]
    some_fit = not all(is_broken(checks) for checks in judged)
    for check in itertools.chain(*judged):
        yield dataclasses.replace(check, verdict=WARNING) if some_fit and check.verdict == BROKEN else check


def _one_partition(profile: ClusterConfig, facts: Mapping[str, str]) -> Iterator[Check]:
    name, most, wide = facts["PartitionName"], minutes_of(facts["MaxTime"]), facts.get("MaxNodes", "")
    problems = []
    if facts["State"] != "UP":
        problems.append((f"{name} is {facts['State']}", "wait, or choose another with cluster.partition"))
    for key, asked in (("time_min", profile.time_min), ("report_time_min", profile.report_time_min)):
        if asked > most:
            found = f"{name} allows jobs of {most:.0f} minutes, cluster.{key}={asked}"
            advice = f"cluster.{key}={most:.0f}: a cell that is stopped by the limit goes on in its next turn"
            problems.append((found, advice))
    if wide.isdecimal() and profile.nodes > int(wide):
        found = f"{name} allows jobs of {wide} nodes, cluster.nodes={profile.nodes}"
        problems.append((found, f"cluster.nodes={wide}"))
    for found, advice in problems:
        yield Check(name="partition", verdict=BROKEN, found=found, advice=advice)
    if not problems:
        limit = "without a limit" if most == math.inf else f"of at most {most:.0f} minutes"
        preempted = f"PreemptMode={facts['PreemptMode']}, GraceTime={facts['GraceTime']} s"
        yield Check(name="partition", verdict=OK, found=f"{name}: jobs {limit}; {preempted}")


def _nodes(profile: ClusterConfig) -> Iterator[Check]:
    """Whether enough nodes of the partition have the cores, memory, GPUs and features that a cell asks of one node."""
    judged = [_fitting_nodes(profile, facts["PartitionName"]) for facts in partition_facts(profile)]
    some_fit = any(check.verdict != BROKEN for check in judged)
    for check in judged:
        yield dataclasses.replace(check, verdict=WARNING) if some_fit and check.verdict == BROKEN else check


def _fitting_nodes(profile: ClusterConfig, name: str) -> Check:
    """The nodes of one partition. Slurm accepts a job for nodes that are out of service, too, and lets it wait."""
    nodes = node_kinds(name)
    fit = [node for node in nodes if not lacks(profile, node)]
    fitting = sum(node.count for node in fit if node.in_service)
    away = sum(node.count for node in fit if not node.in_service)
    asked = f"{profile.nodes} node(s) with {needed_cores(profile)} cores, {asks_gpus(profile)} GPUs"
    asked += f" of type {profile.gpu_type}" if profile.gpu_type and asks_gpus(profile) else ""
    asked += f", {needed_mb(profile) / 1024:.0f} GB" if profile.mem_gb else ""
    asked += f", feature {profile.constraint}" if profile.constraint else ""
    found = f"{fitting} of {name}'s nodes have what a cell asks for: {asked}"
    found += f"; {away} more are down or drained" if away else ""
    if fitting >= profile.nodes:
        return Check(name="nodes", verdict=OK, found=found)
    if fitting + away >= profile.nodes:
        advice = "jobs wait until the site brings them back; or choose another with cluster.partition"
        return Check(name="nodes", verdict=WARNING, found=found, advice=advice)
    advice = "ask for less (cluster.cpus_per_rank, ranks_per_node, gpus, mem_gb, constraint)"
    return Check(name="nodes", verdict=BROKEN, found=f"{found}; it has {'; '.join(map(str, nodes))}", advice=advice)


def _account(profile: ClusterConfig) -> Iterator[Check]:
    """Accounts and qualities of service that accounting knows this user to have."""
    asked = {"account": profile.account, "qos": profile.qos}
    if not any(asked.values()):
        yield Check(name="account and qos", verdict=OK, found="the cluster's defaults")
        return
    pairs = associations()
    valid = {"account": {account for account, _ in pairs}, "qos": {name for _, names in pairs for name in names}}
    strict = BROKEN if enforces_accounts() else WARNING
    for key, given in asked.items():
        if given is None:
            continue
        if given in valid[key]:
            yield Check(name=key, verdict=OK, found=given)
        else:
            yield Check(
                name=key,
                verdict=strict,
                found=unknown_name(f"cluster.{key}", given, valid[key] - {""}),
                advice=f"set cluster.{key}=null for the default, or ask the site",
            )


def _stopping(profile: ClusterConfig) -> Iterator[Check]:
    """What is known about how jobs end, before the probe has measured it."""
    site, partitions = site_settings(), partition_facts(profile)
    if site.get("JobRequeue") == "0":
        found = "JobRequeue=0: a preempted job comes back only if it asks for it, as the cells do (sbatch --requeue)"
        yield Check(name="requeue", verdict=OK, found=found)
    graces = " and ".join(f"{partition['GraceTime']} sec" for partition in partitions)
    told = f"KillWait={site.get('KillWait')}, GraceTime={graces}"
    if profile.grace_s is None:
        advice = "`bushpc doctor --slurm cluster=… --write mysite` measures it"
        yield Check(name="grace time", verdict=WARNING, found=f"cluster.grace_s is not known ({told})", advice=advice)
    else:
        yield Check(name="grace time", verdict=OK, found=f"cluster.grace_s={profile.grace_s:g} ({told})")


CHECKS: tuple[tuple[str, Callable[[ClusterConfig], Iterable[Check]]], ...] = (
    ("Slurm", _commands),
    ("container", container.check),
    ("partition", _partition),
    ("nodes", _nodes),
    ("account and qos", _account),
    ("trial", slurm_trial.check),
    ("limits", check_limits),
    ("stopping", _stopping),
)
