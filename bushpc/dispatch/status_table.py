"""The state of a run as a table for people, and as lines of a log."""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

from bushpc.dispatch.status import STYLES, CellStatus, RunStatus
from bushpc.runs.goodput import Goodput
from bushpc.runs.layout import CellDir

if t.TYPE_CHECKING:
    from rich.console import Group

COLUMNS = ("cell", "state", "where", "step", "metric", "rate", "left", "restarts", "goodput", "log")
# The same, those first that stay where there is little room.
MATTER = ("cell", "state", "step", "metric", "left", "goodput", "restarts", "log", "where", "rate")
COLUMN_GAP = 3
# Cells that a table shows one by one.
MOST_ROWS = 60
# On a screen: title, head, totals (three lines where it is narrow), what is not listed.
LINES_AROUND = 10


def status_table(status: RunStatus, width: int, every: bool = False, height: int | None = None) -> Group:
    """What `bushpc status` shows: a row per cell, totals, then a line for each one that failed or stopped.

    width: characters that there is room for; columns that matter less are left out where it is too little.
    every: all cells also of a run of more than MOST_ROWS, where else those that need nobody are only counted.
    height: lines that there is room for, on a screen that is drawn again; the totals then stay in sight.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = status.cells
    title = str(status.run_dir)
    most = MOST_ROWS
    if height is not None:
        most = min(most, max(3, height - LINES_AROUND - (len(title) - 1) // width))
    if len(shown) > most and not every:
        shown = [cell for cell in shown if needs_eyes(cell)][:most]
    reasons = [cell for cell in shown if cell.reason]
    if height is not None and len(shown) + len(reasons) > most:
        shown = shown[: max(3, most - min(len(reasons), most // 3))]
        reasons = [cell for cell in shown if cell.reason][: most // 3]
    rows = [row_of(cell, status.run_dir) for cell in shown]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = _fitting(rows, width)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in ("cell", "state", "where", "log") else "right")
    for cell, row in zip(shown, rows, strict=True):
        table.add_row(*(Text(row[name], STYLES[cell.state] if name == "state" else "") for name in columns))
    lines = [Text(totals_line(status))]
    if len(shown) < len(status.cells):
        rest = len(status.cells) - len(shown)
        lines.append(Text(f"{rest} cells are not listed, those first that need nobody; --all lists them", "dim"))
    if status.silent:
        lines.append(
            Text(f"{status.silent}. States are from the cells' own heartbeats; jobs go on meanwhile", "yellow")
        )
    if status.report_failed:
        lines.append(Text(f"{status.report_failed}; to write it: bushpc report {status.run_dir}", "red"))
    elif status.report_due:
        lines.append(Text(f"there is no report of these cells yet: bushpc report {status.run_dir}", "yellow"))
    one_line: dict[str, t.Any] = {} if height is None else {"no_wrap": True, "overflow": "ellipsis"}
    lines += [Text(f"{cell.name} {cell.state}: {cell.reason}", STYLES[cell.state], **one_line) for cell in reasons]
    return Group(table, *lines)


def needs_eyes(cell: CellStatus) -> bool:
    """Whether a large run's table lists the cell: it runs, or somebody has to do something."""
    return cell.state not in ("done", "queued", "missing") or bool(cell.reason)


def row_of(cell: CellStatus, run_dir: Path) -> dict[str, str]:
    """What a table shows of a cell, by COLUMNS."""
    return {
        "cell": cell.name,
        "state": f"behind {cell.behind}" if cell.behind else cell.phase or cell.state,
        "where": f"job {cell.job_id}" if cell.behind else cell.node if cell.state == "running" else "",
        "step": f"{cell.step}/{cell.total}" if cell.total else "",
        "metric": next((f"{name} {value:.3f}" for name, value in cell.metric.items()), ""),
        "rate": f"{cell.rate:.3g}/s" if cell.rate and cell.state == "running" else "",
        "left": "" if cell.left_s is None else duration(cell.left_s),
        "restarts": str(cell.restarts or ""),
        "goodput": "" if cell.trained_in else _percent(cell.goodput),
        "log": os.path.relpath(cell.log, run_dir) if cell.log else "",
    }


def _fitting(rows: t.Sequence[t.Mapping[str, str]], width: int) -> list[str]:
    """The columns that have something to say and fit, the more important ones first."""
    chosen, room = {"cell", "state"}, width
    for name in MATTER:
        needed = max([len(name), *(len(row[name]) for row in rows)]) + COLUMN_GAP
        if (name in chosen or any(row[name] for row in rows)) and needed <= room:
            chosen.add(name)
            room -= needed
    return [name for name in COLUMNS if name in chosen]


def totals_line(status: RunStatus) -> str:
    """`20 cells: 12 done, 2 running, 6 queued; 1930/3200 steps, 4.1/s, about 00:05:10 left`."""
    totals = status.totals
    counts = ", ".join(f"{count} {state}" for state, count in totals["states"].items())
    parts = [f"{len(status.cells)} cell{'s' if len(status.cells) > 1 else ''}: {counts}"]
    if totals["total"]:
        parts.append(f"{totals['step']}/{totals['total']} steps")
    if totals["left_s"] is not None:
        parts.append(f"{totals['rate']:.3g} steps/s, about {duration(totals['left_s'])} left at that")
    if totals["gpu_hours"]:
        parts.append(f"{totals['gpu_hours']:.1f} GPU hours")
    if taken := [CellDir(cell.trained_in).run for cell in status.cells if cell.trained_in]:
        parts.append(f"{len(taken)} trained in {', '.join(map(str, dict.fromkeys(taken)))}, and only evaluated here")
    return "; ".join(parts)


def plain_line(cell: CellStatus) -> str:
    """One cell as a line of a log."""
    parts = [f"{cell.name}: {cell.state}"]
    if cell.phase:
        parts.append(f"({cell.phase})")
    if cell.behind:
        parts.append(f"(waits in job {cell.job_id} behind {cell.behind})")
    if cell.total:
        parts.append(f"{cell.step}/{cell.total}")
    parts += [f"on {cell.node}"] if cell.node and cell.state == "running" else []
    parts += [f"{name} {value:.3f}" for name, value in cell.metric.items()]
    return " ".join(parts) + (f"  {cell.reason}" if cell.reason else "")


def _percent(account: Goodput | None) -> str:
    return f"{100 * account.share:.0f} %" if account and account.share is not None else ""


def duration(seconds: float) -> str:
    """`01:02:03`: hours, minutes, seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"
