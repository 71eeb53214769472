"""Plan → run folder: what is to be done, written down before anything is queued; and back, for whoever goes on with it.

runs/<name>/
  run.json        what this run is: cells and their hashes, rows of its grid, data, folds, versions, commands
  folds.csv       the folds it uses, whatever becomes of the dataset's own
  cells/<cell>/   see bushpc.cell; job.json there names the job that works on it
  linked/         settings of the cells that are links
  stale/          cells whose settings were edited since, as they were; a grid that has such settings takes them back
  replaced/       cells that were trained anew on request, as they were before
  code/<hash>/    package and configs as they were at submission; jobs import them from there
  jobs/           submitit's scripts, pickles and logs
  report/         see bushpc.report

A cell of a grid is trained once: where another run beside it, or another of its rows, has the same settings on the same
data and folds, `cells/<cell>` is a link to that one's folder, and `linked/<cell>.yaml` says what this run asks of it:
the other run may be edited, or go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import typing as t
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import bushpc
from bushpc.config import CONFIG_DIR, ROOT, CellConfig, differences, load_frozen, way_on
from bushpc.data.external import seen_by_generator
from bushpc.data.lineage import trained_on
from bushpc.dispatch.plan import Grid, GridRow, Plan, data_facts
from bushpc.dispatch.status import HASH_LINE, OUTDATED, RUN_FORMAT, cell_names, read_run_json, read_status
from bushpc.errors import ConfigError, DataError, DispatchError
from bushpc.files import exclusive, read_json, sha256_of, write_atomically
from bushpc.runs.goodput import newest_saved, trained_in
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import find_folds


@contextlib.contextmanager
def alone_in(run_dirs: Iterable[Path]) -> Iterator[None]:
    """Hold the locks of run folders. Raises: DispatchError if another command is at work in one of them."""
    with contextlib.ExitStack() as locks:
        for run_dir in sorted(set(run_dirs)):
            run_dir.mkdir(parents=True, exist_ok=True)
            if not locks.enter_context(exclusive(run_dir / ".submit.lock")):
                raise DispatchError(f"another command is submitting {run_dir}; wait for it and try again")
        yield


def write_run(run_dir: Path, plan: Plan, command: Sequence[str]) -> Path:
    """Create the run directory, or bring the one that is there up to date. Call it under its lock.

    A grid whose rows were edited keeps what fits: cells with other settings go to `stale/`, and start anew. So do
    cells that are not done and began to train, where they are to take weights over now, and the other way round.
    Returns the snapshot of the code, for its jobs.
    Raises: ConfigError when it was started on other data, when a cell that runs was edited, or when a
    cross-validation has other settings.
    """
    known = read_run_json(run_dir) if (run_dir / "run.json").exists() else {}
    facts = data_facts(Manifest.load(plan.first.data.folder), plan.first.folds, find_folds_of(plan.first))
    for key, value in facts.items():
        if known and known[key] != value:
            raise ConfigError(
                f"{run_dir} was started on other data: {key} was {known[key]}, now {value}. Choose another name=…, "
                "or restore the shards and folds it was started with"
            )
    if known and known.get("kind", "cv") != plan.kind:
        raise ConfigError(f"{run_dir} is a run of `bushpc {known.get('kind', 'cv')}`; choose another name=…")
    dropped = {entry["name"] for entry in known.get("cells", [])} - plan.cells.keys()
    before = _frozen_cells(run_dir, plan)
    edited, stale = _edited(run_dir, plan, before)
    stale += [name for name in before if name not in stale and _has_other_weights(run_dir, name, plan.cells[name])]
    if changing := {*edited, *stale, *dropped}:
        running = [cell.name for cell in read_status(run_dir).cells if cell.live and cell.name in changing]
        if running:
            raise ConfigError(
                f"{', '.join(running)} of {run_dir} run with settings that the run is not to have any more: end them "
                f"first, `bushpc cancel {run_dir} {' '.join(running)}`"
            )
    for name in stale:
        _set_aside(run_dir, name, run_dir / "stale")
    twins = _twins(run_dir, plan, facts)
    (run_dir / "cells").mkdir(parents=True, exist_ok=True)
    for name, cell in plan.cells.items():
        folder, asked = run_dir / "cells" / name, run_dir / "linked" / f"{name}.yaml"
        if not folder.is_symlink() and not folder.exists() and cell.hash in twins:
            folder.symlink_to(os.path.relpath(twins[cell.hash], folder.parent))
        if folder.is_symlink():
            asked.parent.mkdir(exist_ok=True)
            _write_if_new(asked, _config_text(cell))
            continue
        asked.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        if name in before and before[name].hash == cell.hash:
            # What went on with other settings once is no clean twin of anything, whatever is said later.
            cell = dataclasses.replace(
                cell, resume_changes=tuple(dict.fromkeys((*before[name].resume_changes, *cell.resume_changes)))
            )
        if plan.kind == "grid" and not cell.resume_changes:
            twins.setdefault(cell.hash, folder)  # of the rows that come
        if name in edited:
            (folder / "DONE").unlink(missing_ok=True)
        _write_if_new(folder / "config.yaml", _config_text(cell))
    _write_if_new(run_dir / "folds.csv", find_folds_of(plan.first).read_text())
    code = snapshot(run_dir)
    run = _run_json(run_dir, plan, facts, known, command, code)
    if (run_dir / "report").is_dir() and any(run[key] != known.get(key) for key in ("grid", "cells")):
        (run_dir / "report" / OUTDATED).touch()  # the next page takes the folder's place
    write_atomically(run_dir / "run.json", json.dumps(run, indent=1))
    return code


def read_plan(run_dir: Path) -> Plan:
    """The plan that a run was made from, whatever became of `configs/` since.

    Raises: DataError if it is no run; ConfigError where its settings are those of another version of bushpc.
    """
    run_dir = run_dir.resolve()
    run = read_run_json(run_dir)
    cells = {}
    for name in cell_names(run_dir / "run.json", run):
        linked = run_dir / "linked" / f"{name}.yaml"
        cell = _frozen(linked if linked.exists() else run_dir / "cells" / name / "config.yaml", run_dir)
        if cell.fold is None:
            raise ConfigError(f"{name} of {run_dir} has no fold; submit it again with the command that made it")
        # A run folder may have been moved.
        cells[name] = dataclasses.replace(cell, name=run_dir.name, runs_dir=str(run_dir.parent))
    return Plan(
        kind=run.get("kind", "cv"),
        cells=cells,
        wanted=list(cells),
        grid=_read_grid(run["grid"]) if run.get("grid") else None,
        row_of={entry["name"]: entry["row"] for entry in run["cells"] if "row" in entry},
    )


def _frozen(path: Path, run_dir: Path) -> CellConfig:
    return load_frozen(path, run_dir, f"resume {run_dir.resolve()}")


def _read_grid(grid: Mapping[str, t.Any]) -> Grid:
    rows = [GridRow(name=row["name"], label=row["label"], settings=row["settings"]) for row in grid["rows"]]
    return Grid(name=grid["name"], title=grid["title"], base=(), rows=tuple(rows), baseline=grid["baseline"])


def owner_of(run_dir: Path, cell: str) -> Path:
    """The run folder that a cell's folder belongs to: `run_dir`, or that of a run which has the same cell."""
    return (run_dir / "cells" / cell).resolve().parent.parent


