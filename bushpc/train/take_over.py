"""One training, many evaluations: a cell with `train.weights_from` takes over what a cell of that run has learnt.

    <run>/cells/<the one with this training>/ ─last checkpoint, ledger, curves─→ <cell>/, which then only evaluates

Looked for on the login node, before anything is queued, and again by the job, which takes what it finds.
"""

from __future__ import annotations

import shutil
import typing as t
from collections.abc import Callable, Mapping
from pathlib import Path

from bushpc.config import CellConfig, load_frozen
from bushpc.errors import BushpcError, ConfigError, DataError, ResumeError
from bushpc.files import share_file, write_atomically
from bushpc.runs.goodput import read_note, trained_in
from bushpc.runs.layout import META_FILE, CellDir, RunDir
from bushpc.runs.records import DoneRecord, TakenOver
from bushpc.runs.run_record import RunRecord


class DonorCell(t.NamedTuple):
    """A cell that is done. folder: its own, which in a grid may be another run's. step: its last."""

    folder: CellDir
    config: CellConfig
    step: int


class Donor:
    """The run that `train.weights_from` names. Its cells are read once, however many ask."""

    def __init__(self, run_dir: Path, facts: Mapping[str, t.Any]) -> None:
        """facts: of the data of those who ask, as `RunRecord.facts`.

        Raises: ConfigError for what is no run, or was trained on other samples or folds.
        """
        self.run_dir, self._said = run_dir, f"train.weights_from={run_dir}"
        self._cells: dict[int, dict[str, list[tuple[CellDir, CellConfig]]]] = {}
        try:
            run = RunRecord.read(RunDir(run_dir).file)
        except DataError as error:
            raise ConfigError(f"{self._said}: {error}") from error
        if run is None:
            raise ConfigError(
                f"{self._said} is no run folder: it has no run.json. Give the folder that `bushpc cv` or `grid` "
                f"made; see `ls {run_dir.parent}`"
            )
        self._names = {cell.name: cell.fold for cell in run.cells}
        for name, theirs in run.facts.items():
            if theirs != facts.get(name):
                raise ConfigError(
                    f"{self._said} was trained on other data: its {name} is {theirs}, and here it is "
                    f"{facts.get(name)}. Choose a run on the same packed data and folds, or leave it out to train"
                )

    def cell_for(self, cell: CellConfig) -> DonorCell:
        """The cell that had the training of `cell`. Raises: ConfigError where there is none, or it is not done."""
        assert cell.fold is not None
        by_training = self._of_fold(cell.fold)
        alike = by_training.get(cell.training_hash, [])
        if not alike:
            others = [other for group in by_training.values() for other in group]
            nearest, theirs = min(others, key=lambda other: len(cell.unlike(other[1].settings)))
            raise ConfigError(
                f"{self._said}: no cell there had this training. {nearest.name} differs in (there → here) "
                f"{'; '.join(cell.unlike(theirs.settings))}. Only what predictions alone depend on may differ: set "
                "these as there, or leave train.weights_from out to train"
            )
        for folder, config in alike:
            done = DoneRecord.read_valid(folder.done)
            if done.config == config.hash and done.step is not None:
                return DonorCell(folder=folder, config=config, step=done.step)
        raise ConfigError(
            f"{self._said}: {alike[0][0].name} is not done there; see `bushpc status {self.run_dir}`, and submit this "
            "when it is"
        )

    def _of_fold(self, fold: int) -> dict[str, list[tuple[CellDir, CellConfig]]]:
        """training_hash → folders and settings of a fold's cells."""
        if fold not in self._cells:
            found: dict[str, list[tuple[CellDir, CellConfig]]] = {}
            for name in (name for name, of in self._names.items() if of == fold):
                folder = RunDir(self.run_dir).cell(name).resolve()
                if folder.config.exists():  # not where a link leads to a run that is gone
                    try:
                        config = load_frozen(folder.config, self.run_dir, f"resume {self.run_dir}")
                    except ConfigError as error:
                        raise ConfigError(f"{self._said}: {error}") from error
                    found.setdefault(config.training_hash, []).append((folder, config))
            if not found:
                valid = ", ".join(map(str, sorted(set(self._names.values()))))
                raise ConfigError(f"{self._said} has no cell of fold {fold}; valid: {valid}")
            self._cells[fold] = found
        return self._cells[fold]


def take_over(cell: CellConfig, cell_dir: CellDir, say: Callable[[str], None]) -> None:
    """Give the cell weights and record of its training, unless it has them. Rank 0 calls it, which holds the lease.

    The note of whose they are comes first and the checkpoint last, each written aside and then renamed: before that
    is there nothing counts, and all is taken again. The time of the training stays with the cell that spent it.
    Raises: ResumeError where the source is not what it was when this was submitted, or cannot be read.
    """
    from bushpc.runs import checkpoint  # here: it imports torch, and a login node only looks

    assert cell.train.weights_from is not None
    folder, frozen_here = cell_dir.checkpoints, cell_dir.run.frozen
    if checkpoint.newest_whole(folder) is not None:
        return
    try:
        source = Donor(Path(cell.train.weights_from), RunRecord.open(cell_dir.run).facts).cell_for(cell)
        sealed = source.folder.checkpoint(source.step)
        checkpoint.verify(sealed)
        # Who took its weights over itself says where they are from.
        note = TakenOver(trained_in=trained_in(source.folder) or str(source.folder), step=source.step)
        note.write(cell_dir.taken_over)
        checkpoint.set_aside_after(folder, -1)  # none of them is whole
        _copy_record(source.folder, cell_dir)
        if frozen := read_note(sealed / META_FILE).get("frozen"):
            frozen_here.mkdir(exist_ok=True)
            name = f"{frozen}.safetensors"
            share_file(source.folder.run.frozen / name, frozen_here / name)
        checkpoint.share(sealed, folder)
    except (BushpcError, OSError) as error:
        raise ResumeError(
            f"the weights cannot be taken over: {error}. They were there when this was submitted: bring them back and "
            "resume, or submit again with another train.weights_from, or without one to train here"
        ) from error
    say(f"nothing is trained here: the weights after step {source.step} are those of {note.trained_in}")


def _copy_record(source: CellDir, cell_dir: CellDir) -> None:
    """Curves and ledger, of which no file may be shared: a writer appends to them."""
    shutil.rmtree(cell_dir.ledger, ignore_errors=True)
    cell_dir.ledger.mkdir()
    write_atomically(cell_dir.metrics, source.metrics.read_bytes())
    for path in source.ledgers():
        write_atomically(cell_dir.ledger / path.name, path.read_bytes())
