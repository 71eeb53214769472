"""The runs of a drill as they can be seen from outside, and the cluster that they are on.

Run ← the files of a run folder, its job        Site ─signal, requeue, kill, competing job→ Run
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
import typing as t
from collections.abc import Callable, Sequence
from pathlib import Path

from bushpc.cluster.base import Cluster
from bushpc.cluster.records import Job, JobState
from bushpc.config import CellConfig
from bushpc.dispatch.jobs import queue_cells
from bushpc.dispatch.plan import Plan
from bushpc.dispatch.run_folder import write_run
from bushpc.errors import DispatchError
from bushpc.ops.drill_found import KILL, REQUEUE, TERM, USR2
from bushpc.ops.processes import SEARCH, RunProcess, kill_rank, processes_of
from bushpc.runs.goodput import Attempt, read_attempts, read_note
from bushpc.runs.layout import SEAL_FILE, RunDir
from bushpc.runs.records import Heartbeat

Say = Callable[[str], None]
Answer = t.TypeVar("Answer")

POLL_S = 0.1
# A cluster's controller serves the whole site.
QUEUE_S = 2.0
SAY_S = 20.0
# Processes of a job that has just ended may be on their way out.
SETTLE_S = 10.0
END_S = 120.0
COMPETITOR_S = 5
PREEMPT_S = 300.0


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
        """Whether training is over."""
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
        seal = self.cell_dir.checkpoint(step) / SEAL_FILE
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
        with contextlib.suppress(DispatchError):  # must not hide the error that ended the drill
            if self.jobs:
                self.cluster.cancel(self.jobs, now=self.cluster.one_machine)
            if self.cluster.one_machine:  # also processes whose controller has died
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
        """The state of its job, None once it has ended; cached for QUEUE_S seconds unless `fresh`."""
        if fresh or self.cluster.one_machine or time.monotonic() - self._asked > QUEUE_S:
            self._states = self.cluster.states(self.jobs)
            self._asked = time.monotonic()
        return self._states.get(run.job.id)

    def gone(self, run: Run) -> bool:
        """Whether its job has ended for good."""
        # A job that has just been submitted may be younger than the last answer.
        return self.job_state(run) is None and self.job_state(run, fresh=True) is None

    def state(self, run: Run) -> str:
        """The state of its job in words."""
        state = self.job_state(run)
        return f"job {run.job.id} {state.word if state else 'has ended'}"

    def wait_for_end(self, run: Run, since: float) -> float | None:
        """Wait until all ranks have ended, and return when that was; None if it cannot be told."""
        if self.cluster.one_machine:
            run.until(lambda: not processes_of(run.run_dir) or None, "the ranks to end")
            return time.time()
        before = run.attempt_number

        def ended() -> bool | None:  # a batch shell that was killed noted nothing
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
    """The processes that remain after SETTLE_S seconds."""
    deadline = time.monotonic() + SETTLE_S
    while (found := search()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found
