"""`bushpc drill`: does a run survive here? Two short runs of the user's own configuration, one of them disturbed.

    config → undisturbed run → the same, disturbed: TERM, USR2, requeue, KILL of a rank, a competing job
           → what each of them cost, and whether weights and ledger ended as if nothing had been

runs/drill-<time>/
  undisturbed/, disturbed/   run folders as `bushpc cv` writes them, of one cell each
  times                      when the batch shells started, and when their ranks had ended
  drill.md                   what was found
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
import typing as t
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc.cluster.base import Cluster, Job, JobState, cluster_for
from bushpc.config import CellConfig
from bushpc.dispatch.jobs import queue_cells
from bushpc.dispatch.plan import Plan, cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import write_atomically
from bushpc.ops.audit import audit_run
from bushpc.ops.processes import SEARCH, RunProcess, kill_rank, processes_of
from bushpc.runs.goodput import Attempt, Goodput, goodput, read_attempts, read_note
from bushpc.runs.layout import RunDir
from bushpc.runs.records import Heartbeat

if t.TYPE_CHECKING:
    from rich.console import Group

Say = Callable[[str], None]
Answer = t.TypeVar("Answer")

# Steps that training is given per disturbance: to save, to be disturbed, and to hear of it in time.
STEPS_EACH, SAVES_EACH = 12, 3
# Less than so many seconds for them, and training may be over before the signal is there.
SECONDS_EACH = 2.5
POLL_S = 0.1
# A cluster's controller serves the whole site.
QUEUE_S = 2.0
SAY_S = 20.0
# Processes of a job that has just ended may be on their way out.
SETTLE_S = 10.0
# A process's start is known to a clock tick, and the next start may follow at once.
TICK_S = 0.05
END_S = 120.0
COMPETITOR_S = 5
PREEMPT_S = 300.0

TERM, USR2, REQUEUE, KILL, PREEMPT = "TERM", "USR2", "requeue", "KILL", "preempt"
QUEUE_WAYS, LOCAL_WAYS = (TERM, USR2, REQUEUE, KILL), (TERM, KILL)
TITLES = {
    TERM: "TERM to the ranks",
    USR2: "USR2 to the ranks",
    REQUEUE: "requeue",
    KILL: "KILL of one rank",
    PREEMPT: "preemption",
}
COLUMNS = ("disturbance", "at step", "lost", "back", "sealed", "ended", "waited", "started", "in all", "orphans")
LEGEND = (
    "lost: steps done again. back: by itself, or by submitting again. Seconds from the command: sealed, to the "
    "checkpoint on the disk; ended, to the end of all ranks; in all, to the first new step. waited: from the end to "
    "the next start, the queue included; started: from there to the first new step."
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one disturbance did. Seconds as in LEGEND, None where they could not be seen.

    how: one of TITLES. step: steps done when the ranks ended. lost: of these, done again. by_itself: False where the
    drill submitted again. orphans: what outlived the ranks. faults: promises that were broken.
    """

    how: str
    step: int
    lost: int = 0
    by_itself: bool = False
    sealed_s: float | None = None
    ended_s: float | None = None
    waited_s: float | None = None
    started_s: float | None = None
    total_s: float | None = None
    orphans: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Drill:
    """What was found.

    tensors: of the last checkpoint. differing: those that are not the same bits in both runs, each with the largest
    difference. ledgers: run → the audit's verdict. accounts: run → where its time went. faults: broken promises of
    the runs as a whole.
    """

    folder: Path
    steps: int
    save_every: int
    step_s: float
    outcomes: list[Outcome]
    tensors: int
    differing: dict[str, float]
    ledgers: dict[str, str]
    accounts: dict[str, Goodput]
    notes: list[str]
    faults: list[str]

    @property
    def ok(self) -> bool:
        """Whether all is as promised."""
        return not self.faults and not any(outcome.faults for outcome in self.outcomes)

    def to_json(self) -> str:
        """For machines."""
        content = {**vars(self), "folder": str(self.folder), "ok": self.ok}
        content["outcomes"] = [dataclasses.asdict(outcome) for outcome in self.outcomes]
        content["accounts"] = {name: account.to_dict() for name, account in self.accounts.items()}
        return json.dumps(content, indent=1)


