"""Runs of a paper's steps → one page: the paper's figures beside ours, row by row, each with its unit and grid."""

from __future__ import annotations

import os
import typing as t
from collections.abc import Sequence
from pathlib import Path

from bushpc.report import standalone
from bushpc.report.scope import scope_of_run
from bushpc.report.summary import summarise
from bushpc.report.table import Table
from bushpc.report.tables import all_tables
from bushpc.runs.layout import RunDir


class RunOfStep(t.NamedTuple):
    """A step, where its run is, and the command that makes it. state: as `bushpc reproduce` shows it."""

    name: str
    what: str
    state: str
    run_dir: Path
    command: str


class ShownStep(t.NamedTuple):
    """A step on the page.

    link: to the run's own report. missing: cells that are not done. tables: with the paper's rows, or where the paper
    has none for it, the run's main one.
    """

    step: RunOfStep
    link: str
    missing: int
    quoted: bool
    tables: list[Table]


def write_reproduction(title: str, steps: Sequence[RunOfStep], folder: Path, command: Sequence[str]) -> Path:
    """Write `folder`/index.html and a CSV of every table. Steps without a run are listed as not run.

    Raises: DataError for a run that contradicts itself.
    """
    shown = [_shown(step, folder) for step in steps]
    done = sum(step.state == "done" for step in steps)
    return standalone.write_page(folder, "reproduction.html.j2", command, title=title, steps=shown, done=done)


def _shown(step: RunOfStep, folder: Path) -> ShownStep:
    run = RunDir(step.run_dir)
    if not run.file.exists():
        return ShownStep(step, "", 0, False, [])
    scope = scope_of_run(step.run_dir)
    summary = summarise(scope)
    tables = list(all_tables(scope, summary, None).values())
    quoted = [table for table in tables if _is_quoted(table)]
    missing = sum(len(arm.folds.missing) for arm in summary.arms)
    link = os.path.relpath(run.report_page, folder) if run.report_page.exists() else ""
    return ShownStep(step, link, missing, bool(quoted), quoted or tables[:1])


def _is_quoted(table: Table) -> bool:
    """Whether it has a row or a column of the paper."""
    return any(row.quoted for row in table.rows) or any(column.quoted for column in table.columns)
