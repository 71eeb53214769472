"""Plan → run folder: what is to be done, written down before anything is queued; and back, for whoever goes on with it.

bushpc.runs.layout says what lies where.

A cell of a grid is trained once: where another run in the same folder, or another of its rows, has the same settings on
the same data and folds, `cells/<cell>` is a link to that one's folder, and `linked/<cell>.yaml` says what this run asks
of it: the other run may be edited, or go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import typing as t
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bushpc import weights
from bushpc.config import CellConfig, differences, load_frozen, way_on
from bushpc.data.external import seen_by_generator
from bushpc.data.lineage import distinct, trained_on
from bushpc.dispatch.chains import trainings_behind
from bushpc.dispatch.grid_record import grid_record, read_grid
from bushpc.dispatch.plan import Plan
from bushpc.dispatch.snapshot import commit, take_snapshot, versions
from bushpc.dispatch.starting import Behind, behind
from bushpc.dispatch.status import read_status
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import exclusive, why_not_writable, write_all, write_atomically
from bushpc.runs.goodput import trained_in
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import HASH_LINE
from bushpc.runs.run_record import (
    CellRecord,
    FoldsRecord,
    RunRecord,
    SubmissionRecord,
    VariantRecord,
)


@contextlib.contextmanager
def alone_in(run_dirs: Iterable[Path]) -> Iterator[None]:
    """Hold the locks of run folders.

    Raises: DispatchError if another command is at work in one of them, or this user may not write into one.
    """
    with contextlib.ExitStack() as locks:
        for run_dir in sorted(set(run_dirs)):
            _require_writable(RunDir(run_dir))
            run_dir.mkdir(parents=True, exist_ok=True)
            if not locks.enter_context(exclusive(RunDir(run_dir).lock)):
                raise DispatchError(f"another command is submitting {run_dir}; wait for it and try again")
        yield


def _require_writable(run: RunDir) -> None:
    """Raises: DispatchError before anything is changed, where a later write would fail."""
    for folder in (run.path, *(path for path in (run.cells, run.jobs, run.code) if path.exists())):
        if reason := why_not_writable(folder):
            if not run.file.exists():
                raise DispatchError(f"{reason}. Choose a folder of yours for runs: runs_dir=FOLDER")
            raise DispatchError(
                f"{reason}; so you can look at {run} (status, report --out, predict), but not submit or end its cells. "
                "For a run of your own repeat the command that made it, with runs_dir=FOLDER"
            )


def write_run(run_dir: Path, plan: Plan, command: Sequence[str]) -> Path:
    """Create the run directory, or bring the one that is there up to date. Call it under its lock.

    A grid whose rows were edited keeps what fits: cells with other settings go to `stale/`, and start anew. So do
    cells that are not done and began to train, where they are to take weights over now, and the other way round.
    Returns the snapshot of the code, for its jobs.
    Raises: ConfigError when it was started on other data, when a cell that runs was edited, or when a
    cross-validation has other settings.
    """
    run = RunDir(run_dir)
    known = RunRecord.read(run.file)
    facts = plan.data.facts
    for key, value in facts.items():
        if known and known.facts[key] != value:
            raise ConfigError(
                f"{run_dir} was started on other data: {key} was {known.facts[key]}, now {value}. Choose another "
                "name=…, or restore the shards and folds it was started with"
            )
    if known and known.kind != plan.kind:
        raise ConfigError(f"{run_dir} is a run of `bushpc {known.kind}`; choose another name=…")
    dropped = {cell.name for cell in known.cells} - plan.cells.keys() if known else set()
    before = _frozen_cells(run, plan)
    edited, stale = _edited(run_dir, plan, before)
    stale += [name for name in before if name not in stale and _has_other_weights(run.cell(name), plan.cells[name])]
    if changing := {*edited, *stale, *dropped}:
        running = [cell.name for cell in read_status(run_dir, known).cells if cell.live and cell.name in changing]
        if running:
            raise ConfigError(
                f"{', '.join(running)} of {run_dir} run with settings that the run is not to have any more: end them "
                f"first, `bushpc cancel {run_dir} {' '.join(running)}`"
            )
    for name in stale:
        _set_aside(run, name, run.stale)
    twins = _twins(run, plan, facts)
    run.cells.mkdir(parents=True, exist_ok=True)
    texts: dict[Path, str] = {}
    for name, cell in plan.cells.items():
        folder, asked = run.cell(name), run.linked(name)
        if not folder.is_link() and not folder.exists() and cell.hash in twins:
            folder.path.symlink_to(os.path.relpath(twins[cell.hash], run.cells))
        if folder.is_link():
            asked.parent.mkdir(exist_ok=True)
            texts[asked] = _config_text(cell)
            continue
        asked.unlink(missing_ok=True)
        folder.path.mkdir(exist_ok=True)
        if name in before and before[name].hash == cell.hash:
            # What went on with other settings once is no clean twin of anything, whatever is said later.
            cell = dataclasses.replace(
                cell, resume_changes=tuple(dict.fromkeys((*before[name].resume_changes, *cell.resume_changes)))
            )
        if plan.kind == "grid" and not cell.resume_changes:
            twins.setdefault(cell.hash, folder)  # of the rows that come
        if name in edited:
            folder.done.unlink(missing_ok=True)
        if before.get(name) != cell:  # a config that says the same stays as its version of bushpc wrote it
            texts[folder.config] = _config_text(cell)
    texts[run.folds] = plan.data.folds_file.read_text()
    write_all({path: text for path, text in texts.items() if _is_new(path, text)})
    code = take_snapshot(run_dir)
    record = _record(run, plan, facts, known, command, code)
    if run.report.is_dir() and (known is None or (record.grid, record.cells) != (known.grid, known.cells)):
        run.report_outdated.touch()  # the next page takes the folder's place
    record.write(run.file)
    return code


def read_plan(run_dir: Path) -> Plan:
    """The plan that a run was made from, whatever became of `configs/` since.

    Raises: DataError if it is no run; ConfigError where its settings are those of another version of bushpc.
    """
    run = RunDir(run_dir).resolve()
    record = RunRecord.open(run)
    cells = {}
    for name in (entry.name for entry in record.cells):
        cell = _frozen(run.asked(name), run)
        if cell.fold is None:
            raise ConfigError(f"{name} of {run} has no fold; submit it again with the command that made it")
        # A run folder may have been moved.
        cell = dataclasses.replace(cell, name=run.name, runs_dir=str(run.path.parent))
        if cell.work == "train" and cell.source is not None:
            scans = str(run.cell(cell.source).scans)
            cell = dataclasses.replace(cell, data=dataclasses.replace(cell.data, synthetic=scans))
        cells[name] = cell
    return Plan(
        kind=record.kind,
        cells=cells,
        wanted=list(cells),
        grid=read_grid(record.grid) if record.grid else None,
        row_of={entry.name: entry.row for entry in record.cells if entry.row is not None},
    )


def _frozen(path: Path, run: RunDir) -> CellConfig:
    return load_frozen(path, run.path, f"resume {run.resolve()}")


def owner_of(run_dir: Path, cell: str) -> Path:
    """The run folder that a cell's folder belongs to: `run_dir`, or that of a run which has the same cell."""
    return RunDir(run_dir).cell(cell).resolve().run.path


