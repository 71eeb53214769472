"""The kinds of nodes that a site has, as sinfo tells them, and whether any of them has what a profile asks for."""

from __future__ import annotations

import collections
import re
import typing as t
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bushpc.cluster.base import ask
from bushpc.cluster.profile import tasks_per_node
from bushpc.errors import unknown_name

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# Of a node, as sinfo's %t writes them, less the sign that may follow.
OUT_OF_SERVICE = ("down", "drain", "drng", "fail", "failg")
UNTYPED = ""


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes of a partition that are alike. gpus: type → number on each; UNTYPED where Slurm knows no type."""

    partition: str
    count: int
    cores: int
    memory_mb: int
    gpus: Mapping[str, int] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    in_service: bool = True

    def __str__(self) -> str:
        told = [f"{number} GPUs" + (f" of type {name}" if name else "") for name, number in self.gpus.items()]
        parts = [f"{self.cores} cores", f"{self.memory_mb / 1024:.0f} GB", *(told or ["0 GPUs"])]
        return f"{self.count} x {', '.join(parts)}"

    def gpus_of(self, kind: str | None) -> int:
        """How many GPUs of a type a node has; None counts all."""
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


def node_kinds(partition: str | None = None) -> list[NodeKind]:
    """The nodes of these partitions (`low,high`); None looks at all. Raises: DispatchError."""
    where = [f"--partition={partition}"] if partition else ["--all"]
    rows = ask("sinfo", "--noheader", "--exact", *where, "--format=%P|%c|%m|%G|%f|%D|%t").splitlines()
    return [_kind(row) for row in rows if row.count("|") == 6]


def _kind(row: str) -> NodeKind:
    name, cores, memory, gres, features, count, state = row.split("|")
    word = re.match(r"[a-z]*", state)
    return NodeKind(
        partition=name.rstrip("*"),
        count=int(count),
        cores=int(cores.rstrip("+")),
        memory_mb=int(memory.rstrip("+")),
        gpus=gpus_in(gres),
        features=frozenset(features.split(",")) - {"(null)"},
        in_service=word is None or word[0] not in OUT_OF_SERVICE,
    )


def gpus_in(gres: str) -> dict[str, int]:
    """Type → number of GPUs in a node's generic resources, as sinfo writes them.

    >>> [gpus_in(text) for text in ("(null)", "gpu:8(S:0-1)", "gpu:a100:4(S:0),gpu:v100:2,nvme:1")]
    [{}, {'': 8}, {'a100': 4, 'v100': 2}]
    """
    found: dict[str, int] = {}
    for kind, number in re.findall(r"(?:^|,)gpu(?::([^:,()]+))??(?::(\d+))?(?=[(,]|$)", gres):
        found[kind or UNTYPED] = found.get(kind or UNTYPED, 0) + int(number or 1)
    return found


def asks_gpus(profile: ClusterConfig) -> int:
    """GPUs that Slurm is asked for on each node."""
    return 0 if profile.gpus_by == "none" else profile.gpu_count


def needed_mb(profile: ClusterConfig) -> int:
    """Memory that a job asks for on each node."""
    times = {"node": 1, "gpu": profile.gpu_count, "cpu": needed_cores(profile)}[profile.mem_per]
    return (profile.mem_gb or 0) * times * 1024


def needed_cores(profile: ClusterConfig) -> int:
    """Cores that a job asks for on each node."""
    return tasks_per_node(profile) * profile.cpus_per_rank


def lacks(profile: ClusterConfig, node: NodeKind) -> str:
    """What a node lacks of what the profile asks of each, by the setting; "" for one that fits."""
    if asks_gpus(profile) > node.gpus_of(profile.gpu_type):
        return "gpus"
    if needed_cores(profile) > node.cores:
        return "cpus_per_rank"
    if needed_mb(profile) > node.memory_mb:
        return "mem_gb"
    return "" if has_feature(profile, node) else "constraint"


def has_feature(profile: ClusterConfig, node: NodeKind) -> bool:
    """Whether a node may have what the profile's constraint names.

    Only a plain feature is understood here; an expression such as `a|b` is Slurm's to judge.
    """
    plain = re.fullmatch(r"[\w.-]+", profile.constraint or "")
    return plain is None or profile.constraint in node.features


def why_none_fits(profile: ClusterConfig, nodes: Sequence[NodeKind]) -> str:
    """Why no node, even one out of service, has what the profile asks for, in the site's numbers; "" if some do."""
    missing = {lacks(profile, node) for node in nodes}
    where = f"partition {profile.partition}" if profile.partition else "this cluster"
    if not nodes or "" in missing:
        return _why_too_few(profile, nodes, where)
    if missing == {"gpus"}:
        return _why_no_gpus(profile, nodes, where)
    if missing == {"constraint"}:
        return unknown_name("cluster.constraint", profile.constraint or "", set().union(*(n.features for n in nodes)))
    asked = f"{needed_cores(profile)} cores"
    asked += f", {asks_gpus(profile)} GPUs" if asks_gpus(profile) else ""
    asked += f" of type {profile.gpu_type}" if profile.gpu_type and asks_gpus(profile) else ""
    asked += f", {needed_mb(profile) / 1024:.0f} GB" if needed_mb(profile) else ""
    asked += f", feature {profile.constraint}" if profile.constraint else ""
    names = ", ".join(f"cluster.{name}" for name in sorted(missing))
    return f"no node of {where} has {asked}; it has {_told(nodes)}. Ask for less: {names}"


def _why_too_few(profile: ClusterConfig, nodes: Sequence[NodeKind], where: str) -> str:
    by_partition = collections.Counter[str]()
    for node in nodes:
        by_partition[node.partition] += 0 if lacks(profile, node) else node.count
    most = max(by_partition.values(), default=0)
    if not nodes or profile.nodes <= most:
        return ""
    return f"cluster.nodes={profile.nodes}: {where} has {most} nodes with what a cell asks for; it has {_told(nodes)}"


def _why_no_gpus(profile: ClusterConfig, nodes: Sequence[NodeKind], where: str) -> str:
    kind, most = profile.gpu_type, max(node.gpus_of(profile.gpu_type) for node in nodes)
    types = {name for node in nodes for name in node.gpus if name}
    head = f"cluster.gpus={profile.gpus}: no node of {where} has"
    if not any(node.gpus for node in nodes):
        return f"{head} GPUs; choose another with cluster.partition, or set cluster.gpus=0, or cluster.gpus_by=none"
    if kind and not most:
        if not types:
            return f"{head} GPUs with a type; set cluster.gpus={profile.gpu_count}. It has {_told(nodes)}"
        return f"{head} GPUs of type {kind}; {unknown_name('type of GPU', kind, types)} It has {_told(nodes)}"
    return f"{head} more than {most} GPUs{f' of type {kind}' if kind else ''}; set cluster.gpus to at most {most}"


def _told(nodes: Iterable[NodeKind]) -> str:
    return "; ".join(dict.fromkeys(map(str, nodes)))
