"""What the probe's logs say: one story per way of being stopped, and what follows from it for a run.

logs of one attempt ─story_of→ Story ─judge→ checks        facts of rank 0 ─node_checks→ checks
"""

from __future__ import annotations

import json
import typing as t
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check
from bushpc.cluster.slurm_site import NOT_NEEDED, ONLY_AFTER_RESTART
from bushpc.config import CellConfig
from bushpc.files import size_text
from bushpc.ops.gpu_build import Build, judge_trial

Event = dict[str, t.Any]
# Source (`batch`, `rank0`, `child0` …) → its events in order.
Logs = dict[str, list[Event]]

# Slurm may send a signal up to a minute before the time that was asked for: at a limit of one minute that is before
# the probe listens.
LIMIT_MIN, LIMIT_LEAD_S = 2, 20
# Signals closer together than this were sent together.
BURST_S = 0.5
# A process that the same KILL ended cannot have beaten on for longer.
SAME_KILL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Story:
    """What one way of being stopped did to one attempt of the probe.

    how: requeue, signal, preempt or time_limit.
    heard: source → its signals, each with the seconds after the first one on its node.
    kill_s: seconds from a rank's first signal to its end, the shortest of all ranks; None if it was not killed.
    outlived_s: longest time that a child lived on after its rank.
    """

    how: str
    heard: dict[str, list[tuple[float, str]]]
    kill_s: float | None
    outlived_s: float

    @property
    def reached_ranks(self) -> bool:
        """Whether every rank heard a signal that asks it to stop; CONT alone does not."""
        ranks = [signals for source, signals in self.heard.items() if source.startswith("rank")]
        return bool(ranks) and all(any(name != "CONT" for _, name in signals) for signals in ranks)

    def told(self, kind: str) -> str:
        """`CONT+TERM at 0.0 s, TERM at 10.0 s` for batch, rank or child; ranks that heard others are told apart."""
        by_source = {source: signals for source, signals in self.heard.items() if source.rstrip("0123456789") == kind}
        phrases = {source: _bursts(signals) for source, signals in by_source.items()}
        names = {source: tuple(sorted(name for _, name in signals)) for source, signals in by_source.items()}
        if len(set(names.values())) <= 1:
            return next(iter(phrases.values()), "no log")
        return "; ".join(f"{source}: {phrase}" for source, phrase in phrases.items())


def read_events(path: Path) -> Iterator[Event]:
    """The events of one log; a line that is still being written is left for the next time."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def story_of(how: str, logs: Logs) -> Story:
    """Judge the logs of one attempt. Seconds count from the first stop signal that the same node's processes heard."""
    heard: dict[str, list[tuple[float, str]]] = {}
    lived, outlived = [], [0.0]
    for source, events in logs.items():
        first = _first_signal(source, logs)
        signals = [(event["time"], event["name"]) for event in events if event["kind"] == "signal"]
        heard[source] = [(round(at - first, 2), name) for at, name in signals if first is not None]
        if source.startswith("rank"):
            killed = how != "signal" and not any(event["kind"] == "left" for event in events)
            if killed and first is not None:
                lived.append(events[-1]["time"] - first)
            child = logs.get(f"child{source.removeprefix('rank')}", [])
            if killed and child:
                outlived.append(child[-1]["time"] - events[-1]["time"])
    return Story(how=how, heard=heard, kill_s=min(lived, default=None), outlived_s=round(max(outlived), 2))


def _first_signal(source: str, logs: Logs) -> float | None:
    """When the first stop signal came to a process on this one's node; the batch shell is on rank 0's."""
    number = source.removeprefix("rank").removeprefix("child").replace("batch", "0")
    together = [f"rank{number}", f"child{number}", *(["batch"] if number == "0" else [])]
    events = (event for name in together for event in logs.get(name, []) if event["kind"] == "signal")
    times = [event["time"] for event in events if event["name"] != "CONT"]  # CONT may come any time: gang scheduling
    return min(times, default=None)


def _bursts(signals: Sequence[tuple[float, str]]) -> str:
    bursts: list[tuple[float, list[str]]] = []
    for at, name in signals:
        if bursts and at - bursts[-1][0] <= BURST_S:
            bursts[-1][1].append(name)
        else:
            bursts.append((at, [name]))
    return ", ".join(f"{'+'.join(sorted(set(names)))} at {round(at, 1) + 0.0} s" for at, names in bursts) or "nothing"


WAYS = {
    "requeue": "requeue",
    "signal": "TERM to the ranks",
    "preempt": "preemption",
    "time_limit": f"time limit, USR2 {LIMIT_LEAD_S} s before it",
}


