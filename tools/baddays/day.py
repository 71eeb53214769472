"""One run of the second matrix: its bench, its cluster, and what happens to it on a bad day."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import typing as t
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bushpc.config import CellConfig
from bushpc.files import read_json
from bushpc.ops.processes import RunProcess
from bushpc.runs.goodput import read_attempts
from bushpc.runs.layout import CellDir
from tools.preemption_matrix import PATIENCE_S, Bench, Case, CaseError, Cluster, Trial, thawed_at_the_end

ROOT = Path(__file__).resolve().parents[2]
# Submitting again by hand helps once, or the row has failed.
MOST_RESUMES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A bad day. happens: does it, and returns what was seen. disk: the run lies on a file system of its own.

    submits: whether `happens` submits the run itself. part: of the table. cluster, engine: settings of those groups
    that differ.
    """

    part: str
    name: str
    happens: Callable[[Day], str]
    phase: str = "step"
    ranks: int = 1
    cells: int = 1
    disk: bool = False
    accounting: bool = False
    submits: bool = False
    cluster: Mapping[str, t.Any] = dataclasses.field(default_factory=dict)
    engine: Mapping[str, t.Any] = dataclasses.field(default_factory=dict)

    @property
    def case(self) -> Case:
        return Case(name=self.name, action=self.name, phase=self.phase, ranks=self.ranks, cells=self.cells)


class Site(Cluster):
    """A sandbox of two nodes. accounting: with slurmdbd."""

    def __init__(self, root: Path, *, accounting: bool) -> None:
        super().__init__(root, 1)
        if accounting:
            self.options = tuple(word for word in self.options if word != "--no-accounting")

    @contextlib.contextmanager
    def without(self, daemon: str) -> Iterator[None]:
        """While a daemon is away."""
        self.tool("stop-daemon", daemon)
        try:
            yield
        finally:
            self.tool("start-daemon", daemon)


