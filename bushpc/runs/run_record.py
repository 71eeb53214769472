"""run.json: what a run is, its cells, and the commands that wrote it."""
# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

import difflib
import json
import typing as t
from collections.abc import Callable
from pathlib import Path

import msgspec

from bushpc.errors import DataError, first_of
from bushpc.runs.layout import RunDir
from bushpc.runs.record import Record, json_object

# Of run.json. Raise it when an older bushpc would misread what this one writes, and add to _MIGRATIONS.
RUN_FORMAT = 1


class FoldsRecord(Record, kw_only=True, frozen=True):
    """source: as `folds=` names it. note: how a paper's single split was drawn; "" for other folds."""

    source: str = ""
    sha256: str = ""
    note: str = ""


class SubmissionRecord(Record, kw_only=True, frozen=True):
    """One command that wrote the run. code: the snapshot of the package, `RunDir.snapshot`."""

    time: str = ""
    commit: str | None = None
    code: str = ""
    command: list[str] = []
    versions: dict[str, str] = {}


class RowRecord(Record, kw_only=True, frozen=True):
    """A row of a grid. settings: what sets it apart, key → value. printed_as: what the grid's paper calls it. scans:
    the generator of the same grid whose scans it trains on.
    """

    name: str
    label: str = ""
    settings: dict[str, t.Any]
    model: str = ""
    printed_as: list[str] = []
    scans: str | None = None


class QuotedRecord(Record, kw_only=True, frozen=True):
    """A row of the grid's paper that is not run. reason: why. before: the row that it stands above; None: the end."""

    label: str
    printed_as: list[str]
    reason: str
    before: str | None


class GridRecord(Record, kw_only=True, frozen=True):
    """baseline: the row that the others are compared with. paper: whose table of rivals it is. generators: trained for
    their scans; they are no rows of its table.
    """

    name: str = ""
    title: str = ""
    baseline: str | None = None
    rows: list[RowRecord]
    paper: str | None = None
    quoted: list[QuotedRecord] = []
    generators: list[RowRecord] = []

    @property
    def names(self) -> list[str]:
        """Of everything that the grid trains."""
        return [row.name for row in (*self.rows, *self.generators)]


class CellRecord(Record, kw_only=True, frozen=True, omit_defaults=True):
    """A cell of a run. hash: of its settings. row: in a grid. generator_saw: datasets of `evaluate.external` on which
    the generator of its synthetic scans trained. trained_on: see `data.lineage`; absent in runs of early versions.
    started_from: the run or the imported weights that it started from. pulled: see `weights.origins`. work: `train`,
    or what follows the training of a generator: `generate`, `quality`.
    """

    name: str
    fold: int
    hash: str | None = None
    iterations: int = 0
    row: str | None = None
    generator_saw: list[str] = []
    trained_on: list[dict[str, t.Any]] | None = None
    started_from: dict[str, t.Any] | None = None
    pulled: list[dict[str, t.Any]] = []
    work: str = "train"


class VariantRecord(Record, kw_only=True, frozen=True):
    """A way in which the run's models are evaluated, as `conditions.Variant` declares it."""

    name: str
    label: str
    uses_ground_truth: bool = False


def no_run(run: RunDir) -> str:
    """The message for a folder that is no run: the nearest runs beside it, or inside it."""
    beside, inside = ([path.parent for path in folder.glob("*/run.json")] for folder in (run.path.parent, run.path))
    near = difflib.get_close_matches(run.path.name, [path.name for path in beside], n=1, cutoff=0.5)
    if near:
        hint = f"Did you mean {run.path.parent / near[0]}?"
    elif found := inside or beside:
        hint = f"Runs there: {first_of(sorted(map(str, found)), most=8)}."
    else:
        hint = "Give the folder that `bushpc cv`, `grid` or `train` made; runs lie below `runs/`."
    what = "it has no run.json" if run.path.is_dir() else "there is no such folder"
    return f"{run} is not a run folder: {what}. {hint}"