def start_anew(run_dir: Path, cell: str) -> None:
    """Set a cell's results aside, so that its next start begins with step 0; a link to another run's is cut."""
    run = RunDir(run_dir)
    text = run.asked(cell).read_text()
    _set_aside(run, cell, run.replaced)
    run.linked(cell).unlink(missing_ok=True)
    run.cell(cell).path.mkdir()
    write_atomically(run.cell(cell).config, text)


def _frozen_cells(run: RunDir, plan: Plan) -> dict[str, CellConfig]:
    """The settings that lie in the folders of the plan's cells; links to what a cell is not any more are cut."""
    found = {}
    for name, cell in plan.cells.items():
        folder = run.cell(name)
        if folder.config.exists():
            found[name] = _frozen(folder.config, folder.resolve().run)
        if folder.is_link() and (
            name not in found or found[name].hash != cell.hash or _has_other_weights(folder, cell)
        ):
            folder.path.unlink()  # the run that had it is gone, or one of the two was edited
            found.pop(name, None)
    return found


def _has_other_weights(folder: CellDir, cell: CellConfig) -> bool:
    """Whether a cell that is not done has trained where it is to take weights over, or the other way round."""
    taken, begun = bool(trained_in(folder)), folder.newest_step() > 0
    return not folder.done.exists() and (taken or begun) and taken != bool(cell.train.weights_from)


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


def _set_aside(run: RunDir, name: str, where: Path) -> None:
    """Move a cell's folder to `where`; of another run's only the link is cut."""
    folder = run.cell(name)
    if folder.is_link():
        folder.path.unlink()
        return
    where.mkdir(exist_ok=True)
    folder.path.rename(run.free_place(where, name, _frozen(folder.config, run).hash))


def _twins(run: RunDir, plan: Plan, facts: Mapping[str, t.Any]) -> dict[str, CellDir]:
    """Config hash → folder of a cell beside this run that trains, or trained, the same on the same data and folds."""
    wanted = {
        cell.hash: cell
        for name, cell in plan.cells.items()
        # Who cross-validates the same again under another name wants to see it again.
        if plan.kind == "grid" and not run.cell(name).exists() and not cell.resume_changes
    }
    found: dict[str, CellDir] = {}
    if not wanted:
        return found
    for other in run.neighbours():
        record = RunRecord.read_whole(other.file)
        if record is None or record.facts != facts:  # the first is damaged, and not ours to mend
            continue
        for folder in (*(other.cell(cell.name) for cell in record.cells), *other.stale_cells()):
            if folder.is_link() or not os.access(folder, os.W_OK):
                continue  # found where it really lies; a colleague's cell that fails could not be run again by us
            with contextlib.suppress(ConfigError):  # of another version: no twin
                cell = CellConfig.load(folder.config)
                if cell.hash not in wanted or cell.resume_changes:
                    continue
                # Who is to take weights over does not wait for another's training, and one that waits for weights to
                # take over is nothing to wait for.
                trains = not (cell.train.weights_from or wanted[cell.hash].train.weights_from)
                if (trains or folder.done.exists()) and _is_better(folder, found.get(cell.hash)):
                    found[cell.hash] = folder
    return found


