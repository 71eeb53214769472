"""How many more jobs a site's Slurm takes from this user, and the largest job that it ever starts.

    sacctmgr: association, its parents, QOS · scontrol: partition's QOS, MaxJobCount · squeue: what is taken → Limits

What Slurm does not tell (no accounting, or kept private) is no limit here; then its refusal tells at submission.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import math
import os
import re
import typing as t
from collections.abc import Callable, Iterator, Mapping, Sequence

from bushpc.cluster.base import NoAnswer, ask, patiently
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check
from bushpc.cluster.profile import tasks_per_node
from bushpc.cluster.records import Limits
from bushpc.cluster.slurm_ask import MAX_ARRAY_SIZE, minutes_of, partition_facts, site_settings
from bushpc.cluster.slurm_variables import in_force
from bushpc.errors import DispatchError

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# Values of AccountingStorageEnforce with which Slurm holds to the limits of associations and QOS.
ENFORCED = ("limits", "safe", "all")
ASSOCIATION = (
    *("account", "user", "partition", "parentname", "defaultqos", "qos", "maxsubmitjobs", "grpsubmitjobs"),
    *("maxjobs", "maxtres", "grptres", "maxwall"),
)
QOS = (
    *("name", "maxsubmitjobspu", "maxsubmitjobspa", "grpsubmitjobs", "maxjobspu", "maxtres", "maxtrespu", "grptres"),
    *("maxwall", "mintres"),
)
# Accounts above one another; more would be a loop.
DEEPEST = 10
# What Slurm says where a limit on the number of jobs is met; old versions say only the second, of other limits, too.
TOO_MANY = re.compile(r"\w*(?:MaxSubmitJob|GrpSubmitJob)\w*")
SOME_LIMIT = re.compile(r"(?:Assoc|QOS)\w*|Job violates accounting/QOS policy")


class Count(t.NamedTuple):
    """A limit on jobs in the queue. name: as the site sets it, and of what. taken: of it, by jobs that are there."""

    most: int
    name: str
    taken: int

    @property
    def room(self) -> int:
        return max(0, self.most - self.taken)


def read_limits(profile: ClusterConfig) -> Limits:
    """What Slurm allows jobs of this profile at present. Raises: NoAnswer, after `patiently`."""
    profile = in_force(profile)
    try:
        site = patiently(site_settings)
    except NoAnswer:
        raise
    except DispatchError:
        return Limits(jobs_at_once=MAX_ARRAY_SIZE)
    size, count = site.get("MaxArraySize", ""), site.get("MaxJobCount", "")
    at_once = max(1, int(size)) if size.isdecimal() else MAX_ARRAY_SIZE
    queue = _Queue()
    running: list[tuple[int, str]] = []
    counts = [Count(int(count), "MaxJobCount", queue.mine())] if count.isdecimal() else []
    never = ""
    if any(word in site.get("AccountingStorageEnforce", "") for word in ENFORCED):
        with contextlib.suppress(DispatchError):
            accounts, qualities = _associations(profile, site.get("ClusterName", "")), []
            with contextlib.suppress(DispatchError):
                qualities = _qualities(profile, accounts)
            running = [*_running(accounts, qualities)]
            counts += [*_account_counts(accounts, queue), *_quality_counts(qualities, accounts, queue)]
            never = "; ".join(_too_much(profile, accounts, qualities))
    tightest = min(counts, key=lambda count: count.room, default=None)
    most_running, why_running = min(running, default=(None, ""))
    limits = Limits(jobs_at_once=at_once, never=never, running=most_running, why_running=why_running)
    if tightest is None:
        return limits
    why = f"the site allows {tightest.most} in the queue ({tightest.name}), {tightest.taken} of them taken"
    return limits._replace(room=tightest.room, why=why)


def check_limits(profile: ClusterConfig) -> Iterator[Check]:
    """For the doctor: what `read_limits` finds."""
    limits = read_limits(profile)
    told = limits.why or "no limit on jobs in the queue that Slurm tells"
    told += f"; at most {limits.running} run at a time ({limits.why_running})" if limits.running is not None else ""
    if limits.never:
        yield Check(name="limits", verdict=BROKEN, found=limits.never, advice="ask for less, or for another account")
    elif limits.room == 0:
        yield Check(name="limits", verdict=WARNING, found=told, advice="submit when some of your jobs have ended")
    else:
        yield Check(name="limits", verdict=OK, found=told)


def explain_refusal(said: str) -> str | None:
    """What to do where Slurm refused jobs because there are too many; None for any other reason."""
    named = TOO_MANY.search(said)
    found = named or SOME_LIMIT.search(said)
    if found is None or not (named or found[0].startswith("Job")):
        return None
    return (
        f"the site takes no more jobs ({found[0]}; `squeue --me` lists those that are in the queue). Wait until some "
        "have ended and run the same command again, or let fewer jobs work through all cells: cluster.submit_window=N"
    )


class _Queue:
    """Jobs in the queue by account, QOS and partition; asked once, and others' only where a limit counts them."""

    def __init__(self) -> None:
        self._mine: list[list[str]] | None = None

    def mine(self, fits: Callable[[str, str, str], bool] = lambda *_: True) -> int:
        if self._mine is None:
            self._mine = self._ask(f"--user={os.getuid()}")
        return sum(fits(*row) for row in self._mine)

    def of_account(self, account: str) -> int:
        return len(self._ask(f"--account={account}"))

    def of_quality(self, quality: str, account: str | None = None) -> int:
        return len(self._ask(f"--qos={quality}", *([f"--account={account}"] if account else [])))

    @staticmethod
    def _ask(*which: str) -> list[list[str]]:
        try:
            lines = ask("squeue", "--noheader", "--array", *which, "--format=%a|%q|%P").splitlines()
        except DispatchError:
            return []
        return [line.split("|") for line in lines if line.count("|") == 2]