class RunRecord(Record, kw_only=True, frozen=True):
    """`RunDir.file`, run.json.

    created, command, commit: of the command that made it. prompts: the headline prompt source. variants: the ways of
    evaluation that its models declare; older runs have none, and only those of `conditions.VARIANTS`. shards: folder
    of the dataset. versions: of the packages, at the last submission.
    """

    format: int = RUN_FORMAT
    name: str = ""
    kind: str = "cv"
    created: str = ""
    commit: str | None = None
    command: list[str] = []
    model: str = ""
    data: str = ""
    excerpt: bool = False
    prompts: str = ""
    variants: list[VariantRecord] = []
    shards: str = ""
    manifest_sha256: str = ""
    folds: FoldsRecord = FoldsRecord()
    versions: dict[str, str] = {}
    submissions: list[SubmissionRecord] = []
    grid: GridRecord | None = None
    cells: list[CellRecord]

    @classmethod
    def open(cls, run: RunDir) -> t.Self:
        """Raises: DataError if it is no run folder, a newer bushpc wrote it, or run.json is damaged."""
        record = cls.read(run.file)
        if record is None:
            raise DataError(no_run(run))
        return record

    def to_json(self) -> str:
        return json.dumps(msgspec.to_builtins(self), indent=1)

    def cell(self, name: str) -> CellRecord:
        """Raises: KeyError."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise KeyError(name)

    def cells_of(self, row: str) -> list[CellRecord]:
        """Its trainings."""
        return [cell for cell in self.trainings if cell.row == row]

    @property
    def trainings(self) -> list[CellRecord]:
        """The cells that train; others follow them."""
        return [cell for cell in self.cells if cell.work == "train"]

    @property
    def facts(self) -> dict[str, t.Any]:
        """What makes results comparable: the same samples, and the same folds."""
        return {"manifest_sha256": self.manifest_sha256, "folds": msgspec.to_builtins(self.folds)}

    @classmethod
    def _decode(cls, path: Path, text: bytes) -> t.Self:
        try:
            written = msgspec.json.decode(text, type=_Format)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            written = _Format(format=RUN_FORMAT)  # the whole is read, and says what is wrong
        if written.format > RUN_FORMAT:
            raise DataError(_newer(path, written))
        if written.format < RUN_FORMAT:
            if written.format not in _MIGRATIONS:
                raise DataError(f"{path} is damaged: its format is {written.format}. {cls._mend(path)}")
            try:
                content = json_object(text)
                for number in range(written.format, RUN_FORMAT):
                    content = _MIGRATIONS[number](content)
                text = json.dumps(content).encode()
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{path} is damaged: {error}. {cls._mend(path)}") from error
        record = super()._decode(path, text)
        names = [cell.name for cell in record.cells]
        wrong = [name for name in names if name != Path(name).name or not name.isprintable()]
        if wrong or not names:
            said = f"{wrong[0]!r} is no name of a cell" if wrong else "it does not name the run's cells"
            raise DataError(f"{path} is damaged: {said}. {cls._mend(path)}")
        return record

    @classmethod
    def _mend(cls, path: Path) -> str:
        return (
            "Nothing was changed. Restore it; or move it away and repeat the command that made the run, which keeps "
            "the cells and writes the file again"
        )


class _Format(msgspec.Struct):
    format: int = 0
    versions: t.Any = None


def _newer(path: Path, written: _Format) -> str:
    from importlib import metadata  # here: it takes as long as reading all notes of a run

    versions = written.versions if isinstance(written.versions, dict) else {}
    code = RunDir(path.parent).newest_snapshot()
    return (
        f"{path} has format {written.format}, and this version of bushpc ({metadata.version('bushpc')}) reads up to "
        f"{RUN_FORMAT}. bushpc {versions.get('bushpc', 'of a newer version')} wrote it; use that one"
        + (f", or the code in the run folder: (cd {code} && python -m bushpc.cli …)" if code else "")
    )


# Format → what makes the next one of it. Format 0 is of before formats were numbered, and is like 1.
_MIGRATIONS: dict[int, Callable[[dict[str, t.Any]], dict[str, t.Any]]] = {0: lambda content: content | {"format": 1}}