def judge(story: Story) -> Iterator[Check]:
    """The check of one story: what happened, and the advice that follows for a run."""
    found = f"rank: {story.told('rank')}; its child: {story.told('child')}; batch shell: {story.told('batch')}"
    if story.kill_s is not None:
        found += f"; KILL after {story.kill_s:.1f} s"
    silent = "ranks are not told: only periodic saves count. Lower train.save_every, and ask the site"
    yield Check(
        name=WAYS[story.how],
        verdict=OK if story.reached_ranks else BROKEN,
        found=found,
        advice="" if story.reached_ranks else silent,
    )
    if story.outlived_s > SAME_KILL_S:
        yield Check(
            name="orphans",
            verdict=WARNING,
            found=f"a rank's child lived on for {story.outlived_s:.1f} s after its rank at {WAYS[story.how]}",
            advice="tell the site: Slurm does not track all processes of a job (ProctrackType)",
        )


def clock_check(clock: tuple[float, float] | None) -> Check:
    if clock is None:
        return Check(name="clock of the node", verdict=WARNING, found="not compared: the probe did not answer in time")
    ahead, unsure = clock
    bad = abs(ahead) - unsure > 2
    advice = "times in logs of several nodes cannot be compared: ask the site to mend its NTP" if bad else ""
    found = f"{ahead:+.1f} s against this one (give or take {unsure:.1f} s)"
    return Check(name="clock of the node", verdict=WARNING if bad else OK, found=found, advice=advice)


def node_checks(facts: Mapping[str, dict[str, t.Any]], config: CellConfig) -> Iterator[Check]:
    first = facts["rank0"]
    hosts = sorted({fact["node"] or fact["host"] for fact in facts.values()})
    yield Check(name="nodes seen", verdict=OK, found=", ".join(hosts))
    environment = [name for name, value in first["environment"].items() if value is not None]
    missing = [name for name in first["environment"] if name not in (*environment, *ONLY_AFTER_RESTART)]
    found = f"has {', '.join(environment)}" + (f"; not {', '.join(missing)}" if missing else "")
    yield Check(name="rank's environment", verdict=OK, found=found)
    for name, why in first["commands"].items():
        # A container need not have them: the batch shell outside asks.
        needed = name not in NOT_NEEDED and not config.cluster.container.used
        yield Check(
            name=f"{name} on the node",
            verdict=WARNING if why else OK,
            found=why or "works",
            advice="a stopped cell cannot requeue itself there: submit it again" if why and needed else "",
        )
    unknown = sorted({f"{name} ({why})" for fact in facts.values() for name, why in fact["names"].items() if why})
    if len(hosts) > 1 or unknown:
        bad = bool(unknown) and config.cluster.nodes > 1
        found = f"not from every node: {'; '.join(unknown)}" if unknown else "resolve from every node"
        advice = "ranks then meet by the host's own name; if that fails too, ask the site" if bad else ""
        yield Check(name="node names", verdict=WARNING if bad else OK, found=found, advice=advice)
    gpus, needed_gpus = first["gpus"], config.cluster.gpu_count
    found = f"{len(gpus)} seen by rank 0 ({', '.join(sorted(set(gpus))) or 'no driver'}); NCCL {first['nccl'] or 'no'}"
    verdict = BROKEN if needed_gpus > len(gpus) else OK
    yield Check(
        name="GPUs on the node", verdict=verdict, found=found, advice="" if verdict == OK else "lower cluster.gpus"
    )
    if gpus and (trial := first.get("gpu_trial")):
        build = Build.of(trial["build"]) if trial["build"] else Build.installed()
        yield from judge_trial(gpus, trial["failed"], build, precision=config.engine.precision)
    if staging := first.get("staging"):
        found = staging["why"] or f"{staging['folder']}, {size_text(staging['free'])} free"
        advice = "cells read the shared folders; set cluster.staging to a folder of the node" if staging["why"] else ""
        verdict = WARNING if staging["why"] else OK
        yield Check(name=f"staging {config.cluster.staging}", verdict=verdict, found=found, advice=advice)
    found = f"/dev/shm {size_text(first['shm_bytes'])}, {size_text(first['scratch_free'])} free in "
    found += f"{first['scratch']}, {first['cpus']} cores, {first['open_files']} open files"
    yield Check(name="room on the node", verdict=OK, found=found)
    if first["cpus"] < config.cluster.cpus_per_rank:
        found = (
            f"rank 0 may use {first['cpus']} of the cluster.cpus_per_rank={config.cluster.cpus_per_rank} it asked for"
        )
        launcher = cluster_for(config.cluster.executor).launcher
        advice = f"ask the site how ranks are bound to cores; cluster.{launcher}.cpu-bind=none lifts it"
        yield Check(name="cores of a rank", verdict=BROKEN, found=found, advice=advice)
