"""The login node's part of `bushpc doctor --slurm`: submit the probe, stop it as clusters stop jobs, read its logs.

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
import json
import shlex
import time
import types
import typing as t
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check
from bushpc.cluster.profile import shell_lines
from bushpc.cluster.records import Job, JobRequest, JobState
from bushpc.cluster.slurm_site import how_jobs_end, longest_minutes
from bushpc.config import CellConfig, ClusterConfig
from bushpc.dispatch.requeue import command_at_end
from bushpc.dispatch.snapshot import take_snapshot
from bushpc.errors import DispatchError
from bushpc.files import write_atomically
from bushpc.ops.probe import BEAT_S, FAREWELL, Probe, batch_lines
from bushpc.ops.survey_story import (
    LIMIT_LEAD_S,
    LIMIT_MIN,
    WAYS,
    Logs,
    Story,
    clock_check,
    judge,
    node_checks,
    read_events,
    story_of,
)
from bushpc.runs.layout import RunDir

Say = Callable[[str], None]

POLL_S = 0.5
QUEUE_S = 5.0
SAY_S = 20.0
# Long enough for a busy site's requeue delay; a job that is forgotten ends by the probe's own silence long before.
PROBE_MIN = 15
# A running probe that writes nothing for so long will not.
START_S = 300.0
# Time for a signal to arrive; Slurm sends within a second.
ARRIVAL_S = 3.0
PREEMPT_S = 300.0
END_S = 120.0
COMPETITOR_S = 5
CLEARED = "cleared up"


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
    """Submit probes, stop them in every requested way, and judge their logs. Takes minutes plus the wait in the queue.

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
        clock_check(clock),
        *node_checks(facts, config),
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
    """Stop the probe's attempts one after the other, one attempt per story."""
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
    """Submits probes and watches them; all its jobs end with the `with` block, even after an error."""

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
            setup=shell_lines(profile, self.folder, take_snapshot(self.folder)),
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
        """Sleep, and keep the pulse going meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._beat()
            time.sleep(POLL_S)

    def until(self, answer: Callable[[], bool], what: str, job: ProbeJob) -> None:
        """Wait for an answer that is true, however long the queue. Raises: DispatchError if it can no longer come."""
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


def _left_check(desk: Desk) -> Check:
    if desk.left:
        found, advice = f"jobs {', '.join(desk.left)} are still in the queue", "end them by hand"
        return Check(name=CLEARED, verdict=BROKEN, found=found, advice=advice)
    return Check(name=CLEARED, verdict=OK, found="nothing of the probe is in the queue any more")
