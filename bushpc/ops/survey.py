"""The login node's side of `bushpc doctor --slurm`: submit the probe, do to it what clusters do to jobs, read its logs.

    config → probe job (bushpc.ops.probe, in the form of a cell's job) → requeue, signal, a competitor, the time limit
    → logs → one story per way of being stopped → checks, and the site's configs/cluster/<name>.yaml

runs/doctor-<time>/
  requeue/, time_limit/   the logs, one file per attempt and process
  pulse                   what the probe answers to, and leaves when it falls silent
  jobs/, code/            see bushpc.dispatch.submit
  survey.json             what was found
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import re
import shlex
import textwrap
import time
import types
import typing as t
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from bushpc.cluster.base import Job, JobRequest, JobState, cluster_for
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check
from bushpc.cluster.profile import shell_lines
from bushpc.cluster.slurm_site import NOT_NEEDED, ONLY_AFTER_RESTART, how_jobs_end, longest_minutes
from bushpc.config import CellConfig, ClusterConfig, Settings, as_word, compose, places
from bushpc.config.fields import fields_of
from bushpc.config.read import plain
from bushpc.dispatch.requeue import command_at_end
from bushpc.dispatch.run_folder import snapshot
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import write_atomically
from bushpc.ops.gpu_build import Build, judge_trial
from bushpc.ops.probe import BEAT_S, FAREWELL, Probe, batch_lines
from bushpc.runs.layout import RunDir

Say = Callable[[str], None]
Event = dict[str, t.Any]
# Source (`batch`, `rank0`, `child0` …) → its events in order.
Logs = dict[str, list[Event]]

POLL_S = 0.5
QUEUE_S = 5.0
SAY_S = 20.0
# Long enough for a busy site's requeue delay; a job that is forgotten ends by the probe's own silence long before.
PROBE_MIN = 15
# Slurm may send a signal up to a minute before the time that was asked for: at a limit of one minute that is before
# the probe listens.
LIMIT_MIN, LIMIT_LEAD_S = 2, 20
# A running probe that writes nothing for so long will not.
START_S = 300.0
# Time for a signal to arrive; Slurm sends within a second.
ARRIVAL_S = 3.0
PREEMPT_S = 300.0
END_S = 120.0
COMPETITOR_S = 5
# Signals closer together than this are one act of Slurm's.
BURST_S = 0.5
# A process that the same KILL ended cannot have beaten on for longer.
SAME_KILL_S = 1.0
# Killed at once is measured as 0.0, and a cluster's grace_s has to be more than that.
LEAST_GRACE_S = 0.1
COMMENT_WIDTH = 118
CLEARED = "cleared up"


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


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the probe found.

    facts: source → what that rank sees on its node. grace_s: the shortest time from a stop signal to KILL that was
    seen, None if none was. time_limit_min: what the partition allows.
    """

    folder: Path
    stories: list[Story]
    facts: dict[str, dict[str, t.Any]]
    checks: list[Check]
    grace_s: float | None
    time_limit_min: float

    def to_dict(self) -> dict[str, t.Any]:
        """For machines: survey.json and --json."""
        return {
            "folder": str(self.folder),
            "stories": [dataclasses.asdict(story) for story in self.stories],
            "nodes": self.facts,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "grace_s": self.grace_s,
        }