class Days(Bench):
    """Where all rows run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: dict[str, Row] = {}

    def cells(self, case: Case, lane: str, ranks: int) -> dict[str, CellConfig]:
        cells, row = super().cells(case, lane, ranks), self.rows.get(case.name)
        # Features that were given to nodes by scontrol are gone when slurmctld starts again.
        changes = {"constraint": None, **(row.cluster if row else {})}
        runs = self.runs_of(row) if row else self.folder / "runs"
        return {
            name: dataclasses.replace(
                cell,
                runs_dir=str(runs),
                cluster=dataclasses.replace(cell.cluster, **changes),
                engine=dataclasses.replace(cell.engine, **(row.engine if row else {})),
            )
            for name, cell in cells.items()
        }

    def runs_of(self, row: Row) -> Path:
        return self.folder / "disks" / row.name if row.disk else self.folder / "runs"


class Day(Trial):
    """One row at work."""

    def __init__(self, days: Days, row: Row, site: Site) -> None:
        super().__init__(days, row.case, site, "lane0")
        self.row, self.site, self.days = row, site, days
        self.seen = ""
        self.resumes = 0
        self._ranks: list[RunProcess] = []
        self._saved: dict[Path, int] = {}

    @property
    def disk(self) -> Path:
        return self.days.runs_of(self.row)

    def _submit(self, ranks: int) -> None:
        if not self.row.submits:
            self.submit()

    def submit(self) -> None:
        super()._submit(self.case.ranks)

    def _disturb(self) -> None:
        if not self.row.submits:
            self._cancel_report()
        self.seen = self.row.happens(self)
        self.survive()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[list[RunProcess]]:
        """The ranks stand still in the row's phase."""
        ranks = self._freeze_in_phase()
        self._saved = {cell: CellDir(cell).newest_step() for cell in self.cell_dirs}
        self._ranks = ranks
        with thawed_at_the_end(ranks):
            yield ranks

    def thaw(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGCONT)

    def until_gone_or(self, seconds: float, *, files: bool = True) -> None:
        """Wait until the job runs no more, but not longer; files: or until the cells are done."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.in_queue("RUNNING") and not (files and self.ended()):
            time.sleep(0.2)

    def succeed(self, done: subprocess.CompletedProcess[str]) -> None:
        """Raises: CaseError where the command did not."""
        if done.returncode:
            raise CaseError(f"`{' '.join(done.args[2:])}` ended with {done.returncode}: {done.stdout}")

    def line(self, said: str, word: str) -> str:
        """The line of status with this word."""
        return next((line.strip() for line in said.splitlines() if word in line), "no such line")

    def bushpc(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """One of bushpc's commands, as its user gives it."""
        return self.start(*words, **environment).wait_for()

    def start(self, *words: object, **environment: str) -> Asked:
        command = [sys.executable, "-m", "bushpc.cli", *map(str, words)]
        env = {**self.cluster.env, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
        return Asked(
            command, subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )

    def status(self, *expected: str) -> str:
        """What `bushpc status` says; a fault where it fails or one of these words is missing.

        It ends with 1 where cells need somebody.
        """
        done = self.bushpc("status", self.run_dir)
        if done.returncode not in (0, 1) or any(word not in done.stdout for word in expected):
            self.faults.append(f"status ended with {done.returncode}, without {expected}: {done.stdout}")
        return done.stdout

    def until(self, question: Callable[[], t.Any], what: str) -> None:
        """Wait, also while Slurm does not answer."""
        self._wait(question, what)

    def in_queue(self, state: str = "") -> bool:
        """Whether the first cell's job is there, in this state."""
        known = self.cluster.queue().get(self.job_id)
        return known is not None and state in ("", known[0])

    def ended(self) -> bool:
        return all((cell / "DONE").exists() for cell in self.cell_dirs)

    def survive(self) -> None:
        """Wait for the end; where no job is left, note what status says and submit again, as it tells its user."""
        asked = 0.0
        deadline = time.monotonic() + PATIENCE_S
        while not self.ended():
            if time.monotonic() > deadline:
                raise CaseError(f"not over after {PATIENCE_S:g} s: {self._log()}")
            if time.monotonic() - asked > 1:
                if not self.cluster.queue().keys() & set(self.job_ids) and not self.ended():
                    self._resume()
                asked = time.monotonic()
            time.sleep(0.1)

    def _resume(self) -> None:
        if self.resumes == MOST_RESUMES:
            raise CaseError(f"resumed {self.resumes} times, and again no job is left: {self._log()}")
        said = self.status()
        reasons = [line for line in said.splitlines() if " stopped: " in line or " failed: " in line]
        if not reasons:
            self.faults.append(f"status names no reason: {said}")
        self.seen += f" Status: {'; '.join(reason.strip() for reason in reasons)}."
        self.resume()

    def resume(self) -> None:
        done = self.bushpc("resume", self.run_dir)
        if done.returncode:
            raise CaseError(f"resume ended with {done.returncode}: {done.stdout}")
        self.resumes += 1
        self.read_jobs()
        self._cancel_report()

    def read_jobs(self) -> None:
        """Of the cells' notes."""
        self.job_ids = [str((read_json(cell / "job.json") or {})["job_id"]) for cell in self.cell_dirs]
        self.job_id = self.job_ids[0]

    def move(self, run_dir: Path) -> None:
        """The run lies there now."""
        self.run_dir.rename(run_dir)
        self.run_dir, saved = run_dir, self._saved
        self.cell_dirs = [run_dir / "cells" / cell.name for cell in self.cell_dirs]
        self.cell_dir = self.cell_dirs[0]
        self._saved = {run_dir / "cells" / cell.name: step for cell, step in saved.items()}

    def _check(self) -> None:
        super()._check()
        for cell, step in self._saved.items():
            attempts = read_attempts(cell)
            if len(attempts) > 1 and attempts[-1].from_step < step:
                self.faults.append(f"{cell.name} began again at step {attempts[-1].from_step}; {step} was saved")


@dataclasses.dataclass
class Asked:
    """A command that runs."""

    command: list[str]
    process: subprocess.Popen[str]

    def wait_for(self) -> subprocess.CompletedProcess[str]:
        said, _ = self.process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(self.command, self.process.returncode, said, "")


def mount(*words: object) -> None:
    """Raises: CaseError."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CaseError(f"mount {' '.join(map(str, words))}: {done.stderr.strip()}")


def unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], capture_output=True, check=False)


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Whoever opens a file below `path` can only read it. What is open already stays so: a mount with writers cannot
    be turned, so a read-only one is laid over it."""
    mount("--bind", path, path)
    try:
        mount("-o", "remount,bind,ro", path)
        yield
    finally:
        unmount(path)


@contextlib.contextmanager
def full(path: Path) -> Iterator[None]:
    """Not a byte is left on the file system of `path`."""
    filler = path / ".full"
    try:
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        with filler.open("ab") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(512))
        yield
    finally:
        filler.unlink()
