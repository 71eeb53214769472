"""Ledgers → proof: every step consumed one global batch, every sample of the fold's training part once an epoch.

    <cell>/ledger ─which attempt's line counts→ steps ─epochs→ findings      `bushpc audit RUN`

The audit uses only folds.csv and the cell's settings, not the loader's code that draws the order. It needs no torch and
no model, so it takes about as long as reading the ledgers, and works while the run is training.
"""

from __future__ import annotations

import json
import typing as t
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from bushpc.ops.expected import Expected, Scan, expected_of, read_scans
from bushpc.runs.goodput import trained_in
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import DoneRecord
from bushpc.runs.run_record import RunRecord
from bushpc.train.ledger import LedgerLine, read_ledger, why_none

if t.TYPE_CHECKING:
    from rich.console import Group

# Violations kept per cell; a cell that is wrong at every step has a million of them.
MOST_KEPT = 20
MOST_SHOWN = 3
MOST_SAMPLES = 6
NOT_IN_FOLDS = "not of this dataset's folds"


@dataclass(frozen=True, kw_only=True)
class CellAudit:
    """What the ledger of one cell proves.

    steps: effective ones, from 0 without a gap. epochs: complete ones. samples: consumed in those steps. attempts: that
    wrote to the ledger. replayed: steps that a later attempt repeated. violations: the first MOST_KEPT of
    `violation_count`, as text. trained_in: folder of the cell that trained these weights, "" if it is this one.
    unproved: why there is no ledger, for models with their own trainer.
    """

    name: str
    steps: int = 0
    epochs: int = 0
    samples: int = 0
    attempts: int = 0
    replayed: int = 0
    violations: tuple[str, ...] = ()
    violation_count: int = 0
    trained_in: str = ""
    unproved: str | None = None

    @property
    def verdict(self) -> str:
        """`exact`, `no steps yet`, the number of violations, or why nothing can be proved."""
        if self.unproved:
            return self.unproved
        if self.violation_count:
            return f"{self.violation_count} violation{'s' if self.violation_count > 1 else ''}"
        return "exact" if self.steps else "no steps yet"


@dataclass(frozen=True, kw_only=True)
class RunAudit:
    """All cells of a run. `ok`: no cell has a violation."""

    run_dir: Path
    cells: list[CellAudit]

    @property
    def ok(self) -> bool:
        return not any(cell.violation_count for cell in self.cells)

    def to_json(self) -> str:
        """The table for scripts, with all violations that were kept."""
        cells = [{**asdict(cell), "verdict": cell.verdict} for cell in self.cells]
        return json.dumps({"run": str(self.run_dir), "ok": self.ok, "cells": cells}, indent=1)


def audit_run(run_dir: Path) -> RunAudit:
    """Audit every cell, finished or not.

    Raises: DataError if `run_dir` is not a run, or its folds.csv or a config.yaml is not what it was started with.
    """
    run = RunDir(run_dir)
    record = RunRecord.open(run)
    scans = read_scans(run, record)
    cells = [audit_cell(run.cell(cell.name), scans, cell.fold) for cell in record.trainings]
    return RunAudit(run_dir=run_dir, cells=cells)


def audit_cell(cell_dir: CellDir, scans: list[Scan], fold: int) -> CellAudit:
    """Audit one cell. scans: of all folds. Raises: DataError for a damaged config."""
    if unproved := why_none(cell_dir):
        return CellAudit(name=cell_dir.name, unproved=unproved)
    findings = _Findings()
    expected = expected_of(cell_dir, scans, fold)
    # Before the ledger is read, because a running cell may seal another checkpoint meanwhile.
    owed = _steps_owed(cell_dir)
    attempts = _attempts(read_ledger(cell_dir), findings)
    steps = _effective_steps(attempts, owed, findings)
    replayed = _check_replays(attempts, steps, findings)
    epochs = _check_epochs(steps, expected, findings) if steps else 0
    return CellAudit(
        name=cell_dir.name,
        steps=len(steps),
        epochs=epochs,
        samples=sum(len(step.samples) for step in steps),
        attempts=len(attempts),
        replayed=replayed,
        violations=tuple(findings.kept),
        violation_count=findings.count,
        trained_in=trained_in(cell_dir),
    )