def survey(config: CellConfig, *, time_limit: bool, preempt_with: str | None, say: Say) -> Survey:
    """Submit probes, stop them in every way that is asked for, and judge what they wrote: minutes beside the queue.

    time_limit: also let one run into a limit of two minutes. preempt_with: the cluster's options for a competing job
    that may preempt this one. say: takes a line of progress. Leaves no job behind, however it ends.
    Raises: DispatchError when the cluster refuses the probe, or the probe does not start.
    """
    folder = Path(config.runs_dir or "runs") / time.strftime("doctor-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    with Desk(config.cluster, folder, say) as desk:
        limited = desk.submit("time_limit", time_min=LIMIT_MIN, lead_s=LIMIT_LEAD_S) if time_limit else None
        job = desk.submit("requeue", time_min=PROBE_MIN)
        desk.until(lambda: job.ready(0), "the probe to start", job)
        clock = desk.clock_offset(job)
        stories, checks = _provoke(desk, job, preempt_with)
        if limited is not None:
            desk.until(lambda: desk.state(limited.job) is None, f"job {limited.id} to reach its limit", limited)
            stories.append(story_of("time_limit", limited.logs(limited.last_attempt())))
    facts = {
        source: next(event for event in events if event["kind"] == "facts")
        for source, events in job.logs(0).items()
        if source.startswith("rank")
    }
    checks = [
        *(check for story in stories for check in judge(story)),
        *checks,
        how_jobs_end(config.cluster),
        _clock_check(clock),
        *_node_checks(facts, config),
        _left_check(desk),
    ]
    killed = [story.kill_s for story in stories if story.how in ("requeue", "preempt") and story.kill_s is not None]
    found = Survey(
        folder=folder,
        stories=stories,
        facts=facts,
        checks=checks,
        grace_s=round(min(killed), 1) if killed else None,
        time_limit_min=longest_minutes(config.cluster),
    )
    write_atomically(folder / "survey.json", json.dumps(found.to_dict(), indent=1))
    return found


def _provoke(desk: Desk, job: ProbeJob, preempt_with: str | None) -> tuple[list[Story], list[Check]]:
    """Stop the probe's attempts one after the other: each story has an attempt of its own."""
    stories: list[Story] = []
    checks: list[Check] = []
    attempt = 0
    desk.say(f"job {job.id} runs; {WAYS['requeue']}")
    try:
        desk.cluster.requeue(job.id)
    except DispatchError as error:
        advice = "ask the site; until then a preempted run has to be submitted again by hand"
        checks.append(Check(name=WAYS["requeue"], verdict=BROKEN, found=str(error), advice=advice))
    else:
        checks.append(desk.comes_back(job, attempt, "requeue"))
        stories.append(story_of("requeue", job.logs(attempt)))
        attempt += 1
    if preempt_with is not None:
        if desk.compete(job, attempt, preempt_with):
            checks.append(desk.comes_back(job, attempt, "preempt"))
            stories.append(story_of("preempt", job.logs(attempt)))
            attempt += 1
        else:
            found = f"a job with the options `{preempt_with}` preempted nothing"
            advice = "give options with which you may preempt, such as a partition of higher tier and --exclusive"
            checks.append(Check(name="preemption", verdict=WARNING, found=found, advice=advice))
    desk.say(WAYS["signal"])
    desk.cluster.signal(job.job, "TERM")
    desk.wait(ARRIVAL_S)
    stories.append(story_of("signal", job.logs(attempt)))
    return stories, checks


@dataclass(frozen=True)
class ProbeJob:
    """One submitted probe. ranks: how many it has."""

    job: Job
    folder: Path
    ranks: int

    @property
    def id(self) -> str:
        return self.job.id

    def logs(self, attempt: int) -> Logs:
        """All that the attempt's processes have written so far."""
        paths = sorted(self.folder.glob(f"{attempt}-*.jsonl"))
        logs = {path.stem.partition("-")[2]: list(read_events(path)) for path in paths}
        return {"batch": [], **logs}  # a batch shell that hears nothing makes no file

    def last_attempt(self) -> int:
        """The number of the last start; somebody may have preempted the ones before."""
        return max((int(path.name.partition("-")[0]) for path in self.folder.glob("*-rank0.jsonl")), default=0)

    def ready(self, attempt: int) -> bool:
        """Whether every rank and child of the attempt listens."""
        logs = self.logs(attempt)
        wanted = [f"{kind}{i}" for kind in ("rank", "child") for i in range(self.ranks)]
        return all(any(event["kind"] == "ready" for event in logs.get(source, [])) for source in wanted)


class Desk:
    """Submits probes, watches them, and clears the table: whatever happens, its jobs end with the `with` block."""

    def __init__(self, profile: ClusterConfig, folder: Path, say: Say) -> None:
        self.profile, self.cluster = profile, cluster_for(profile.executor)
        self.folder = folder
        self.say = say
        self.left: list[str] = []
        self._jobs: list[Job] = []
        self._pulse = folder / "pulse"
        self._pulses: list[tuple[str, float]] = []
        self._asked = 0.0
        self._states: dict[str, JobState] = {}

    def __enter__(self) -> Desk:
        self._pulse.write_text("0")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._pulse.write_text(FAREWELL)
        with contextlib.suppress(DispatchError):  # whatever ended the survey is the better error
            self.cluster.cancel(self._jobs, now=True)
        deadline = time.monotonic() + END_S
        while (left := self._not_gone()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self.left = left

    def submit(self, label: str, *, time_min: int, lead_s: int | None = None) -> ProbeJob:
        """A probe in the very form of a cell's job, with lines that make its batch shell listen too."""
        logs = self.folder / label
        logs.mkdir()
        profile = dataclasses.replace(
            self.profile,
            time_min=min(time_min, self.profile.time_min),
            setup=(*self.profile.setup, *batch_lines(logs)),
        )
        request = JobRequest(
            name=f"bushpc-doctor-{label}",
            work=[
                Probe(folder=str(logs), pulse=str(self._pulse), staging=profile.staging, scratch=self.cluster.scratch)
            ],
            folder=RunDir(self.folder).jobs,
            profile=profile,
            setup=shell_lines(profile, self.folder, snapshot(self.folder)),
            at_end=command_at_end(self.folder),
            lead_s=lead_s,
        )
        [job] = self.cluster.submit(request)
        self._jobs.append(job)
        self.say(f"submitted probe job {job.id} ({label})")
        return ProbeJob(job, logs, profile.world_size)

    def state(self, job: Job, fresh: bool = False) -> JobState | None:
        """A job's state, None once it is over; the cluster is asked seldom, unless `fresh`."""
        if fresh or time.monotonic() - self._asked > QUEUE_S or job.id not in self._states:
            self._states = self.cluster.states(self._jobs)
            self._asked = time.monotonic()
        return self._states.get(job.id)

    def wait(self, seconds: float) -> None:
        """Let time pass, with a pulse now and then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._beat()
            time.sleep(POLL_S)

    def until(self, answer: Callable[[], bool], what: str, job: ProbeJob) -> None:
        """Wait for something of a job, however long the queue. Raises: DispatchError when it can no longer come."""
        began = said = time.monotonic()
        running_since: float | None = None
        while not answer():
            state = self.state(job.job)
            runs = state is not None and state.word == "RUNNING"
            running_since = (running_since or time.monotonic()) if runs else None
            if state is None and not answer():
                raise DispatchError(f"waiting for {what}: job {job.id} ended early; its log: {self._log_of(job)}")
            if running_since and time.monotonic() - running_since > START_S:
                raise DispatchError(
                    f"waiting for {what}: job {job.id} runs, and nothing of it is seen in {self.folder}. Is runs_dir "
                    f"shared with the compute nodes? Its log: {self._log_of(job)}"
                )
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                word = f"{state.word} {state.held}".strip() if state else "gone"
                self.say(f"waiting for {what}: job {job.id} {word}, {said - began:.0f} s")
            self.wait(POLL_S)

    def comes_back(self, job: ProbeJob, attempt: int, how: str) -> Check:
        """Wait for the next attempt; how long it took from the end of this one."""
        self.until(lambda: job.ready(attempt + 1), f"the probe to come back after {WAYS[how]}", job)
        ended = max(event["time"] for event in job.logs(attempt)["rank0"])
        again = job.logs(attempt + 1)["rank0"][0]["time"]
        found = f"{again - ended:.0f} s from the end of the job to its next start, the queue's wait included"
        return Check(name=f"back after {WAYS[how]}", verdict=OK, found=found)

    def compete(self, job: ProbeJob, attempt: int, options: str) -> bool:
        """Submit a job that should preempt the probe, on the probe's own nodes. Whether the probe was told to stop."""
        state = self.state(job.job, fresh=True)
        if state is None:
            raise DispatchError(f"job {job.id} ended early; its log: {self._log_of(job)}")
        log = self.folder / "competitor.log"
        competitor = self.cluster.compete(state.nodes, shlex.split(options), log, COMPETITOR_S)
        self._jobs.append(competitor)
        self.say(f"submitted job {competitor.id} to preempt job {job.id} on {state.nodes}")
        deadline = time.monotonic() + PREEMPT_S
        while time.monotonic() < deadline:
            if any(event["kind"] == "signal" for event in job.logs(attempt)["rank0"]):
                return True
            if job.ready(attempt + 1):
                return True  # killed without a word
            if self.state(competitor, fresh=True) is None:
                return False
            self.wait(2 * POLL_S)
        return False

    def clock_offset(self, job: ProbeJob) -> tuple[float, float] | None:
        """(seconds that the first node's clock is ahead of this one, uncertainty): the quickest answer to a pulse.

        The answer was written between the pulse and our reading of it, at an unknown moment (Cristian's algorithm).
        """
        best: tuple[float, float] | None = None
        for _ in range(5):
            self._beat()
            token, sent = self._pulses[-1]
            deadline = time.monotonic() + ARRIVAL_S
            while time.monotonic() < deadline:
                answers = [e for path in sorted(job.folder.glob("*-rank0.jsonl")) for e in read_events(path)]
                pong = next((event for event in answers if event.get("pulse") == token), None)
                if pong:
                    received = time.time()
                    sample = (pong["time"] - (sent + received) / 2, (received - sent) / 2)
                    best = min(best or sample, sample, key=lambda sample: sample[1])
                    break
                time.sleep(BEAT_S / 4)
        return best

    def _not_gone(self) -> list[str]:
        try:
            return list(self.cluster.states(self._jobs))
        except DispatchError:  # whatever ended the survey is the better error
            return [job.id for job in self._jobs]

    def _beat(self) -> None:
        token = str(len(self._pulses) + 1)
        self._pulses.append((token, time.time()))
        # In place: a renamed file would not be seen before a network file system's folder cache runs out.
        self._pulse.write_text(token)

    def _log_of(self, job: ProbeJob) -> str:
        logs = sorted(RunDir(self.folder).job_folder(job.id).glob("*.out"))
        return str(logs[0]) if logs else "none was written"


# --- what the logs say ---------------------------------------------------------------------------------------------


def read_events(path: Path) -> Iterator[Event]:
    """The events of one log; a line that is still being written is left for the next time."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
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
    """One story in words, and what follows from it for a run."""
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


def _clock_check(clock: tuple[float, float] | None) -> Check:
    if clock is None:
        return Check(name="clock of the node", verdict=WARNING, found="not compared: the probe did not answer in time")
    ahead, unsure = clock
    bad = abs(ahead) - unsure > 2
    advice = "times in logs of several nodes cannot be compared: ask the site to mend its NTP" if bad else ""
    found = f"{ahead:+.1f} s against this one (give or take {unsure:.1f} s)"
    return Check(name="clock of the node", verdict=WARNING if bad else OK, found=found, advice=advice)


def _node_checks(facts: Mapping[str, dict[str, t.Any]], config: CellConfig) -> Iterator[Check]:
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
        found = staging["why"] or f"{staging['folder']}, {staging['free'] / 1e9:.1f} GB free"
        advice = "cells read the shared folders; set cluster.staging to a folder of the node" if staging["why"] else ""
        verdict = WARNING if staging["why"] else OK
        yield Check(name=f"staging {config.cluster.staging}", verdict=verdict, found=found, advice=advice)
    found = f"/dev/shm {first['shm_bytes'] / 1e9:.1f} GB, {first['scratch_free'] / 1e9:.1f} GB free in "
    found += f"{first['scratch']}, {first['cpus']} cores, {first['open_files']} open files"
    yield Check(name="room on the node", verdict=OK, found=found)
    if first["cpus"] < config.cluster.cpus_per_rank:
        found = (
            f"rank 0 may use {first['cpus']} of the cluster.cpus_per_rank={config.cluster.cpus_per_rank} it asked for"
        )
        launcher = cluster_for(config.cluster.executor).launcher
        advice = f"ask the site how ranks are bound to cores; cluster.{launcher}.cpu-bind=none lifts it"
        yield Check(name="cores of a rank", verdict=BROKEN, found=found, advice=advice)


def _left_check(desk: Desk) -> Check:
    if desk.left:
        found, advice = f"jobs {', '.join(desk.left)} are still in the queue", "end them by hand"
        return Check(name=CLEARED, verdict=BROKEN, found=found, advice=advice)
    return Check(name=CLEARED, verdict=OK, found="nothing of the probe is in the queue any more")


# --- the site's profile --------------------------------------------------------------------------------------------


def profile_path(name: str, force: bool) -> Path:
    """Where the profile goes. Raises: ConfigError for a name that cannot be one, or is taken (without `force`)."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(f"--write {name!r}: a name of letters, digits, '_' and '-' is needed, then used as cluster=")
    path = places.new_config_folder() / "cluster" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not force:
        raise ConfigError(f"--write {name}: {path} exists; choose another name, or overwrite it with --force")
    return path


def completed(config: CellConfig, typed: Sequence[str], *, say: Say) -> CellConfig:
    """The config with what the site has for settings of its profile that are left open. typed: words, which win.

    Raises: ConfigError; DispatchError where the cluster does not answer.
    """
    given = {word.partition("=")[0] for word in typed}
    found = cluster_for(config.cluster.executor).suggest(config.cluster)
    if config.engine.device == "cpu" and given & {"engine", "engine.device"}:
        found = {key: value for key, value in found.items() if key not in ("gpus", "cells_per_job", "cpus_per_rank")}
    words = [f"cluster.{key}={as_word(value)}" for key, value in found.items() if f"cluster.{key}" not in given]
    if words:
        say(f"from the site: {' '.join(words)}")
    return compose([*words, *typed])


def profile_text(config: CellConfig, found: Survey, date: datetime.date) -> str:
    """A yaml with what differs from the defaults: composed values, the measured grace time, a comment per finding."""
    cluster = config.cluster
    if found.grace_s is not None:
        cluster = dataclasses.replace(cluster, grace_s=max(found.grace_s, LEAST_GRACE_S))
    if found.time_limit_min < cluster.time_min:
        cluster = dataclasses.replace(cluster, time_min=int(found.time_limit_min))
    template = places.config_file(f"cluster/{config.choices['cluster']}")
    stated = template.read_text(encoding="utf-8").splitlines() if template else []
    about = itertools.takewhile(lambda line: line.startswith("#"), stated)
    # Its first paragraph; where the template was measured itself, its findings are of another day.
    header = list(itertools.takewhile(lambda line: line != "#" and not line.startswith("# Measured "), about))
    if config.choices["cluster"] == cluster.executor:  # the file of its defaults, which says nothing of a site
        header = ["# This site's Slurm."]
    lines = []
    for field in dataclasses.fields(ClusterConfig):
        value = getattr(cluster, field.name)
        if field.name == "executor" or value != ClusterConfig.default(field.name):
            value = _what_differs(value)
            sentence = ClusterConfig.about(field.name).sentence
            lines += textwrap.wrap(sentence, COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{field.name}: {_yaml(value)}")
    measured = [f"# Measured {date.isoformat()} by `bushpc doctor --slurm`, from cluster={config.choices['cluster']}:"]
    there: list[Check] = []
    with contextlib.suppress(DispatchError):
        there += cluster_for(cluster.executor).describe()
        limits = cluster_for(cluster.executor).limits(cluster)
        there.append(Check(name="limits", verdict=OK, found=limits.why or "the site tells of none on jobs"))
    for check in (*there, *found.checks):
        if check.name != CLEARED:
            text = f"- {check.name}: {check.found}"
            measured += textwrap.wrap(text, COMMENT_WIDTH, initial_indent="# ", subsequent_indent="#   ")
    return "\n".join([*header, *measured, "", *lines]) + "\n"


def _what_differs(value: t.Any) -> t.Any:
    """Of a group of settings those that differ from their defaults, as plain data; anything else as it is."""
    if isinstance(value, Settings):
        own = {name: getattr(value, name) for name in fields_of(type(value))}
        return {name: plain(item) for name, item in own.items() if item != type(value).default(name)}
    return plain(value)


def _yaml(value: t.Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=math.inf)).removesuffix("...\n").strip()
