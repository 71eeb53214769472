"""A first profile for a site, from what its Slurm tells: partitions with GPUs, their types and limits, the account.

sinfo, scontrol, sacctmgr ─suggest→ settings of cluster.* ─`bushpc doctor --slurm --write mysite`→ the probe, a yaml
"""

from __future__ import annotations

import collections
import contextlib
import getpass
import math
import typing as t
from collections.abc import Iterator, Mapping, Sequence

from bushpc.cluster.base import ask
from bushpc.cluster.checks import OK, Check
from bushpc.cluster.slurm_ask import (
    associations,
    enforces_accounts,
    minutes_of,
    partition_facts,
    partitions,
    site_settings,
)
from bushpc.cluster.slurm_nodes import UNTYPED, NodeKind, node_kinds
from bushpc.errors import DispatchError

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

Facts = Mapping[str, Mapping[str, str]]


def suggest(profile: ClusterConfig) -> dict[str, t.Any]:
    """Setting → value, of what this profile leaves open and the site's Slurm tells. Raises: DispatchError."""
    facts = {name: words for name, words in partitions().items() if words.get("State") == "UP"}
    nodes = [node for node in node_kinds() if node.partition in facts and node.in_service]
    found: dict[str, t.Any] = {}
    name = profile.partition or _with_most_gpus(facts, nodes)
    mine = [node for node in nodes if node.gpus and node.partition == name]
    if name and mine:
        found |= _gpu_job(mine, facts[name]) | {"partition": name}
        found |= _cpu_jobs(facts, nodes, whole="cells_per_job" in found)
    if account := default_account():
        found["account"] = account
    return {key: value for key, value in found.items() if not _is_said(profile, key)}


def choices(profile: ClusterConfig) -> dict[str, list[str]]:
    """Setting → what the site has to choose from; of times the longest, where there is one.

    Raises: DispatchError, also for a partition of the profile that does not exist.
    """
    facts = partitions()
    up = [name for name, words in facts.items() if words.get("State") == "UP"]
    has_default = any(words.get("Default") == "YES" for words in facts.values())
    mine = partition_facts(profile) if profile.partition or has_default else []
    longest = max((minutes_of(words["MaxTime"]) for words in mine), default=math.inf)
    nodes = [node for node in node_kinds(profile.partition) if node.gpus]
    accounts: list[str] = []
    with contextlib.suppress(DispatchError):  # a site without accounting
        accounts = [account for account, _ in associations()]
    found = {
        "partition": up,
        "account": accounts,
        "gpus": [f"{kind}:{count}" if kind else str(count) for node in nodes for kind, count in node.gpus.items()],
        "time_min": [] if longest == math.inf else [f"{longest:.0f}"],
        "cpu_jobs.partition": up,
    }
    return {key: list(dict.fromkeys(names)) for key, names in found.items()}


def site_lines() -> Iterator[Check]:
    """What the site has, for whoever reads the profile later. Raises: DispatchError."""
    nodes = node_kinds()
    for name, words in partitions().items():
        here = [node for node in nodes if node.partition == name]
        limit = minutes_of(words["MaxTime"])
        told = "no time limit" if limit == math.inf else f"at most {limit:.0f} minutes"
        yield Check(name=f"partition {name}", verdict=OK, found=f"{'; '.join(map(str, here)) or 'no nodes'}; {told}")


def default_account() -> str | None:
    """This user's, where the site holds jobs to accounts."""
    with contextlib.suppress(DispatchError):
        if not enforces_accounts():
            return None
        command = ["sacctmgr", "--noheader", "--parsable2", "show", "user", getpass.getuser(), "format=defaultaccount"]
        return ask(*command).strip() or None
    return None


def _is_said(profile: ClusterConfig, key: str) -> bool:
    held: t.Any = profile
    *groups, name = key.split(".")
    for group in groups:
        held = getattr(held, group)
    return bool(getattr(held, name) != type(held).default(name))


def _with_most_gpus(facts: Facts, nodes: Sequence[NodeKind]) -> str | None:
    """The default partition where it has GPUs, else the one with most of them."""
    counts = collections.Counter[str]()
    for node in nodes:
        counts[node.partition] += node.count * node.gpus_of(None)
    default = next((name for name, words in facts.items() if words.get("Default") == "YES"), None)
    if default and counts[default]:
        return default
    best = counts.most_common(1)
    return best[0][0] if best and best[0][1] else None


def _gpu_job(nodes: Sequence[NodeKind], facts: Mapping[str, str]) -> dict[str, t.Any]:
    """What one cell asks for: its share of a node of the most frequent kind, or all of it where nodes come whole."""
    node = max(nodes, key=lambda each: each.count * each.gpus_of(None))
    kind, count = max(node.gpus.items(), key=lambda item: item[1])
    whole = facts.get("OverSubscribe", "").startswith("EXCLUSIVE")
    asked = count if whole else 1
    found: dict[str, t.Any] = {
        "gpus": asked if kind == UNTYPED else f"{kind}:{asked}",
        "cpus_per_rank": max(1, node.cores // count),
    }
    if whole:
        return found | ({"cells_per_job": count} if count > 1 else {})
    with contextlib.suppress(DispatchError):
        if "MEMORY" in site_settings().get("SelectTypeParameters", "").upper():
            found["mem_gb"] = max(1, node.memory_mb // 1024 // count)
    return found


def _cpu_jobs(facts: Facts, nodes: Sequence[NodeKind], *, whole: bool) -> dict[str, t.Any]:
    """A partition for jobs without a GPU, in which no node has one; the last cell's job where none is and nodes come
    whole."""
    with_gpus = {node.partition for node in nodes if node.gpus}
    without = [name for name in facts if name not in with_gpus and any(node.partition == name for node in nodes)]
    if without:
        default = [name for name in without if facts[name].get("Default") == "YES"]
        return {"cpu_jobs.partition": (default or without)[0]}
    return {"report": "last_cell"} if whole else {}