def _table(fields: Sequence[str], *question: str) -> list[dict[str, str]]:
    rows = ask("sacctmgr", "--noheader", "--parsable2", "show", *question, f"format={','.join(fields)}").splitlines()
    return [dict(zip(fields, row.split("|"), strict=False)) for row in rows if row]


def _associations(profile: ClusterConfig, cluster: str) -> list[dict[str, str]]:
    """The association that the profile's jobs get, and those of the accounts above it, from below."""
    user = getpass.getuser()
    mine = _table(ASSOCIATION, "assoc", f"user={user}", f"cluster={cluster}")
    account = profile.account
    if account is None:
        [row, *_] = [*_table(("defaultaccount",), "user", f"name={user}"), {"defaultaccount": ""}]
        account = row["defaultaccount"]
    mine = [row for row in mine if row["account"] == account]
    of_partition = [row for row in mine if row["partition"] and row["partition"] == profile.partition]
    found = (of_partition or [row for row in mine if not row["partition"]])[:1]
    while account and len(found) < DEEPEST:
        rows = _table(ASSOCIATION, "assoc", f"account={account}", f"cluster={cluster}")
        above = [row for row in rows if not row["user"]][:1]
        found += above
        account = above[0]["parentname"] if above else ""
    return found


def _qualities(profile: ClusterConfig, accounts: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The QOS of the profile's jobs, and that of their partition, which has the partition's name beside its own."""
    first = accounts[0] if accounts else {}
    own = profile.qos or first.get("defaultqos") or (first.get("qos", "").split(",")[0] or "normal")
    partitions = {
        facts["QoS"]: facts["PartitionName"]
        for facts in partition_facts(profile)
        if facts.get("QoS", "N/A") not in ("N/A", "")
    }
    rows = _table(QOS, "qos", f"name={','.join({own, *partitions})}")
    return [{**row, "partition": partitions.get(row["name"], "")} for row in rows]


def _account_counts(accounts: Sequence[Mapping[str, str]], queue: _Queue) -> Iterator[Count]:
    own = accounts[0]["account"] if accounts else ""
    own_limit = next(((row, most) for row in accounts if (most := _number(row["maxsubmitjobs"])) is not None), None)
    if own_limit:
        partition = accounts[0]["partition"]
        taken = queue.mine(lambda account, _, where: account == own and where.startswith(partition))
        yield Count(own_limit[1], f"MaxSubmitJobs of account {own_limit[0]['account']}", taken)
    for row in accounts:
        most = _number(row["grpsubmitjobs"])
        if most is not None:
            yield Count(most, f"GrpSubmitJobs of account {row['account']}", queue.of_account(row["account"]))


def _quality_counts(
    qualities: Sequence[Mapping[str, str]], accounts: Sequence[Mapping[str, str]], queue: _Queue
) -> Iterator[Count]:
    account = accounts[0]["account"] if accounts else None
    for row in qualities:
        name, partition = row["name"], row["partition"]
        of_user, of_account, of_all = (
            _number(row[key]) for key in ("maxsubmitjobspu", "maxsubmitjobspa", "grpsubmitjobs")
        )
        if of_user is not None:
            taken = queue.mine(lambda _, quality, where: quality == name or where == partition)  # noqa: B023
            yield Count(of_user, f"MaxSubmitJobsPerUser of QOS {name}", taken)
        if of_account is not None:
            yield Count(of_account, f"MaxSubmitJobsPerAccount of QOS {name}", queue.of_quality(name, account))
        if of_all is not None:
            yield Count(of_all, f"GrpSubmitJobs of QOS {name}", queue.of_quality(name))


def _running(
    accounts: Sequence[Mapping[str, str]], qualities: Sequence[Mapping[str, str]]
) -> Iterator[tuple[int, str]]:
    """Limits on jobs that run at the same time, with their names."""
    of_account = ((row["maxjobs"], f"MaxJobs of account {row['account']}") for row in accounts if row["maxjobs"])
    of_quality = ((row["maxjobspu"], f"MaxJobsPerUser of QOS {row['name']}") for row in qualities)
    for most, name in (*itertools.islice(of_account, 1), *of_quality):
        if (number := _number(most)) is not None:
            yield number, name


def _too_much(
    profile: ClusterConfig, accounts: Sequence[Mapping[str, str]], qualities: Sequence[Mapping[str, str]]
) -> Iterator[str]:
    """Limits that a single job of the profile would break, so that Slurm would never start it."""
    tasks = profile.nodes * tasks_per_node(profile)
    asks = {
        "node": profile.nodes,
        "cpu": tasks * profile.cpus_per_rank,
        "gres/gpu": profile.nodes * profile.gpu_count,
    }
    words = {"node": "nodes", "cpu": "cores", "gres/gpu": "GPUs"}
    rows = [(f"account {row['account']}", row) for row in accounts] + [(f"QOS {row['name']}", row) for row in qualities]
    for where, row in rows:
        for key in ("maxtres", "maxtrespu", "grptres"):
            for what, most in _resources(row.get(key, "")).items():
                if asks.get(what, 0) > most:
                    yield f"a job asks for {asks[what]} {words[what]}, and {where} allows {most} ({key} {what}={most})"
        for what, least in _resources(row.get("mintres", "")).items():
            if asks.get(what, least) < least:
                yield f"a job asks for {asks[what]} {words[what]}, and {where} wants {least} or more (mintres)"
        longest = minutes_of(row["maxwall"]) if row["maxwall"] else math.inf
        if profile.time_min > longest:
            yield f"cluster.time_min={profile.time_min}, and {where} allows {longest:.0f} minutes (maxwall)"


def _resources(text: str) -> dict[str, int]:
    """
    >>> _resources("cpu=4,gres/gpu=2,mem=4G")
    {'cpu': 4, 'gres/gpu': 2}
    """
    pairs = (word.partition("=") for word in text.split(","))
    return {key: int(value) for key, _, value in pairs if value.isdecimal()}


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
