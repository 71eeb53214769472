"""Do runs survive whatever a cluster does to them? All combinations on a real Slurm (tools/slurm_sandbox).

    {plain job, array task} x {7 ways to be stopped} x {during a step, a save, the evaluation} x {1 rank, 2 on 2 nodes},
    20 preemptions in a row, every engine on 2 nodes, stop on 2 ranks and finish on 1, and the other way,
    lanes (one job that works on one cell after the other) and packed jobs (two cells at a time)
    → weights, optimizer, predictions and ledger against an undisturbed run, orphans, ports, seconds → table

To hit a phase for certain, the ranks are frozen (SIGSTOP) in it, and thawed when what stops them has arrived. Cases run
side by side, each on two emulated nodes that no other case uses, so a competing job or a dead node affects one case.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing as t
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc.cli import main as bushpc_main
from bushpc.config import CellConfig, compose
from bushpc.dispatch.plan import Plan
from bushpc.dispatch.submit import submit
from bushpc.files import read_json
from bushpc.ops.audit import audit_run
from bushpc.ops.drill import compare_checkpoints
from bushpc.ops.processes import RunProcess, processes_of
from bushpc.process import process_start
from bushpc.runs.goodput import goodput, read_attempts, read_note
from bushpc.runs.layout import CellDir, RunDir
from bushpc.train.ledger import LedgerLine, read_ledger

SANDBOX = Path(__file__).with_name("slurm_sandbox")
TERM, USER_SIGNAL, USR2, TIME_LIMIT = "term", "user_signal", "usr2", "time_limit"
REQUEUE, KILL, NODE_DOWN, CANCEL = "requeue", "kill", "node_down", "cancel"
ACTIONS = {
    TERM: "preemption, TERM only",
    USER_SIGNAL: "preemption, user signal first",
    USR2: "scancel --signal=USR2",
    TIME_LIMIT: "time limit",
    REQUEUE: "scontrol requeue",
    KILL: "SIGKILL of a rank",
    NODE_DOWN: "node down",
}
STEP, SAVE, EVALUATION = PHASES = ("step", "save", "evaluation")
ENGINES = ("ddp", "zero1", "zero2", "zero3")
# Of one run; so that three preemptions, each after a save, fit in.
ITERATIONS, SAVE_EVERY, STEPS_PER_PREEMPTION = 16, 2, 4
SCANS = 40
# Far above what anything takes on a busy machine: a case that hangs is a finding, too.
PATIENCE_S = 300.0
# A run of seconds may be over before a busy machine looks at it: the case begins again.
TRIES = 3
LOOK_S, POLL_S, ASK_S = 0.002, 0.1, 1.0
GRACE_S = 30
LIMIT_MIN = 30
# BatchNorm's statistics and dropout belong to a rank, so another number of ranks trains with other noise. What is left
# of training after this share of it moves the weights little: further away than NEAR (relative L2) is a wrong resume.
LATE, NEAR = 0.75, 0.02
STOPPING = (signal.SIGTERM, signal.SIGUSR2)
LISTENS = "0A"  # in /proc/net/tcp
CI = (
    *("plain-user_signal-evaluation-1", "array-usr2-save-1", "plain-time_limit-step-1", "plain-requeue-evaluation-1"),
    *("plain-kill-save-2", "plain-node_down-step-2", "engine-zero3-term", "in-a-row-3", "lane-kill-2"),
)


class CaseError(Exception):
    """What went wrong in a case, where it can go no further."""


class MissedError(CaseError):
    """The phase was over before it was seen, as on a busy machine: nothing was disturbed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run and what is done to it. action, phase: None for an undisturbed run.

    ranks: one per node. cells: how many; the first one is disturbed, and in a lane later ones, too. times: so often in
    a row. then: what is done the last time, where that is something else. ranks_after: where it is cancelled and
    submitted again with another number of ranks. lane: one job works on all cells, one after the other. packed: one job
    works on all cells at the same time.
    """

    name: str
    action: str | None = None
    phase: str | None = None
    ranks: int = 1
    cells: int = 1
    engine: str = "ddp"
    precision: str = "fp32"
    times: int = 1
    then: str | None = None
    ranks_after: int | None = None
    lane: bool = False
    packed: bool = False

    @property
    def iterations(self) -> int:
        return max(ITERATIONS, STEPS_PER_PREEMPTION * (self.times + 1))

    @property
    def reference(self) -> Case:
        """The undisturbed run that it has to equal."""
        name = f"undisturbed-{self.engine}-{self.precision}-{self.ranks}-{self.iterations}"
        return dataclasses.replace(
            self, name=name, action=None, phase=None, then=None, ranks_after=None, lane=False, packed=False
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """promised: what it has to be, `exact`, or `near` for a changed number of ranks. lost: steps done again.

    back_s: from each disturbance to the first sign of the next start. missed: the case's phase was, so try again.
    """

    name: str
    promised: str
    faults: list[str]
    seconds: float
    missed: bool = False
    lost: int = 0
    back_s: tuple[float, ...] = ()
    goodput: float | None = None


def all_cases() -> list[Case]:
    """The whole matrix, the engines, and twenty preemptions in a row (three in the small size)."""
    matrix = [
        Case(
            name=f"{'array' if array else 'plain'}-{action}-{phase}-{ranks}",
            action=action,
            phase=phase,
            ranks=ranks,
            cells=1 + array,
        )
        for array, action, phase, ranks in itertools.product((False, True), ACTIONS, PHASES, (1, 2))
    ]
    rows = [Case(name=f"in-a-row-{times}", action=TERM, phase=STEP, times=times) for times in (3, 20)]
    shared = [
        Case(name=f"lane-{KILL}-{ranks}", action=TERM, phase=STEP, times=3, then=KILL, ranks=ranks, cells=2, lane=True)
        for ranks in (1, 2)
    ]
    shared += [
        Case(name=f"packed-{action}", action=action, phase=STEP, cells=2, packed=True) for action in (TERM, TIME_LIMIT)
    ]
    engines = []
    for engine in ENGINES:
        base = Case(name="", phase=STEP, engine=engine, precision="bf16", ranks=2)
        engines += [
            dataclasses.replace(base, name=f"engine-{engine}-{TERM}", action=TERM),
            dataclasses.replace(base, name=f"engine-{engine}-2-to-1", action=CANCEL, ranks_after=1),
            dataclasses.replace(base, name=f"engine-{engine}-1-to-2", action=CANCEL, ranks=1, ranks_after=2),
        ]
    return [*matrix, *rows, *shared, *engines]


# --- the clusters --------------------------------------------------------------------------------------------------


class Cluster:
    """A sandbox whose nodes are told apart by features: `lane0` for the first two, `lane1` for the next two …"""

    def __init__(self, root: Path, lanes: int, *options: str) -> None:
        self.root, self.lanes = root, lanes
        self.options = ("--nodes", str(2 * lanes), "--cpus", "2", "--grace", str(GRACE_S), "--no-accounting", *options)
        self.env = {**os.environ, "SLURM_CONF": str(root / "etc" / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def up(self) -> None:
        self.tool("up", *self.options)
        for lane in range(self.lanes):
            for node in (f"n{2 * lane + 1}", f"n{2 * lane + 2}"):
                features = (f"AvailableFeatures=lane{lane}", f"ActiveFeatures=lane{lane}")
                self.ask("scontrol", "update", f"NodeName={node}", *features)

    def down(self) -> None:
        self.tool("down")

    def tool(self, command: str, *words: str) -> None:
        """One of tools/slurm_sandbox's commands. Raises: CaseError."""
        self.ask(str(SANDBOX), command, "--dir", str(self.root), *words)

    def ask(self, *command: str) -> str:
        """What a command says. Raises: CaseError."""
        # The environment is given, because `submit` changes this process's for a moment, in another thread.
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode:
            raise CaseError(f"{' '.join(command)}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    def queue(self) -> dict[str, tuple[str, str]]:
        """job id → (state, nodes)."""
        lines = self.ask("squeue", "--noheader", "--array", "--format=%i|%T|%N").splitlines()
        return {job_id: (state, nodes) for job_id, state, nodes in (line.split("|") for line in lines)}

    def nodes_of(self, job_id: str) -> list[str]:
        return self.ask("scontrol", "show", "hostnames", self.queue()[job_id][1]).split()


class Bench:
    """Where all cases run: composed configs, a folder for the runs, and what the undisturbed ones ended with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shards = folder, folder / "phantom"
        self._submitting = threading.Lock()
        self._ended: dict[str, threading.Event] = {}
        self._composed: dict[tuple[str, str], CellConfig] = {}

    def prepare(self, cases: Sequence[Case]) -> None:
        """Pack the data, and compose what the cases share: Hydra keeps global state, so not in threads."""
        with contextlib.redirect_stdout(sys.stderr):
            bushpc_main(["pack", "data=phantom", f"out={self.shards}", f"count={SCANS}", "workers=1"])
        for engine, precision in {(case.engine, case.precision) for case in cases}:
            self._composed[engine, precision] = compose(
                [
                    *("model=xbusnet_small", "data=phantom", "cluster=slurm", f"engine={engine}", "engine.device=cpu"),
                    *("model.image_size=64", "train.batch_size=4", "train.log_every=1", "evaluate.batch_size=1"),
                    *(f"engine.precision={precision}", f"cluster.time_min={LIMIT_MIN}", f"data.root={self.shards}"),
                    *(f"runs_dir={self.folder / 'runs'}", f"loader.cache_dir={self.folder / 'cache'}"),
                ]
            )

    def cells(self, case: Case, lane: str, ranks: int) -> dict[str, CellConfig]:
        base = self._composed[case.engine, case.precision]
        train = dataclasses.replace(
            base.train, iterations=case.iterations, save_every=1 if case.phase == SAVE else SAVE_EVERY
        )
        cluster = dataclasses.replace(
            base.cluster,
            nodes=ranks,
            constraint=lane,
            submit_window=1 if case.lane else None,
            cells_per_job=case.cells if case.packed else 1,
        )
        return {
            f"fold{fold}": dataclasses.replace(base, name=case.name, fold=fold, train=train, cluster=cluster)
            for fold in range(case.cells)
        }

    def submit(self, cells: dict[str, CellConfig], cluster: Cluster) -> Path:
        """The run's folder."""
        with self._submitting:
            os.environ.update(SLURM_CONF=cluster.env["SLURM_CONF"])
            return submit(Plan(kind="cv", cells=cells, wanted=list(cells)), ["bushpc", "cv"]).run_dir

    def announce(self, reference: Case) -> None:
        """Say that this undisturbed run will be there."""
        self._ended[reference.name] = threading.Event()

    def ended(self, case: Case) -> None:
        """Say that a run is over, whatever came of it."""
        if case.name in self._ended:
            self._ended[case.name].set()

    def wait_for(self, reference: Case) -> None:
        """Wait for an undisturbed run. Raises: CaseError if it did not finish."""
        self._ended[reference.name].wait()
        if not all((cell / "DONE").exists() for cell in (self.run_dir(reference) / "cells").iterdir()):
            raise CaseError(f"there is no {reference.name} run to compare with")

    def run_dir(self, case: Case) -> Path:
        return self.folder / "runs" / case.name


# --- one case ------------------------------------------------------------------------------------------------------


class Trial:
    """One case on one lane."""

    def __init__(self, bench: Bench, case: Case, cluster: Cluster, lane: str) -> None:
        self.bench, self.case, self.cluster, self.lane = bench, case, cluster, lane
        self.action = case.action
        self.disturbed: list[Path] = []
        self.faults: list[str] = []
        self.back_s: list[float] = []
        self.lost = 0
        self._sockets: dict[str, int] = {}  # inode → port that a rank listened at

    def run(self) -> Result:
        """Never raises: what went wrong is in the result."""
        began = time.monotonic()
        share, missed = None, False
        try:
            self._submit(self.case.ranks)
            if self.case.action:
                for number in range(self.case.times):
                    if self.case.lane:
                        self.cell_dir = self.cell_dirs[min(number, len(self.cell_dirs) - 1)]
                    if self.case.then and number == self.case.times - 1:
                        self.action = self.case.then
                    self._disturb()
            done = [cell_dir / "DONE" for cell_dir in self.cell_dirs]
            self._until(lambda: all(map(Path.exists, done)), "all cells to be done", any_job=True)
            self._check()
            account = goodput(read_attempts(self.cell_dir))
            share = account.share if account else None
        except Exception as error:  # a defect of this tool is one of this case alone
            self.faults.append(str(error) if isinstance(error, CaseError) else repr(error))
            missed = isinstance(error, MissedError)
        finally:
            self._clear()
        return Result(
            name=self.case.name,
            promised="near" if self.case.ranks_after else "exact",
            faults=self.faults,
            seconds=round(time.monotonic() - began, 1),
            missed=missed,
            lost=self.lost,
            back_s=tuple(self.back_s),
            goodput=share,
        )

    def _submit(self, ranks: int) -> None:
        cells = self.bench.cells(self.case, self.lane, ranks)
        self.run_dir = self.bench.submit(cells, self.cluster)
        self.cell_dirs = [self.run_dir / "cells" / name for name in cells]
        self.cell_dir = self.cell_dirs[0]
        self.job_ids = [str((read_json(cell_dir / "job.json") or {})["job_id"]) for cell_dir in self.cell_dirs]
        self.job_id = self.job_ids[0]

    def _disturb(self) -> None:
        ranks = self._freeze_in_phase()
        self.disturbed.append(self.cell_dir)
        before = attempt_number(self.cell_dir)
        old = {process.pid: process_start(process.pid) for process in self._processes()}
        self._sockets |= listening({rank.pid for rank in ranks})
        since = time.time()
        with thawed_at_the_end(ranks):
            self._act(ranks)
        if self.action == CANCEL:
            assert self.case.ranks_after is not None
            self._wait(lambda: self.job_id not in self.cluster.queue(), "the job to end")
            self._cancel_report()
            self._submit(self.case.ranks_after)
        self._until(lambda: attempt_number(self.cell_dir) > before, "the next start")
        self.back_s.append(round(time.time() - since, 1))
        left = [pid for pid, started in old.items() if started and process_start(pid) == started]
        if left:
            self.faults.append(f"processes of the stopped attempt lived on: {left}")
        logged = self._steps()
        self._until(lambda: self._steps()[len(logged) :] or self._over(), "the first step after it")
        self.lost += max(0, max(logged, default=0) - read_attempts(self.cell_dir)[-1].from_step)

    def _freeze_in_phase(self) -> list[RunProcess]:
        """Stop the ranks in the phase of the case; the ranks."""
        self._until(lambda: self._progress() != "starting", "training to begin")
        ranks = [process for process in self._processes() if process.rank is not None]
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._in_phase():
                for rank in ranks:
                    os.kill(rank.pid, signal.SIGSTOP)
                while not all(stopped(rank.pid) for rank in ranks):
                    time.sleep(LOOK_S)
                if self._in_phase():
                    return sorted(ranks, key=lambda rank: rank.rank or 0)
                for rank in ranks:
                    os.kill(rank.pid, signal.SIGCONT)
            if (self.cell_dir / "DONE").exists():
                break
            time.sleep(LOOK_S)
        raise MissedError(f"never caught during {self.case.phase}: {self._log()}")

    def _in_phase(self) -> bool:
        phase = self._progress()
        if self.case.phase == EVALUATION:
            return phase == "evaluating" and not (self.cell_dir / "DONE").exists()
        if phase != "training":
            return False
        # A start that is killed before it saved anything is not started again.
        saved = CellDir(self.cell_dir).newest_step() > read_attempts(self.cell_dir)[-1].from_step
        if self.action == CANCEL and CellDir(self.cell_dir).newest_step() < LATE * self.case.iterations:
            return False
        writing = any((self.cell_dir / "checkpoints").glob(".step_*"))
        return saved and writing == (self.case.phase == SAVE)

    def _act(self, ranks: list[RunProcess]) -> None:
        """Do to the job what the case says; returns when it has arrived at every rank."""
        cluster, job_id, action = self.cluster, self.job_id, self.action
        if action in (TERM, USER_SIGNAL):
            nodes = cluster.nodes_of(job_id)
            where = [f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}"]
            options = ["--partition=high", "--exclusive", *where, "--time=1"]
            cluster.ask("sbatch", *options, f"--output={self.run_dir}/competitor.log", "--wrap=sleep 1")
        elif action == USR2:
            cluster.ask("scancel", "--signal=USR2", job_id)
        elif action == REQUEUE:
            cluster.ask("scontrol", "requeue", job_id)
        elif action == CANCEL:
            cluster.ask("scancel", job_id)
        elif action == TIME_LIMIT:
            cluster.ask("scontrol", "update", f"JobId={job_id}", "TimeLimit=1")
        elif action == KILL:
            # Rank 0 writes the checkpoint; anywhere else it is a rank that the others have to miss.
            victim = ranks[0] if self.case.phase == SAVE else ranks[-1]
            os.kill(victim.pid, signal.SIGKILL)
            self._until(lambda: process_start(victim.pid) is None, "a rank to die")
            return
        elif action == NODE_DOWN:
            node = ranks[-1].node
            cluster.tool("kill-node", node)
            cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")
            cluster.tool("start-node", node)
            return
        self._until(lambda: all(told_to_stop(rank.pid) for rank in ranks), "the signal to arrive")
        if action == TIME_LIMIT:
            cluster.ask("scontrol", "update", f"JobId={job_id}", f"TimeLimit={LIMIT_MIN}")

    def _check(self) -> None:
        """Hold what there is in the end against the undisturbed run."""
        for cell_dir in dict.fromkeys(self.disturbed if self.action != CANCEL else ()):
            again, due = attempt_number(cell_dir), self.disturbed.count(cell_dir)
            if again < due:
                self.faults.append(f"{cell_dir.name}: {again} starts after the first, {due} are due")
        self._cancel_report()
        if self.case.lane:  # the job writes the report after its last cell
            self._wait(lambda: self.job_id not in self.cluster.queue(), "the lane's job to end")
        self._wait(lambda: not processes_of(self.run_dir), "the run's processes to end")
        if self.case.lane and not RunDir(self.run_dir).report_page.exists():
            self.faults.append("the last cell's job wrote no report")
        for audited in audit_run(self.run_dir).cells:
            self.faults += [f"ledger of {audited.name}: {violation}" for violation in audited.violations]
        held = [port for inode, port in self._sockets.items() if inode in listening_inodes()]
        if held:
            self.faults.append(f"ports still held: {held}")
        if self.case.action:
            self.bench.wait_for(self.case.reference)
            for cell_dir in self.cell_dirs:
                self._compare(cell_dir, self.bench.run_dir(self.case.reference) / "cells" / cell_dir.name)

    def _compare(self, cell_dir: Path, reference: Path) -> None:
        name = cell_dir.name
        if batches(cell_dir) != batches(reference):
            self.faults.append(f"{name}: other global batches than undisturbed")
        checkpoint = f"checkpoints/step_{self.case.iterations:08d}"
        if self.case.ranks_after:
            worlds = {line.world for line in read_ledger(cell_dir) if isinstance(line, LedgerLine)}
            if worlds != {self.case.ranks, self.case.ranks_after}:
                self.faults.append(f"{name}: trained on {worlds} ranks")
            far = distance(cell_dir / checkpoint, reference / checkpoint)
            if not far < NEAR:
                self.faults.append(f"{name}: weights are {far:.2g} away from the undisturbed run's")
            return
        tensors, differing = compare_checkpoints(cell_dir / checkpoint, reference / checkpoint)
        if differing or not tensors:
            self.faults.append(f"{name}: {len(differing)} of {tensors} tensors differ, as {list(differing)[:3]}")
        if (cell_dir / "per_image.csv").read_bytes() != (reference / "per_image.csv").read_bytes():
            self.faults.append(f"{name}: per_image.csv differs")

    def _until(self, question: Callable[[], t.Any], what: str, any_job: bool = False) -> None:
        """Wait for something that the disturbed cell's job does, or with `any_job` the jobs of all cells.

        Raises: CaseError when it does not, or is gone for good.
        """
        asked, jobs = time.monotonic(), self.job_ids if any_job else [self.job_id]

        def answer_or_gone() -> t.Any:
            nonlocal asked
            if answer := question():
                return answer
            if time.monotonic() - asked > ASK_S:
                asked = time.monotonic()
                if not self.cluster.queue().keys() & set(jobs) and not question():
                    raise CaseError(f"waiting for {what}: job {', '.join(jobs)} is gone: {self._log()}")
            return None

        self._wait(answer_or_gone, what)

    def _wait(self, question: Callable[[], t.Any], what: str) -> None:
        """Wait for an answer that is true. Raises: CaseError after PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while not question():
            if time.monotonic() > deadline:
                raise CaseError(f"waited {PATIENCE_S:g} s for {what}: {self._log()}")
            time.sleep(POLL_S)

    def _processes(self) -> list[RunProcess]:
        return [process for process in processes_of(self.run_dir) if process.job == self.job_id]

    def _progress(self) -> str:
        """Phase of the start that runs now."""
        return str(read_note(self.cell_dir / "state.json").get("phase", "starting"))

    def _over(self) -> bool:
        return self._progress() in ("evaluating", "done")

    def _steps(self) -> list[int]:
        path = self.cell_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def _log(self) -> str:
        failed = self.cell_dir / "FAILED"
        log = Path((read_json(self.cell_dir / "job.json") or {})["log"])
        said = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "no log"
        return (failed.read_text().partition("\n")[0] if failed.exists() else "") + f"\n{said}"

    def _cancel_report(self) -> None:
        report = read_json(self.run_dir / "jobs" / "report.json")
        if report:
            with contextlib.suppress(CaseError):  # it is over
                self.cluster.ask("scancel", report["job_id"])

    def _clear(self) -> None:
        with contextlib.suppress(Exception):
            for cell_dir in self.cell_dirs:
                self.cluster.ask("scancel", str((read_json(cell_dir / "job.json") or {})["job_id"]))
            self._cancel_report()
            for process in processes_of(self.run_dir):
                os.kill(process.pid, signal.SIGCONT)


@contextlib.contextmanager
def thawed_at_the_end(ranks: Sequence[RunProcess]) -> Iterator[None]:
    """Whatever happens, no process of ours stays frozen."""
    try:
        yield
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGCONT)


def attempt_number(cell_dir: Path) -> int:
    """Of the cell's newest start; -1 before the first."""
    attempts = read_attempts(cell_dir)
    return attempts[-1].number if attempts else -1


def status_of(pid: int) -> dict[str, str]:
    """/proc/<pid>/status; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def stopped(pid: int) -> bool:
    """Frozen, or no more."""
    return status_of(pid).get("State", "X")[0] in "TXZ"


def told_to_stop(pid: int) -> bool:
    """Whether a stop signal waits for a frozen process, or it has been woken (by Slurm) to hear one, or is gone."""
    status = status_of(pid)
    if status.get("State", "X")[0] != "T":
        return True
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return any(pending & (1 << (number - 1)) for number in STOPPING)


def listening(pids: set[int]) -> dict[str, int]:
    """inode → port of the sockets at which these processes listen."""
    everyone = listening_inodes()
    mine = {}
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inode = os.readlink(path).removeprefix("socket:[").removesuffix("]")
                if inode in everyone:
                    mine[inode] = everyone[inode]
    return mine


def listening_inodes() -> dict[str, int]:
    """inode → port of all TCP sockets of this machine that listen."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9]: int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENS}


def batches(cell_dir: Path) -> dict[int, list[str]]:
    """step → samples of all ranks, sorted; where a step was done again, those of the last time."""
    lines = [line for line in read_ledger(cell_dir) if isinstance(line, LedgerLine)]
    last: dict[int, int] = {}
    for line in lines:
        last[line.step] = max(line.attempt, last.get(line.step, 0))
    found: dict[int, list[str]] = {}
    for line in lines:
        if line.attempt == last[line.step]:
            found.setdefault(line.step, []).extend(line.samples.split(" "))
    return {step: sorted(samples) for step, samples in found.items()}


def distance(ours: Path, theirs: Path) -> float:
    """Relative L2 distance of the weights of two checkpoints."""
    from safetensors.torch import load_file

    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    square = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return float((square / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5)


# --- all cases -----------------------------------------------------------------------------------------------------


def run_all(cases: Sequence[Case], bench: Bench, clusters: Sequence[Cluster]) -> list[Result]:
    """Undisturbed runs first, then every case, on the lanes of the cluster that it needs."""
    # The same run for several cases, with as many folds as any of them has.
    references = {case.reference.name: case.reference for case in sorted(cases, key=lambda case: case.cells)}
    waiting: dict[Cluster, queue.SimpleQueue[Case]] = {cluster: queue.SimpleQueue() for cluster in clusters}
    for case in (*references.values(), *cases):
        waiting[clusters[-1] if case.action == USER_SIGNAL else clusters[0]].put(case)
    for reference in references.values():
        bench.announce(reference)
    results: list[Result] = []
    threads = [
        threading.Thread(target=work, args=(waiting[cluster], bench, cluster, f"lane{lane}", results), daemon=True)
        for cluster in clusters
        for lane in range(cluster.lanes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def work(cases: queue.SimpleQueue[Case], bench: Bench, cluster: Cluster, lane: str, results: list[Result]) -> None:
    """One lane: case after case."""
    while True:
        try:
            case = cases.get_nowait()
        except queue.Empty:
            return
        for number in range(TRIES):
            result = Trial(bench, case, cluster, lane).run()
            if not result.missed:
                break
            run_dir = bench.run_dir(case)
            run_dir.rename(run_dir.with_name(f"{case.name}.missed-{number}"))
        bench.ended(case)
        results.append(result)
        print(f"{time.strftime('%H:%M:%S')} {line_of(result)}", file=sys.stderr, flush=True)


def line_of(result: Result) -> str:
    verdict = "; ".join(result.faults) or result.promised
    return f"{result.name}: {verdict} ({result.seconds:.0f} s, {result.lost} steps lost)"


def to_markdown(results: Sequence[Result]) -> str:
    """The table."""
    lines = ["| case | verdict | seconds | back after (s) | steps lost | goodput |", "|---|---|---:|---:|---:|---:|"]
    for result in results:
        back = f"{sum(result.back_s) / len(result.back_s):.1f}" if result.back_s else ""
        share = "" if result.goodput is None else f"{100 * result.goodput:.0f} %"
        verdict = " ".join("; ".join(result.faults).replace("|", "/").split()) or result.promised
        lines.append(f"| {result.name} | {verdict} | {result.seconds:.0f} | {back} | {result.lost} | {share} |")
    failed = sum(bool(result.faults) for result in results)
    return "\n".join([*lines, "", f"{len(results) - failed} of {len(results)} as promised."]) + "\n"


def choose(arguments: argparse.Namespace) -> list[Case]:
    cases = all_cases()
    if arguments.size == "ci":
        return [case for case in cases if case.name in CI]
    if arguments.twenty:
        return [case for case in cases if case.name == "in-a-row-20"]
    if arguments.only:
        return [case for case in cases if any(text in case.name for text in arguments.only)]
    return [case for case in cases if case.name != "in-a-row-3"]  # which the twenty contain


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="preemption_matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("full", "ci"), default="full", help="ci: a case or two of every kind")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases with TEXT in their name; see --list")
    parser.add_argument("--twenty", action="store_true", help="only the twenty preemptions in a row")
    parser.add_argument("--list", action="store_true", help="names of the cases, and end")
    parser.add_argument("--lanes", type=int, default=3, help="cases side by side (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for preemption_matrix.md and .json")
    arguments = parser.parse_args(argv)
    cases = choose(arguments)
    if arguments.list or not cases:
        print("\n".join(case.name for case in (cases or all_cases())))
        return 0 if cases else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that clusters are taken down
    folder = Path(tempfile.mkdtemp(prefix="matrix-"))
    clusters = [Cluster(folder / "slurm", arguments.lanes)]
    if any(case.action == USER_SIGNAL for case in cases):
        clusters.append(Cluster(folder / "slurm-user-signal", 1, "--user-signal"))
    bench = Bench(folder)
    began = time.monotonic()
    try:
        for cluster in clusters:
            cluster.up()
        bench.prepare(cases)
        results = run_all(cases, bench, clusters)
    except CaseError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for cluster in clusters:
            cluster.down()
    order = [case.name for case in cases]
    results.sort(key=lambda result: order.index(result.name) if result.name in order else -1)
    table = to_markdown(results)
    print(f"{table}{time.monotonic() - began:.0f} s in all")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "preemption_matrix.md").write_text(table)
        content = json.dumps([dataclasses.asdict(result) for result in results], indent=1)
        (arguments.out / "preemption_matrix.json").write_text(content)
    if any(result.faults for result in results):
        print(f"the runs are kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