def done_elsewhere(plan: Plan) -> set[str]:
    """Cells of a grid that a run beside this one has trained, and that this one would take from there."""
    run = RunDir(plan.first.run_dir)
    if not run.path.parent.is_dir():
        return set()
    twins = _twins(run, plan, plan.data.facts)
    return {name for name, cell in plan.cells.items() if cell.hash in twins and twins[cell.hash].done.exists()}


def _is_better(folder: CellDir, than: CellDir | None) -> bool:
    """Whether a cell is to be taken before another one with the same settings: one that is done before any other."""
    return than is None or (folder.done.exists() and not than.done.exists())


def _record(
    run: RunDir, plan: Plan, facts: Mapping[str, t.Any], known: RunRecord | None, command: Sequence[str], code: Path
) -> RunRecord:
    first, grid = plan.first, plan.grid
    before = {cell.name: cell for cell in known.cells} if known else {}
    trainings: dict[t.Any, Behind] = {}  # the rows of a grid share them
    for name, cell in plan.cells.items():
        if (key := _data_of(cell)) not in trainings:
            trainings[key] = _behind(cell, plan, facts["folds"]["sha256"], before.get(name))
    now = SubmissionRecord(
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        commit=commit(),
        code=code.name,
        command=list(command),
        versions=versions(),
    )
    goes_on = known is not None and command[1] in ("resume", "retry")
    models = {plan.row_of[name]: cell.choices["model"] for name, cell in plan.cells.items() if name in plan.row_of}
    return RunRecord(
        name=run.name,
        kind=plan.kind,
        created=known.created if known else now.time,
        commit=now.commit,
        # The one that made it: a `bushpc resume` later on tells nobody what the run is.
        command=known.command if known and goes_on else now.command,
        model=first.choices["model"],
        data=first.data.name,
        excerpt=plan.data.manifest.excerpt,
        prompts=first.variants[0].name,
        variants=[
            VariantRecord(name=variant.name, label=variant.label, uses_ground_truth=variant.uses_ground_truth)
            for variant in dict.fromkeys(variant for cell in plan.cells.values() for variant in cell.variants)
        ],
        shards=str(first.data.folder),
        manifest_sha256=facts["manifest_sha256"],
        folds=FoldsRecord(**facts["folds"]),
        versions=now.versions,
        submissions=[*(known.submissions if known else ()), now],
        grid=grid_record(grid, models) if grid else None,
        cells=[_cell_record(plan, name, trainings[_data_of(cell)]) for name, cell in plan.cells.items()],
    )


def _data_of(cell: CellConfig) -> t.Any:
    """What decides which data a cell's weights come from."""
    return cell.fold, cell.data, cell.model.starts_from, cell.model.weights, cell.train.start_from, cell.train.start_row


def _behind(cell: CellConfig, plan: Plan, folds_sha256: str, before: CellRecord | None) -> Behind:
    """What a cell starts from, and all trainings behind it. before: as the run recorded it, if it did.

    What it started from may be gone by now.
    """
    if before and before.hash == cell.hash and before.started_from and before.trained_on:
        return Behind(before.started_from, tuple(before.trained_on))
    planned = cell.train.start_from and cell.train.start_sha256 is None  # its start is not there yet
    found = Behind() if planned else behind(cell)
    own = trained_on(cell, plan.data.manifest, folds_sha256, _generator_of(plan, cell))
    return Behind(found.note, tuple(distinct([*own, *found.trainings])))


def _cell_record(plan: Plan, name: str, behind_it: Behind) -> CellRecord:
    cell = plan.cells[name]
    assert cell.fold is not None, "the plan gives every cell its fold"
    return CellRecord(
        name=name,
        fold=cell.fold,
        hash=cell.hash,
        iterations={"train": cell.train.iterations, "generate": cell.synthesis.n, "quality": 1}[cell.work],
        work=cell.work,
        row=plan.row_of.get(name),
        generator_saw=seen_by_generator(cell, _generator_of(plan, cell)),
        trained_on=list(behind_it.trainings),
        started_from=behind_it.note,
        pulled=_pulled(cell),
    )


def _generator_of(plan: Plan, cell: CellConfig) -> list[dict[str, t.Any]] | None:
    return trainings_behind(plan.cells, cell, plan.data.manifest, plan.data.facts["folds"]["sha256"])


def _pulled(cell: CellConfig) -> list[dict[str, t.Any]]:
    try:
        return weights.origins(cell.model, cell.weights_folder)
    except ConfigError:  # of a fold that is planned for later, whose own base is not there yet
        return []


def _config_text(cell: CellConfig) -> str:
    """A cell's `config.yaml`; its first line is for those who only want to know whether it is the same."""
    return f"{HASH_LINE}{cell.hash}\n{cell.to_yaml()}"


def _is_new(path: Path, content: str) -> bool:
    """A thousand files that are as they should be need not be written, and flushed, again."""
    return not path.exists() or path.read_text() != content
