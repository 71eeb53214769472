"""What a training starts from: a model that another run trained (`train.start_from`), fold for fold.

    run folder, cell, checkpoint or export ─Starts.open→ for_fold(k) → Start: settings, hash, lineage, shapes, tensors

All but `Start.tensors` works without torch: composition refuses on the login node what cannot start.
"""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass
from pathlib import Path

from bushpc import weight_file
from bushpc.config import CellConfig, freeze, load_frozen, target_of
from bushpc.data.lineage import Training, licences, of_cell
from bushpc.errors import BushpcError, ConfigError, DataError, unknown_name
from bushpc.files import EXPORT_FILE, read_json, sha256_of, sha256_of_unchanged
from bushpc.runs.goodput import read_note
from bushpc.runs.layout import META_FILE, SEAL_FILE, CellDir, RunDir
from bushpc.runs.records import DoneRecord
from bushpc.runs.run_record import CellRecord, RunRecord

if t.TYPE_CHECKING:
    import torch

PARTS = ("model.safetensors", "ema.safetensors")
BY_ROW = "(train.start_row=…, or row=… of `bushpc weights import`)"
WHAT = "a run folder, one of its cells or checkpoints, or a folder that `bushpc export` wrote"


@dataclass(frozen=True, kw_only=True)
class Start:
    """One trained model.

    kind: `run` or `export`. name: of the run. cell, fold, step: the model's. path: its checkpoint or file.
    sha256: of the checkpoint's seal, which holds the hashes of its files, or of the file. target: the model's class.
    settings: the model's. data: the dataset it was trained on. shards: their folder then. folds: files with its folds.
    trained_on, licences: everything behind the weights.
    """

    kind: str
    name: str
    cell: str
    fold: int
    step: int | None
    path: Path
    sha256: str
    target: str
    settings: dict[str, t.Any]
    data: str
    shards: Path | None
    folds: tuple[Path, ...]
    trained_on: list[Training]
    licences: list[dict[str, str]]

    @property
    def title(self) -> str:
        return f"{self.cell} of {self.kind} {self.name}"

    def shapes(self) -> dict[str, weight_file.Shape]:
        """Names and shapes of the tensors. Raises: WeightsError."""
        found: dict[str, weight_file.Shape] = {}
        for file in self._files():
            found |= weight_file.read_header(file).shapes
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that the model predicts with, on the CPU. Raises: ResumeError, WeightsError."""
        if self.kind == "export":
            return weight_file.read_tensors(self.path)
        from bushpc.runs import checkpoint

        saved = checkpoint.read(self.path, self._frozen_store())
        return saved.parts["model"] | saved.parts.get("ema", {})

    def note(self) -> dict[str, t.Any]:
        """What run.json and an export record of it."""
        return {
            "kind": self.kind,
            "name": self.name,
            "cell": self.cell,
            "fold": self.fold,
            "step": self.step,
            "sha256": self.sha256,
            "data": self.data,
        }

    def _files(self) -> list[Path]:
        if self.kind == "export":
            return [self.path]
        frozen = read_note(self.path / META_FILE).get("frozen")
        stored = [self._frozen_store() / f"{frozen}.safetensors"] if frozen else []
        return [*stored, *(self.path / part for part in PARTS if (self.path / part).exists())]

    def _frozen_store(self) -> Path:
        return CellDir(self.path.parent.parent).resolve().run.frozen


class Starts:
    """The models of a run or an export. one: a single model, which all folds start from."""

    def __init__(self, said: str, one: bool, open_fold: t.Callable[[int | None], Start]) -> None:
        self.said, self.one, self._open = said, one, open_fold

    @classmethod
    def open(cls, path: Path, row: str | None = None, said: str = "") -> Starts:
        """path: as in WHAT. row: of a grid. said: how the user named it, for messages. Raises: ConfigError."""
        said = said or str(path)
        export = path if (path / EXPORT_FILE).exists() else path.parent
        if (export / EXPORT_FILE).exists():
            name = None if export == path else path.name
            return _of_export(said, export, name)
        if (path / SEAL_FILE).exists():
            cell = CellDir(path.parent.parent)
            return cls(said, True, lambda _: _of_cell(said, cell, None, path))
        if path.parent.name == "cells" and (path / "config.yaml").exists():
            return cls(said, True, lambda _: _of_cell(said, CellDir(path), None, None))
        record = _checked(said, lambda: RunRecord.read(RunDir(path).file))
        if record is None:
            there = "holds none of these" if path.exists() else "does not exist"
            raise ConfigError(f"{said} {there}: give {WHAT}")
        cells = _cells_of_row(said, record, row)
        return cls(said, False, lambda fold: _of_run(said, path, cells, fold))

    def for_fold(self, fold: int | None) -> Start:
        """The model that fold `fold` starts from. Raises: ConfigError for one that isn't there, not done or damaged."""
        return _checked(self.said, lambda: self._open(None if self.one else fold))


def _checked(said: str, read: t.Callable[[], t.Any]) -> t.Any:
    try:
        return read()
    except BushpcError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(said) else f"{said}: {text}") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{said} is damaged ({type(error).__name__}: {error})") from error