# Columns of counts, by title.
_COUNTS: dict[str, t.Callable[[CellAudit], int]] = {
    "steps": lambda cell: cell.steps,
    "epochs": lambda cell: cell.epochs,
    "samples": lambda cell: cell.samples,
    "attempts": lambda cell: cell.attempts,
    "replayed": lambda cell: cell.replayed,
}


def audit_table(audit: RunAudit) -> Group:
    """The output of `bushpc audit`: a row per cell, then the first violations of each."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{audit.run_dir}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cell", no_wrap=True)
    for title in _COUNTS:
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("verdict", no_wrap=True)
    lines = []
    for cell in audit.cells:
        style = "red" if cell.violation_count else "green" if cell.steps else "dim"
        counts = (str(count(cell)) for count in _COUNTS.values())
        table.add_row(Text(cell.name), *counts, Text(cell.verdict, style=style))
        if cell.trained_in:
            lines.append(Text(f"{cell.name}: these are the steps of {cell.trained_in}, whose weights it took", "dim"))
        lines += [Text(f"{cell.name}: {violation}", style="red") for violation in cell.violations[:MOST_SHOWN]]
        if cell.violation_count > MOST_SHOWN:
            lines.append(Text(f"{cell.name}: and {cell.violation_count - MOST_SHOWN} more (--json)", style="red"))
    return Group(table, *lines)


class _Findings:
    """Violations: how many, and the first of them in words."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: list[str] = []

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.kept) < MOST_KEPT:
            self.kept.append(text)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step that counts. attempt: whose. samples: `epoch:key` of all ranks."""

    number: int
    attempt: int
    samples: list[str]


class _Attempt:
    """The lines of one attempt: step → rank → samples. first, stop: the stretch of steps that all its ranks wrote."""

    def __init__(self, number: int, ranks: int) -> None:
        self.number, self.ranks = number, ranks
        self.lines: dict[int, dict[int, str]] = {}

    @property
    def first(self) -> int:
        return min(self.lines)

    def whole(self, step: int) -> bool:
        return len(self.lines.get(step, ())) == self.ranks

    def stop(self) -> int:
        step = self.first
        while self.whole(step):
            step += 1
        return step

    def samples(self, step: int) -> list[str]:
        by_rank = self.lines[step]
        return [sample for rank in sorted(by_rank) for sample in by_rank[rank].split(" ")]


def _attempts(lines: Iterable[LedgerLine | str], findings: _Findings) -> list[_Attempt]:
    """The ledger by attempt, in their order."""
    attempts: dict[int, _Attempt] = {}
    for line in lines:
        if isinstance(line, str):
            findings.add(f"{line} cannot be read")
            continue
        attempt = attempts.setdefault(line.attempt, _Attempt(line.attempt, line.world))
        at_rank = attempt.lines.setdefault(line.step, {})
        who = f"step {line.step} of attempt {line.attempt}, rank {line.rank}"
        if line.world != attempt.ranks or line.rank >= line.world:
            findings.add(f"{who}: says {line.world} ranks, others of the attempt {attempt.ranks}")
        elif line.rank in at_rank:
            findings.add(f"{who}: is there twice")
        else:
            at_rank[line.rank] = line.samples
    return [attempts[number] for number in sorted(attempts)]


def _effective_steps(attempts: list[_Attempt], owed: int, findings: _Findings) -> list[_Step]:
    """The steps that count, rising: an attempt takes the place of all before it from its first step on.

    owed: steps that must be there, as a checkpoint or DONE says that they were done.
    """
    stretches: list[tuple[_Attempt, range]] = []
    limit = None  # where the attempt after this one began
    for attempt in reversed(attempts):
        stop = attempt.stop()
        if limit is None:
            if any(attempt.whole(step) for step in attempt.lines if step > stop):
                findings.add(f"step {stop} of attempt {attempt.number}: {_missing(attempt, stop)}, but later steps are")
            if stop < owed:
                findings.add(f"{_from_to(stop, owed)} missing: {owed} steps were done and saved")
        elif attempt.first < limit and stop < limit:
            findings.add(
                f"{_from_to(stop, limit)} missing: attempt {attempt.number} got to step {stop - 1} on all ranks "
                f"({_missing(attempt, stop)}), the one after it began at step {limit}"
            )
        if limit is None or attempt.first < limit:
            stretches.append((attempt, range(attempt.first, stop if limit is None else min(stop, limit))))
            limit = attempt.first
    if limit is None and owed:
        findings.add(f"{_from_to(0, owed)} missing: {owed} steps were done and saved, and there is no ledger of them")
    if limit:
        findings.add(f"{_from_to(0, limit)} missing: the ledger begins at step {limit}")
    return [
        _Step(number=step, attempt=attempt.number, samples=attempt.samples(step))
        for attempt, stretch in reversed(stretches)
        for step in stretch
    ]


def _missing(attempt: _Attempt, step: int) -> str:
    ranks = sorted(set(range(attempt.ranks)) - attempt.lines.get(step, {}).keys())
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} not there"


def _from_to(first: int, stop: int) -> str:
    return f"step {first} is" if stop - first == 1 else f"steps {first} to {stop - 1} are"


def _check_replays(attempts: list[_Attempt], steps: list[_Step], findings: _Findings) -> int:
    """The number of steps that were repeated. A repeated step must consume the same samples as before."""
    counts = {step.number: step for step in steps}
    replayed = 0
    for attempt in attempts:
        for number in sorted(attempt.lines):
            again = counts.get(number)
            if again is None or again.attempt == attempt.number:
                continue
            replayed += 1
            then, now = Counter(attempt.samples(number)), Counter(again.samples)
            # Lines that a kill kept from the disk cannot be compared.
            if then - now or (attempt.whole(number) and now - then):
                findings.add(
                    f"step {number} was done again with other samples: attempt {attempt.number} had "
                    f"{_some(then - now)}, attempt {again.attempt} has {_some(now - then)} instead"
                )
    return replayed


def _check_epochs(steps: list[_Step], expected: Expected, findings: _Findings) -> int:
    """Check every sample of every step. Returns the number of complete epochs."""
    draws, batch_size = expected.draws.total(), expected.batch_size
    seen: dict[int, Counter[str]] = {}  # of the epochs that are not complete yet
    complete: set[int] = set()
    for step in steps:
        if len(step.samples) != batch_size:
            findings.add(f"step {step.number} has {len(step.samples)} samples; the global batch is {batch_size}")
        for sample in step.samples:
            number, _, key = sample.partition(":")
            epoch, times = int(number), expected.draws[key]
            if not times:
                findings.add(f"step {step.number}: {key} is {expected.others.get(key, NOT_IN_FOLDS)}")
            elif epoch in complete or seen.setdefault(epoch, Counter())[key] == times:
                often = "for the second time" if times == 1 else f"more than {times} times"
                findings.add(f"step {step.number}: {key} is there {often} in epoch {epoch}")
            else:
                seen[epoch][key] += 1
                if seen[epoch].total() == draws:
                    complete.add(epoch)
                    del seen[epoch]
    # Epochs lie end to end, so what was consumed in all says which of them are over, and which one has begun.
    over, rest = divmod(sum(len(step.samples) for step in steps), draws) if draws else (0, 0)
    for epoch in range(over):
        if epoch not in complete:
            missing = expected.draws - seen.get(epoch, Counter())
            findings.add(f"epoch {epoch} lacks {missing.total()} of {draws} samples: {_some(missing)}")
    for epoch in sorted(seen.keys() | complete):
        if epoch >= over + bool(rest):
            findings.add(f"epoch {epoch} was begun before the ones before it were over")
    return len(complete)


def _some(samples: t.Collection[str]) -> str:
    shown = ", ".join(sorted(samples)[:MOST_SAMPLES]) or "nothing"
    return shown + (f" and {len(samples) - MOST_SAMPLES} more" if len(samples) > MOST_SAMPLES else "")


def _steps_owed(cell_dir: CellDir) -> int:
    """The number of steps that the cell claims to have done and saved, by its DONE and its checkpoints' names."""
    return max(cell_dir.newest_step(), DoneRecord.read_valid(cell_dir.done).step or 0)
