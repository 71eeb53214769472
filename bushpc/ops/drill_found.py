"""What a drill found: one outcome per disturbance, and the table, log lines and drill.md that people read."""

from __future__ import annotations

import dataclasses
import json
import typing as t
from dataclasses import dataclass
from pathlib import Path

from bushpc.runs.goodput import Goodput

if t.TYPE_CHECKING:
    from rich.console import Group

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