# --- of a run ---------------------------------------------------------------------------------------------------


def _cells_of_row(said: str, record: RunRecord, row: str | None) -> dict[int, CellRecord]:
    rows = record.grid.names if record.grid else []
    if row is None and rows:
        raise ConfigError(f"{said} is a grid, each row another model: choose one of {', '.join(rows)} {BY_ROW}")
    if row is not None and row not in rows:
        raise ConfigError(unknown_name(f"row of {said}", row, rows))
    return {cell.fold: cell for cell in record.trainings if cell.row == row}


def _of_run(said: str, path: Path, cells: dict[int, CellRecord], fold: int | None) -> Start:
    if fold not in cells:
        valid = ", ".join(map(str, sorted(cells)))
        raise ConfigError(
            f"{said} has no fold {fold}, and each fold starts from the same fold there: it has {valid}. Train fewer "
            f"folds (fold=…), or start all folds from one model: {path}/cells/{cells[min(cells)].name}"
        )
    return _of_cell(said, RunDir(path).cell(cells[fold].name), cells[fold], None)


def _of_cell(said: str, cell: CellDir, recorded: CellRecord | None, sealed: Path | None) -> Start:
    folder = cell.resolve()  # in a grid a link, where another run trained the cell
    config = load_frozen(folder.config, folder.run.path, f"export {folder.run.path} OUT")
    run = RunRecord.open(folder.run)
    recorded = recorded or run.cell(folder.name)
    step: int | None = None
    if sealed is None:
        done = DoneRecord.read(folder.done)
        if done is None or done.step is None or (done.config or config.hash) != config.hash:
            raise ConfigError(
                f"{said}: {folder.name} is not done; see `bushpc status {folder.run.path}`, and submit this when it is"
            )
        step, sealed = done.step, folder.checkpoint(done.step)
    _require_sealed(said, sealed)
    trainings = of_cell(run, folder.name)
    assert config.fold is not None
    return Start(
        kind="run",
        name=run.name,
        cell=folder.name,
        fold=config.fold,
        step=step if step is not None else int(sealed.name.rpartition("_")[2]),
        path=sealed,
        sha256=sha256_of(sealed / SEAL_FILE),
        target=target_of(config.model_class),
        settings=config.to_dict()["model"],
        data=run.data,
        shards=Path(run.shards) if run.shards else None,
        folds=(folder.run.folds,),
        trained_on=trainings,
        licences=_licences(config, trainings),
    )


def _require_sealed(said: str, folder: Path) -> None:
    """Raises: ConfigError if the checkpoint is gone, or if what is read of it is not what was sealed."""
    hashes = read_json(folder / SEAL_FILE)
    if hashes is None:
        raise ConfigError(f"{said}: {folder} is no checkpoint, or was deleted; nothing is left to start from")
    wanted = [name for name in (META_FILE, *PARTS) if name in hashes]
    damaged = [
        name for name in wanted if not (folder / name).is_file() or sha256_of_unchanged(folder / name) != hashes[name]
    ]
    if damaged or META_FILE not in hashes:
        raise ConfigError(
            f"{said}: checkpoint {folder} is damaged: {', '.join(damaged) or META_FILE} changed or is missing"
        )


def _licences(config: CellConfig, trainings: list[Training]) -> list[dict[str, str]]:
    try:
        found = licences(config, trainings)
    except DataError:  # the shards are gone, and their card with them
        return []
    return [dict(each._asdict()) for each in found]


# --- of an export -----------------------------------------------------------------------------------------------


def _of_export(said: str, export: Path, name: str | None) -> Starts:
    content = _checked(
        said, lambda: freeze.EXPORT.read(read_json(export / EXPORT_FILE) or {}, str(export / EXPORT_FILE))
    )
    folds = {each["fold"]: each for each in content["folds"] if name in (None, each["name"])}
    if not folds:
        raise ConfigError(unknown_name(f"fold of {export}", str(name), [each["name"] for each in content["folds"]]))
    return Starts(said, len(folds) == 1, functools.partial(_exported, said, export, content, folds))


def _exported(
    said: str, export: Path, content: dict[str, t.Any], folds: dict[int, dict[str, t.Any]], fold: int | None
) -> Start:
    each = next(iter(folds.values())) if fold is None else folds.get(fold)
    if each is None:
        raise ConfigError(
            f"{said} has no fold {fold}, and each fold starts from the same fold there: it has "
            f"{', '.join(map(str, sorted(folds)))}. Train fewer folds (fold=…), or start all from one of its folders"
        )
    file = export / each["weights"]
    if not file.is_file() or sha256_of_unchanged(file) != each["sha256"]:
        raise ConfigError(f"{said}: {file} is missing, or is not what {EXPORT_FILE} states; copy or export it again")
    return Start(
        kind="export",
        name=content["run"]["name"],
        cell=each["name"],
        fold=each["fold"],
        step=each.get("step"),
        path=file,
        sha256=each["sha256"],
        target=content["model"]["_target_"],
        settings=content["model"],
        data=content["data"]["name"],
        shards=None,
        folds=(),
        trained_on=each["trained_on"],
        licences=content.get("licences", []),
    )
