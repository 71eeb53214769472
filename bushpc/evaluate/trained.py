"""A run folder → the trained cells in it that are asked for, and the post-processing chosen for them. No torch.

runs/<name> ─open_run→ TrainedRun → predict, export, generate, postprocess
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bushpc.config import CellConfig, load_frozen
from bushpc.errors import ConfigError, DataError, ResumeError, unknown_name
from bushpc.files import EXPORT_FILE
from bushpc.runs.chosen import PLAIN, Chosen, Rule, stamp
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import DoneRecord
from bushpc.runs.run_record import CellRecord, RunRecord


@dataclass(frozen=True, kw_only=True)
class TrainedCell:
    """A cell that is done. folder: its own, which in a grid may be another run's; step: its last."""

    name: str
    fold: int
    folder: CellDir
    step: int
    config: CellConfig


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The cells of a run, or of one row of a grid, that are asked for and done; and those that are not done."""

    path: Path
    record: RunRecord
    row: str | None
    cells: list[TrainedCell]
    missing: list[str]


def open_run(path: Path, fold: int | None, row: str | None, say: Callable[[str], None]) -> TrainedRun:
    """Find the trained cells of a run folder. Raises: as `load`."""
    run = RunDir(path)
    record = RunRecord.read(run.file)
    if record is None:
        raise DataError(
            f"{path} is neither a run folder (no run.json) nor an exported model (no {EXPORT_FILE}). Runs lie below "
            "`runs/`; see `ls runs`"
        )
    wanted = {cell.fold: cell for cell in _cells_of_row(path, record, row)}
    if fold is not None and fold not in wanted:
        raise ConfigError(f"fold {fold} does not exist in {path}; valid: {', '.join(map(str, sorted(wanted)))}")
    # An export depends on no settings of its version.
    command = f"export {path.resolve()} OUT{f' --row {row}' if row else ''}"
    done, missing = [], []
    for number, cell in sorted(wanted.items()):
        if fold in (None, number):
            folder = run.cell(cell.name).resolve()  # in a grid a link, where another run trained the cell
            ended = DoneRecord.read(folder.done)
            if ended is None or ended.step is None:
                missing.append(cell.name)
            else:
                config = load_frozen(folder.config, path, command)
                if cell.hash not in (None, config.hash):  # another run's by now, and that one was edited
                    missing.append(f"{cell.name} (which has other settings than the run)")
                    continue
                done.append(TrainedCell(name=cell.name, fold=number, folder=folder, step=ended.step, config=config))
    if not done:
        raise ResumeError(
            f"{', '.join(missing)} of {path} {'is' if len(missing) == 1 else 'are'} not done; see `bushpc status "
            f"{path}`, and train on, or choose a fold that is done"
        )
    if missing:
        say(f"the ensemble is of {len(done)} of {len(wanted)} folds: {', '.join(missing)} not done")
    return TrainedRun(path=path, record=record, row=row, cells=done, missing=missing)


def _cells_of_row(path: Path, record: RunRecord, row: str | None) -> list[CellRecord]:
    rows = record.grid.names if record.grid else []
    if not rows and row is not None:
        raise ConfigError(f"{path} is no grid and has no rows; leave row={row} out")
    if rows and row is None:
        raise ConfigError(f"{path} is a grid, each row another model. Choose one, `--row NAME`: {', '.join(rows)}")
    if rows and row not in rows:
        raise ConfigError(unknown_name("row", str(row), rows))
    return [cell for cell in record.trainings if not rows or cell.row == row]


def rule_for(run: TrainedRun, fold: int | None) -> Rule:
    """The rule that was chosen for a run's new images; plain where none was chosen.

    fold: of the one model that predicts; None for the ensemble. Raises: DataError for one of other weights.
    """
    path = RunDir(run.path).postprocess(run.row)
    chosen = Chosen.read(path)
    if chosen is None:
        return PLAIN
    stamps = {cell.name: stamp(cell.folder) for cell in run.cells}
    if any(chosen.cells.get(name) != found for name, found in stamps.items()):
        raise DataError(
            f"{path} was chosen on predictions of other weights: run `bushpc postprocess {run.path}` again, or leave "
            "it out (predict --no-postprocess), or delete it"
        )
    return chosen.for_fold(fold)
