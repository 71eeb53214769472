"""What one does with a run that is there: go on, end it, run cells again. Its frozen settings count, not `configs/`.

run folder ─read_plan→ plan ─→ submit | scancel
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
import typing as t
from collections.abc import Mapping, Sequence
from pathlib import Path

from bushpc.config import CellConfig, Composer
from bushpc.dispatch.run_folder import alone_in, owner_of, read_plan, start_anew
from bushpc.dispatch.status import CellStatus, read_run_json, read_status
from bushpc.dispatch.submit import Submission, submit
from bushpc.errors import ConfigError, DispatchError, unknown_name
from bushpc.files import read_json, write_atomically
from bushpc.lease import process_start

# States that `--only` may name: those from which a cell does not go on by itself.
RESUMABLE = ("failed", "stopped", "stale", "missing")
# What may change between two submissions of a run, besides the whole cluster profile.
FREE_GROUPS = ("cluster", "loader")


def resume(
    run_dir: Path, command: Sequence[str], *, only: str | None = None, overrides: Sequence[str] = ()
) -> Submission:
    """Submit what is missing of a run, whichever command made it.

    only: just the cells in this state, one of RESUMABLE. overrides: of the cluster and the loader, which decide how
    it runs and not what it learns: `cluster=mysite`, `cluster.time_min=600`.
    Raises: DataError if it is no run, ConfigError for another version's, and what `submit` raises.
    """
    if only is not None and only not in RESUMABLE:
        raise ConfigError(unknown_name("state in --only", only, RESUMABLE))
    plan = read_plan(run_dir)
    change = _change(overrides)
    cells = {name: change(cell) for name, cell in plan.cells.items()}
    plan = dataclasses.replace(plan, cells=cells)
    if only is not None:
        states = {cell.name: cell.state for cell in read_status(plan.first.run_dir).cells}
        plan = dataclasses.replace(plan, wanted=[name for name in plan.wanted if states[name] == only])
    return submit(plan, command)


def retry(run_dir: Path, names: Sequence[str], command: Sequence[str], *, fresh: bool = False) -> Submission:
    """Submit these cells again. fresh: from step 0; what they had is kept in `replaced/`.

    Raises: ConfigError for a name that is no cell, for a live one, and for one that is done unless `fresh`.
    """
    plan = read_plan(run_dir)
    run_dir = plan.first.run_dir
    status = _named(run_dir, read_status(run_dir).cells, names)
    for cell in status:
        if cell.live:
            raise ConfigError(f"{cell.name} is {cell.state}; end it first: bushpc cancel {run_dir} {cell.name}")
        if cell.state == "done" and not fresh:
            raise ConfigError(f"{cell.name} is done; --fresh trains it anew, and keeps this one in {run_dir}/replaced")
    if fresh:
        with alone_in([run_dir, *(owner_of(run_dir, cell.name) for cell in status)]):
            for cell in status:
                start_anew(run_dir, cell.name)
    return submit(dataclasses.replace(plan, wanted=[cell.name for cell in status]), command)


def cancel(run_dir: Path, names: Sequence[str] = ()) -> list[str]:
    """End the jobs of a run, or of some of its cells. Returns the cells that were live.

    What runs saves first: Slurm sends TERM, and KILL after its KillWait; so does a local job.
    Raises: ConfigError for a name that is no cell, and where a job would end that other cells share.
    """
    run_dir = run_dir.resolve()
    read_run_json(run_dir)
    with alone_in([run_dir]):
        status = read_status(run_dir)
        wanted = [cell for cell in _named(run_dir, status.cells, names) if cell.live]
        jobs = {cell.job_id for cell in wanted}
        beside = [cell.name for cell in status.cells if cell.live and cell.job_id in jobs and cell not in wanted]
        if beside:
            raise ConfigError(
                f"{', '.join(cell.name for cell in wanted)} share a job with {', '.join(beside)}, which would end, "
                "too: name them all"
            )
        for cell in wanted:
            path = run_dir / "cells" / cell.name / "job.json"
            write_atomically(path, json.dumps({**(read_json(path) or {}), "cancelled": time.time()}))
        _end([read_json(run_dir / "cells" / cell.name / "job.json") or {} for cell in wanted])
        report = read_json(run_dir / "jobs" / "report.json")
        if report and not names and status.report_live:
            _end([report])
    return [cell.name for cell in wanted]


def _named(run_dir: Path, cells: Sequence[CellStatus], names: Sequence[str]) -> list[CellStatus]:
    """Cells by name, in the run's order; all of them where no name is given. A row's name stands for its folds."""
    run = read_run_json(run_dir)
    rows = {entry["name"]: entry.get("row") for entry in run["cells"]}
    for name in names:
        if name not in rows and name not in rows.values():
            raise ConfigError(unknown_name("cell", name, [*rows, *(row for row in rows.values() if row)]))
    return [cell for cell in cells if not names or cell.name in names or rows[cell.name] in names]


def _end(jobs: Sequence[Mapping[str, t.Any]]) -> None:
    on_slurm = sorted({job["job_id"] for job in jobs if job["executor"] == "slurm"})
    for i in range(0, len(on_slurm), 200):  # one command line holds so many with room to spare
        command = ["scancel", *on_slurm[i : i + 200]]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", "") or error
            raise DispatchError(f"Slurm did not cancel {', '.join(command[1:4])} … ({detail}); try again") from error
    for job in jobs:
        if job["executor"] != "slurm" and job.get("process_start") == process_start(int(job["job_id"])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job["job_id"]), signal.SIGTERM)


def _change(overrides: Sequence[str]) -> t.Callable[[CellConfig], CellConfig]:
    """What `overrides` do to a frozen cell's cluster and loader."""
    if not overrides:
        return lambda cell: cell
    for word in overrides:
        key = word.partition("=")[0]
        if key.partition(".")[0] not in FREE_GROUPS:
            raise ConfigError(
                f"{word}: a run that goes on may only get other {' or '.join(FREE_GROUPS)} settings. For another "
                f"{key} submit it with the command it was made with, and resume_changes=[{key}]"
            )
    profile = next((word for word in overrides if word.startswith("cluster=")), None)
    composed = Composer(overrides)({})
    keys = [word.partition("=")[0] for word in overrides if "." in word.partition("=")[0]]

    def change(cell: CellConfig) -> CellConfig:
        if profile:
            choices = {**cell.choices, "cluster": composed.choices["cluster"]}
            cell = dataclasses.replace(cell, cluster=composed.cluster, choices=choices)
        for key in keys:
            group, _, field = key.partition(".")
            new = {field: getattr(getattr(composed, group), field)}
            cell = dataclasses.replace(cell, **{group: dataclasses.replace(getattr(cell, group), **new)})
        return cell

    return change