def start_anew(run_dir: Path, cell: str) -> None:
    """Set a cell's results aside, so that its next start begins with step 0; a link to another run's is cut."""
    asked = run_dir / "linked" / f"{cell}.yaml"
    text = (asked if asked.exists() else run_dir / "cells" / cell / "config.yaml").read_text()
    _set_aside(run_dir, cell, run_dir / "replaced")
    asked.unlink(missing_ok=True)
    (run_dir / "cells" / cell).mkdir()
    write_atomically(run_dir / "cells" / cell / "config.yaml", text)


def snapshot(run_dir: Path) -> Path:
    """Copy package and configs into the run, once per content, so that editing never changes a queued job."""
    package = Path(bushpc.__file__).parent
    # An installed package holds its configs itself.
    folders = (package,) if CONFIG_DIR.is_relative_to(package) else (package, CONFIG_DIR)
    files = sorted((path, folder.parent) for folder in folders for path in folder.rglob("*") if path.is_file())
    kept = [(path, above) for path, above in files if "__pycache__" not in path.parts]
    listing = "".join(f"{path.relative_to(above)} {sha256_of(path)}\n" for path, above in kept)
    target = run_dir / "code" / hashlib.sha256(listing.encode()).hexdigest()[:12]
    if not target.exists():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        for folder in folders:
            shutil.copytree(folder, aside / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        aside.rename(target)
    return target


def find_folds_of(cell: CellConfig) -> Path:
    """The fold file of a cell's dataset."""
    folder = cell.data.folder
    return find_folds(Manifest.load(folder), folder, cell.folds)


def _frozen_cells(run_dir: Path, plan: Plan) -> dict[str, CellConfig]:
    """The settings that lie in the folders of the plan's cells; links to what a cell is not any more are cut."""
    found = {}
    for name, cell in plan.cells.items():
        folder = run_dir / "cells" / name
        if (folder / "config.yaml").exists():
            found[name] = _frozen(folder / "config.yaml", owner_of(run_dir, name))
        if folder.is_symlink() and (
            name not in found or found[name].hash != cell.hash or _has_other_weights(run_dir, name, cell)
        ):
            folder.unlink()  # the run that had it is gone, or one of the two was edited
            found.pop(name, None)
    return found


def _has_other_weights(run_dir: Path, name: str, cell: CellConfig) -> bool:
    """Whether a cell that is not done has trained where it is to take weights over, or the other way round."""
    folder = run_dir / "cells" / name
    taken, begun = bool(trained_in(folder)), newest_saved(folder) > 0
    return not (folder / "DONE").exists() and (taken or begun) and taken != bool(cell.train.weights_from)


def _edited(run_dir: Path, plan: Plan, before: Mapping[str, CellConfig]) -> tuple[list[str], list[str]]:
    """Cells whose settings differ from what lies there: those that go on with the new ones, and stale ones.

    Raises: ConfigError where a cross-validation is to have other settings, as that would throw all of it away.
    """
    edited: list[str] = []
    stale: list[str] = []
    for name, then in before.items():
        if then.hash == plan.cells[name].hash:
            continue
        changed = differences(then, plan.cells[name])
        if changed and plan.kind != "grid":
            names = [line.partition(":")[0] for line in changed]
            raise ConfigError(f"{run_dir} has other settings: {'; '.join(changed)}; {way_on(names)}")
        (stale if changed else edited).append(name)
    return edited, stale


def _set_aside(run_dir: Path, name: str, where: Path) -> None:
    """Move a cell's folder to `where`; of another run's only the link is cut."""
    folder = run_dir / "cells" / name
    if folder.is_symlink():
        folder.unlink()
        return
    where.mkdir(exist_ok=True)
    config_hash = _frozen(folder / "config.yaml", run_dir).hash
    places = (where / f"{name}-{config_hash}{f'.{number}' if number else ''}" for number in itertools.count())
    folder.rename(next(place for place in places if not place.exists()))


def _twins(run_dir: Path, plan: Plan, facts: Mapping[str, t.Any]) -> dict[str, Path]:
    """Config hash → folder of a cell beside this run that trains, or trained, the same on the same data and folds."""
    wanted = {
        cell.hash: cell
        for name, cell in plan.cells.items()
        # Who cross-validates the same again under another name wants to see it again.
        if plan.kind == "grid" and not (run_dir / "cells" / name).exists() and not cell.resume_changes
    }
    found: dict[str, Path] = {}
    if not wanted:
        return found
    for path in sorted(run_dir.parent.glob("*/run.json")):
        try:
            run = read_json(path) or {}
        except DataError:
            continue  # damaged, and not ours to mend
        if any(run.get(key) != value for key, value in facts.items()):
            continue
        try:
            folders = [path.parent / "cells" / name for name in cell_names(path, run)]
        except DataError:
            continue
        for folder in (*folders, *sorted((path.parent / "stale").glob("*"))):
            if folder.is_symlink() or not os.access(folder, os.W_OK):
                continue  # found where it really lies; a colleague's cell that fails could not be run again by us
            with contextlib.suppress(ConfigError):  # of another version: no twin
                cell = CellConfig.load(folder / "config.yaml")
                if cell.hash not in wanted or cell.resume_changes:
                    continue
                # Who is to take weights over does not wait for another's training, and one that waits for weights to
                # take over is nothing to wait for.
                trains = not (cell.train.weights_from or wanted[cell.hash].train.weights_from)
                if (trains or (folder / "DONE").exists()) and _is_better(folder, found.get(cell.hash)):
                    found[cell.hash] = folder
    return found


def _is_better(folder: Path, than: Path | None) -> bool:
    """Whether a cell is to be taken before another one with the same settings: one that is done before any other."""
    return than is None or ((folder / "DONE").exists() and not (than / "DONE").exists())


def _run_json(
    run_dir: Path,
    plan: Plan,
    facts: Mapping[str, t.Any],
    known: Mapping[str, t.Any],
    command: Sequence[str],
    code: Path,
) -> dict[str, t.Any]:
    first, grid = plan.first, plan.grid
    manifest = Manifest.load(first.data.folder)
    now = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "code": code.name,
        "command": list(command),
        "versions": _versions(),
    }
    models = {plan.row_of[name]: cell.choices["model"] for name, cell in plan.cells.items() if name in plan.row_of}
    return {
        "format": RUN_FORMAT,
        "name": run_dir.name,
        "kind": plan.kind,
        "created": known.get("created", now["time"]),
        "commit": now["commit"],
        # The one that made it: a `bushpc resume` later on tells nobody what the run is.
        "command": known.get("command", now["command"]) if command[1] in ("resume", "retry") else now["command"],
        "model": first.choices["model"],
        "data": first.data.name,
        "excerpt": manifest.excerpt,
        "prompts": first.variants[0].name,
        "shards": str(first.data.folder),
        **facts,
        "versions": now["versions"],
        "submissions": [*known.get("submissions", []), now],
        "grid": grid
        and {
            "name": grid.name,
            "title": grid.title,
            "baseline": grid.baseline,
            "rows": [{**vars(row), "model": models[row.name]} for row in grid.rows],
        },
        "cells": [
            {"name": name, "fold": cell.fold, "hash": cell.hash, "iterations": cell.train.iterations}
            | ({"row": plan.row_of[name]} if name in plan.row_of else {})
            | ({"generator_saw": seen} if (seen := seen_by_generator(cell)) else {})
            | {"trained_on": trained_on(cell, manifest, facts["folds"]["sha256"])}
            for name, cell in plan.cells.items()
        ],
    }


def _config_text(cell: CellConfig) -> str:
    """A cell's `config.yaml`; its first line is for those who only want to know whether it is the same."""
    return f"{HASH_LINE}{cell.hash}\n{cell.to_yaml()}"


def _write_if_new(path: Path, content: str) -> None:
    """A thousand files that are as they should be need not be written, and flushed, again."""
    if not path.exists() or path.read_text() != content:
        write_atomically(path, content)


def _commit() -> str | None:
    """The checkout's commit, with +changes when the tree differs from it; None outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    if head.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return head.stdout.strip() + ("+changes" if dirty.strip() else "")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("bushpc", "torch", "accelerate", "deepspeed", "timm", "open_clip_torch", "submitit", "nnunetv2"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