def drill(config: CellConfig, *, command: Sequence[str], preempt_with: str | None, say: Say) -> Drill:
    """Run the drill: two short trainings with their evaluations, and the waits in the queue that each return takes.

    command: what the user typed, for run.json. preempt_with: the cluster's options for a competing job that may preempt
    this one. say: takes a line of progress. Leaves no job behind, however it ends.
    Raises: ConfigError, DataError, WeightsError for what cannot run at all; DispatchError when the cluster refuses, or
    a run fails for a reason of its own.
    """
    cluster = cluster_for(config.cluster.executor)
    if preempt_with is not None and not cluster.requeues:
        raise ConfigError(
            f"--preempt-with: no job competes with one of cluster={config.choices['cluster']}; give a cluster with a "
            "queue, for example cluster=slurm"
        )
    ways = [*(QUEUE_WAYS if cluster.requeues else LOCAL_WAYS), *([PREEMPT] if preempt_with is not None else [])]
    cell = cv_plan(config).cells[f"fold{config.fold or 0}"]
    folder = Path(cell.runs_dir or "runs") / time.strftime("drill-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    site = Site(cluster, folder, say, preempt_with)
    with contextlib.closing(site):
        quiet, each = _undisturbed(cell, folder, command, site, len(ways))
        hurt = Run(shorten(cell, folder, "disturbed", each, len(ways)), command, site)
        hurt.submit()
        outcomes = [disturb(hurt, how) for how in ways]
        hurt.until_done()
        orphans = site.left_behind([quiet, hurt])
    found = judge(quiet, hurt, outcomes, orphans, site)
    write_atomically(folder / "drill.md", to_markdown(found))
    return found


def _undisturbed(cell: CellConfig, folder: Path, command: Sequence[str], site: Site, ways: int) -> tuple[Run, int]:
    """The undisturbed run, and its steps per disturbance: more than usual where steps turn out to be quick."""
    each, name = STEPS_EACH, "undisturbed"
    while True:
        run = Run(shorten(cell, folder, name, each, ways), command, site)
        site.say(f"{name}: {run.cell.train.iterations} steps, a checkpoint every {run.save_every}, and the evaluation")
        run.submit()
        run.until_done()
        if each * run.step_seconds() >= SECONDS_EACH:
            return run, each
        each, name = math.ceil(1.2 * SECONDS_EACH / run.step_seconds()), f"{name}-longer"
        site.say("its steps are too quick for a signal to come between them; once more with more of them")


def shorten(cell: CellConfig, folder: Path, name: str, each: int, ways: int) -> CellConfig:
    """The cell with `each` training steps per disturbance and as many at the end; it saves often, and logs each step.

    Its evaluation stays whole. On the way its batch shell notes when it starts, and when its ranks have ended.
    """
    train = dataclasses.replace(
        cell.train,
        iterations=each * (ways + 1),
        # Both runs get to their last step; what an early stop remembers is at stake all the same.
        stop_patience=cell.train.stop_patience and each * (ways + 1) + 1,
        save_every=max(1, each // SAVES_EACH),
        keep=max(2, cell.train.keep),
        keep_every=0,
        keep_best=None,
        log_every=1,
        validate_every=0,
        weights_from=None,
    )
    times = shlex.quote(str(folder / "times"))
    at_start, at_end = (f"echo {what} $(date +%s.%N) >>{times}" for what in ("start", "end"))
    lines = cluster_for(cell.cluster.executor).around_ranks(at_start, at_end)
    cluster = dataclasses.replace(cell.cluster, setup=(*cell.cluster.setup, *lines))
    return dataclasses.replace(cell, name=name, runs_dir=str(folder), train=train, cluster=cluster, resume_changes=())


def disturb(run: Run, how: str) -> Outcome:
    """Wait for a good moment, disturb the run, and follow it until it goes on."""
    site = run.site
    run.until(run.is_saved_and_on_its_way, f"the steps before {TITLES[how]}")
    before, faults = run.attempt_number, []
    if run.over:
        faults.append("came when training was over")
    site.say(f"{TITLES[how]} after step {run.lines()[-1][0]}")
    since = time.time()
    try:
        site.act(how, run)
    except DispatchError as error:
        return Outcome(how=how, step=run.lines()[-1][0], faults=(str(error),))
    ended = site.wait_for_end(run, since)
    logged = run.lines()
    by_itself = site.comes_back(run, before)
    if not by_itself:
        site.say("nothing brings it back here; submitted again")
        run.submit()
    first = run.until(lambda: run.first_sign(before, len(logged)), "the first step after it")
    started = site.started(ended or since)
    orphans = [process for process in site.processes(run) if process.started < (ended or since) - TICK_S]
    reached, resumed = max((step for step, _ in logged), default=0), run.resumed_from
    outcome = Outcome(
        how=how,
        step=reached,
        lost=max(0, reached - resumed),
        by_itself=by_itself,
        sealed_s=None if how == KILL else _between(since, run.sealed_at(resumed)),
        ended_s=_between(since, ended),
        waited_s=_between(ended, started),
        started_s=_between(started, first),
        total_s=_between(since, first),
        orphans=tuple(map(str, orphans)),
    )
    site.say(f"went on from step {resumed}, {outcome.lost} steps lost, {outcome.total_s:.1f} s after the command")
    return dataclasses.replace(outcome, faults=(*faults, *_broken_promises(outcome, run)))


def _broken_promises(outcome: Outcome, run: Run) -> list[str]:
    faults = []
    allowed = run.save_every + run.steps_in_a_write() if outcome.how == KILL else 0
    if outcome.lost > allowed:
        faults.append(f"lost {outcome.lost} steps, at most {allowed} are promised")
    if outcome.orphans:
        faults.append(f"outlived the ranks: {', '.join(outcome.orphans)}")
    # What kills a rank may be the run's own doing, so nobody promises to start it again.
    if run.site.cluster.requeues and not outcome.by_itself and outcome.how != KILL:
        faults.append("did not come back by itself")
    grace_s = run.cell.cluster.grace_s
    if grace_s and outcome.how != KILL and (outcome.ended_s or 0.0) > grace_s:
        faults.append(f"took {outcome.ended_s:.1f} s to end; the site gives {grace_s:g} s (cluster.grace_s)")
    return faults


def judge(quiet: Run, hurt: Run, outcomes: list[Outcome], orphans: list[RunProcess], site: Site) -> Drill:
    """Hold the disturbed run against the undisturbed one."""
    notes, faults = list(site.notes), list(site.faults)
    tensors, differing = compare_checkpoints(quiet.last_checkpoint, hurt.last_checkpoint)
    if differing and quiet.cell.engine.deterministic:
        faults.append(f"{len(differing)} of {tensors} tensors of the last checkpoint differ from the undisturbed run's")
    elif not quiet.cell.engine.deterministic:
        notes.append("engine.deterministic=false: two undisturbed runs may differ in their bits, too")
    runs = {"undisturbed": quiet, "disturbed": hurt}
    ledgers = {name: audit_run(run.run_dir).cells[0] for name, run in runs.items()}
    faults += [f"ledger of the {name} run: {cell.violations[0]}" for name, cell in ledgers.items() if cell.violations]
    if orphans:
        faults.append(f"outlived the runs: {', '.join(map(str, orphans))}")
    if quiet.attempt_number:
        notes.append(f"the cluster itself stopped the undisturbed run, {quiet.attempt_number} time(s)")
    accounts = {name: goodput(read_attempts(run.cell_dir)) for name, run in runs.items()}
    return Drill(
        folder=quiet.run_dir.parent,
        steps=quiet.cell.train.iterations,
        save_every=quiet.save_every,
        step_s=round(quiet.step_seconds(), 4),
        outcomes=outcomes,
        tensors=tensors,
        differing=differing,
        ledgers={name: cell.verdict for name, cell in ledgers.items()},
        accounts={name: account for name, account in accounts.items() if account},
        notes=notes,
        faults=faults,
    )


def compare_checkpoints(ours: Path, theirs: Path) -> tuple[int, dict[str, float]]:
    """(number of tensors, part/name → largest absolute difference of those that are not the same, bit for bit).

    Infinite where only one has the tensor, or type or shape differ. Weights, optimizer and averages all count.
    """
    import torch
    from safetensors.torch import load_file

    def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
        files = sorted(folder.glob("*.safetensors"))
        return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}

    a, b = tensors_of(ours), tensors_of(theirs)
    differing = dict.fromkeys(a.keys() ^ b.keys(), math.inf)
    for name in a.keys() & b.keys():
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            differing[name] = math.inf
        elif a[name].numpy(force=True).tobytes() != b[name].numpy(force=True).tobytes():
            differing[name] = float((a[name].double() - b[name].double()).abs().max())
    return len(a.keys() | b.keys()), dict(sorted(differing.items()))


class Run:
    """One short run of one cell, as it can be seen from its files and its job. site: where its jobs run."""

    def __init__(self, cell: CellConfig, command: Sequence[str], site: Site) -> None:
        self.cell, self.command, self.site = cell, command, site
        self.name = f"fold{cell.fold}"
        self.run_dir = cell.run_dir
        self.cell_dir = RunDir(self.run_dir).cell(self.name)
        self.save_every = cell.train.save_every
        self.job = Job(id="", executor=cell.cluster.executor)  # none yet
        self.code = self.run_dir

    def submit(self) -> None:
        """As `bushpc cv` does, without a report."""
        if not self.run_dir.exists():
            self.run_dir.mkdir(parents=True)
            plan = Plan(kind="drill", cells={self.name: self.cell}, wanted=[self.name])
            self.code = write_run(self.run_dir, plan, self.command)
        [self.job] = queue_cells(self.run_dir, {self.name: self.cell.cluster}, self.code)
        self.site.jobs.append(self.job)

    @property
    def attempt_number(self) -> int:
        """Of the latest start, from 0; -1 before the first."""
        attempt = self._attempt()
        return attempt.number if attempt else -1

    @property
    def resumed_from(self) -> int:
        """Steps that were done when the latest start began to train."""
        attempt = self._attempt()
        return attempt.from_step if attempt else 0

    @property
    def over(self) -> bool:
        """Whether training is."""
        return Heartbeat.read_valid(self.cell_dir.heartbeat).phase in ("evaluating", "done")

    @property
    def last_checkpoint(self) -> Path:
        return self.cell_dir.checkpoint(self.cell.train.iterations)

    def lines(self) -> list[tuple[int, float]]:
        """(steps done, when) of every step that was logged, in order; those done again are there again."""
        path = self.cell_dir.metrics
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        parsed = [json.loads(line) for line in lines if line.endswith("\n")]
        return [(line["step"], line["time"]) for line in parsed if line["kind"] == "train"]

    def is_saved_and_on_its_way(self) -> bool:
        """Whether this start has sealed a checkpoint and gone on since; at the latest when training is over."""
        lines = self.lines()
        saved = self.cell_dir.newest_step()
        return self.over or bool(lines and lines[-1][0] > saved > self.resumed_from)

    def first_sign(self, attempt: int, lines: int) -> float | None:
        """When the first step behind `lines` was logged by a start after `attempt`; None before that.

        A start that finds training over has no step; then its evaluation is the sign.
        """
        if self.attempt_number <= attempt:
            return None
        new = self.lines()[lines:]
        if new:
            return new[0][1]
        return Heartbeat.read_valid(self.cell_dir.heartbeat).time if self.over else None

    def sealed_at(self, step: int) -> float | None:
        """When the checkpoint of `step` was sealed, by the file server's clock."""
        seal = self.cell_dir.checkpoint(step) / "seal.json"
        return seal.stat().st_mtime if seal.exists() else None

    def step_seconds(self) -> float:
        """Mean seconds of a step."""
        lines = self.lines()
        return max(1e-4, (lines[-1][1] - lines[0][1]) / max(1, len(lines) - 1))

    def steps_in_a_write(self) -> int:
        """How many steps training does while a checkpoint is on its way to the disk."""
        measured = [read_note(path) for path in self.cell_dir.checkpoints.glob("step_*/meta.json")]
        return max((math.ceil(meta["save_s"] / meta["step_s"]) for meta in measured if meta["step_s"]), default=0)

    def until_done(self) -> None:
        """Wait for training and evaluation."""
        self.until(self.cell_dir.done.exists, f"the {self.run_dir.name} run to finish")

    def until(self, question: Callable[[], Answer | None], what: str) -> Answer:
        """Wait for an answer that is true, however long the queue. Raises: DispatchError if it can no longer come."""
        began = said = time.monotonic()
        while not (answer := question()):
            if self.site.gone(self):
                if answer := question():  # it ended with its job
                    break
                raise DispatchError(f"waiting for {what}: {self._why_gone()}")
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                self.site.say(f"waiting for {what}: {self.site.state(self)}, {said - began:.0f} s")
            time.sleep(POLL_S)
        return answer

    def _attempt(self) -> Attempt | None:
        attempts = read_attempts(self.cell_dir)
        return attempts[-1] if attempts else None

    def _why_gone(self) -> str:
        failed = self.cell_dir.failed
        reason = failed.read_text().partition("\n")[0] if failed.exists() else "it ended early"
        return f"job {self.job.id}: {reason}; its log: {self.job.log}"


class Site:
    """The cluster that the runs are on, as the drill sees it. `close` takes all their jobs away.

    notes: what the reader should know. faults: what could not be done or seen.
    """

    def __init__(self, cluster: Cluster, folder: Path, say: Say, preempt_with: str | None) -> None:
        self.cluster, self.folder, self.say, self.preempt_with = cluster, folder, say, preempt_with
        self.jobs: list[Job] = []
        self.notes: list[str] = []
        self.faults: list[str] = []
        self._states: dict[str, JobState] = {}
        self._asked = 0.0
        self._nodes: dict[str, None] = {}  # all that were ever used, in order

    def close(self) -> None:
        """End every job that was submitted."""
        with contextlib.suppress(DispatchError):  # whatever ended the drill is the better error
            if self.jobs:
                self.cluster.cancel(self.jobs, now=self.cluster.one_machine)
            if self.cluster.one_machine:  # also what lost its controller
                for process in processes_of(self.folder):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + END_S
            while self.jobs and self.cluster.states(self.jobs) and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def act(self, how: str, run: Run) -> None:
        """Disturb the run. Raises: DispatchError if that cannot be done here."""
        self._nodes |= dict.fromkeys(self._nodes_of(run))
        if how in (TERM, USR2):
            self.cluster.signal(run.job, how)
        elif how == REQUEUE:
            self.cluster.requeue(run.job.id)
        elif how == KILL:
            self._kill(run)
        else:
            self._compete(run)

    def job_state(self, run: Run, fresh: bool = False) -> JobState | None:
        """Of its job, None once it is over; the cluster is asked seldom, unless `fresh`."""
        if fresh or self.cluster.one_machine or time.monotonic() - self._asked > QUEUE_S:
            self._states = self.cluster.states(self.jobs)
            self._asked = time.monotonic()
        return self._states.get(run.job.id)

    def gone(self, run: Run) -> bool:
        """Whether its job has ended for good."""
        # A job that has just been submitted may be younger than the last answer.
        return self.job_state(run) is None and self.job_state(run, fresh=True) is None

    def state(self, run: Run) -> str:
        """Of its job, in words."""
        state = self.job_state(run)
        return f"job {run.job.id} {state.word if state else 'has ended'}"

    def wait_for_end(self, run: Run, since: float) -> float | None:
        """Wait until all ranks have ended, and return when that was; None if it cannot be told."""
        if self.cluster.one_machine:
            run.until(lambda: not processes_of(run.run_dir) or None, "the ranks to end")
            return time.time()
        before = run.attempt_number

        def ended() -> bool | None:  # a batch shell that was killed left no word
            return self._noted("end", since) is not None or run.attempt_number > before or self.gone(run) or None

        run.until(ended, "the ranks to end")
        return self._noted("end", since)

    def comes_back(self, run: Run, attempt: int) -> bool:
        """Wait for a start after `attempt`; False when nothing will start it."""
        if not self.cluster.requeues:
            return False
        came = run.until(
            lambda: "yes" if run.attempt_number > attempt else "no" if self.gone(run) else None,
            "the job to come back",
        )
        return came == "yes" or run.attempt_number > attempt

    def processes(self, run: Run) -> list[RunProcess]:
        """All processes of the run on the nodes where it runs now."""
        nodes = self._nodes_of(run)
        self._nodes |= dict.fromkeys(nodes)
        return self._search(run, run.run_dir, nodes, inside=run.job)

    def left_behind(self, runs: Sequence[Run]) -> list[RunProcess]:
        """Processes of runs that are over, on all nodes that they ever had."""
        deadline = time.monotonic() + END_S
        while not all(self.gone(run) for run in runs) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return _settled(lambda: self._search(runs[0], self.folder, list(self._nodes), inside=None))

    def started(self, since: float) -> float | None:
        """When a batch shell first started after `since`."""
        return self._noted("start", since)

    def _noted(self, what: str, since: float) -> float | None:
        path = self.folder / "times"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return next((float(at) for kind, at in lines if kind == what and float(at) >= since), None)

    def _nodes_of(self, run: Run) -> list[str]:
        state = self.job_state(run, fresh=True)
        return self.cluster.node_names(state.nodes) if state else []

    def _search(self, run: Run, folder: Path, nodes: Sequence[str], inside: Job | None) -> list[RunProcess]:
        """What bushpc.ops.processes finds on these nodes; where it cannot be asked, a fault says so."""
        if self.cluster.one_machine:
            return processes_of(folder)
        if not nodes:
            return []
        try:
            told = self._on_nodes(run, inside, nodes, str(folder))
        except DispatchError as error:
            if inside and self.gone(run):  # it ended meanwhile, and the search in it as well
                return self._search(run, folder, nodes, inside=None)
            self.faults.append(f"orphans were not looked for on {','.join(nodes)}: {error}")
            return []
        found = {}
        for line in told.splitlines():
            process = RunProcess(**json.loads(line))
            found[process.node, process.pid] = process  # emulated nodes see each other's processes
        return list(found.values())

    def _on_nodes(self, run: Run, inside: Job | None, nodes: Sequence[str], *words: str) -> str:
        command = ["env", f"PYTHONPATH={run.code}", sys.executable, "-m", SEARCH, *words]
        return self.cluster.run_on_nodes(command, nodes, cwd=run.run_dir, inside=inside, profile=run.cell.cluster)

    def _kill(self, run: Run) -> None:
        last = run.cell.cluster.world_size - 1
        if self.cluster.one_machine:
            if not kill_rank(run.run_dir, last):
                raise DispatchError(f"no rank of {run.run_dir} runs on this machine")
            return
        try:
            self._on_nodes(run, run.job, self._nodes_of(run), str(run.run_dir), f"--kill={last}")
        except DispatchError as error:
            self.notes.append(f"KILL went to all ranks of the step, as one alone could not be reached: {error}")
            self.cluster.kill_ranks(run.job)

    def _compete(self, run: Run) -> None:
        """Submit a job that should preempt the run, on its own nodes. Raises: DispatchError if it does not."""
        assert self.preempt_with is not None
        since, state = time.time(), self.job_state(run, fresh=True)
        log, options = self.folder / "competitor.log", shlex.split(self.preempt_with)
        competitor = self.cluster.compete(state.nodes if state else "", options, log, COMPETITOR_S)
        self.jobs.append(competitor)
        deadline = time.monotonic() + PREEMPT_S
        while time.monotonic() < deadline:
            state = self.job_state(run, fresh=True)
            if self._noted("end", since) or state is None or state.word != "RUNNING":
                return
            rival = self._states.get(competitor.id)
            if rival is None or not (rival.waiting or rival.word == "CONFIGURING"):
                break
            time.sleep(POLL_S)
        raise DispatchError(
            f"`{self.preempt_with}` preempted nothing: give options with which you may preempt, "
            "such as a partition of higher tier and --exclusive"
        )


def _settled(search: Callable[[], list[RunProcess]]) -> list[RunProcess]:
    """What is still there after a while."""
    deadline = time.monotonic() + SETTLE_S
    while (found := search()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


def _between(begin: float | None, end: float | None) -> float | None:
    """Seconds, never below 0: clocks of two nodes may differ."""
    return None if begin is None or end is None else round(max(0.0, end - begin), 2)


# --- what people read ----------------------------------------------------------------------------------------------


def rows(found: Drill) -> list[tuple[str, ...]]:
    """One row of texts per disturbance, in the order of COLUMNS."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} s"

    return [
        (
            TITLES[outcome.how],
            str(outcome.step),
            str(outcome.lost),
            "by itself" if outcome.by_itself else "submitted",
            *map(
                seconds,
                (outcome.sealed_s, outcome.ended_s, outcome.waited_s, outcome.started_s, outcome.total_s),
            ),
            str(len(outcome.orphans)),
        )
        for outcome in found.outcomes
    ]


def summary(found: Drill) -> list[str]:
    """The lines below the table: weights, ledger, goodput, notes and broken promises."""
    same = f"all {found.tensors} tensors (weights, optimizer, averages) are the same, bit for bit"
    if found.differing:
        largest = max(found.differing.values())
        same = f"{len(found.differing)} of {found.tensors} tensors differ, by {largest:.3g} at most"
    lines = [
        f"{found.steps} steps of {1000 * found.step_s:.0f} ms, a checkpoint every {found.save_every}",
        f"last checkpoint against the undisturbed run's: {same}",
        "ledger: " + ", ".join(f"{name} {verdict}" for name, verdict in found.ledgers.items()),
    ]
    shares = {name: account.share for name, account in found.accounts.items()}
    told = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share is not None]
    lines.append(f"goodput: {', '.join(told)} (start-up weighs much in so short a run)")
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"BROKEN: {TITLES[outcome.how]} {fault}" for outcome in found.outcomes for fault in outcome.faults]
    lines += [f"BROKEN: {fault}" for fault in found.faults]
    return [*lines, "all as promised" if found.ok else "not as promised"]


def drill_table(found: Drill) -> Group:
    """What a terminal shows."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=str(found.folder), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in ("disturbance", "back") else "right")
    for outcome, row in zip(found.outcomes, rows(found), strict=True):
        table.add_row(*row, style="red" if outcome.faults else None)
    *lines, verdict = summary(found)
    texts = [Text(line, style="red" if line.startswith("BROKEN") else "") for line in lines]
    return Group(table, Text(LEGEND, style="dim"), *texts, Text(verdict, style="green" if found.ok else "red"))


def plain_lines(found: Drill) -> str:
    """What a log shows."""
    told = [", ".join(f"{name} {text}" for name, text in zip(COLUMNS[1:], row[1:], strict=True)) for row in rows(found)]
    return "\n".join([*(f"{row[0]}: {text}" for row, text in zip(rows(found), told, strict=True)), *summary(found)])


def to_markdown(found: Drill) -> str:
    """drill.md."""
    table = [COLUMNS, ("---",) * len(COLUMNS), *rows(found)]
    lines = [f"# Drill {found.folder.name}", "", *("| " + " | ".join(row) + " |" for row in table), "", LEGEND, ""]
    return "\n".join([*lines, *(f"- {line}" for line in summary(found)), ""])
