"""What the notes in a run folder hold, with their types. layout.py says where each of them lies.

    <record>.write(path) → JSON that people can read → read | read_whole | read_valid → <record>

How much damage is tolerated depends on the reader: what a decision rests on is refused (`read`), a note that can be
done without counts as missing (`read_whole`), and what is only shown loses the fields that do not fit (`read_valid`).

msgspec checks types while it decodes: `bushpc status` reads three thousand notes in less time than it takes to import
pydantic. No torch.
"""

from __future__ import annotations

import json
import os
import typing as t
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from bushpc.errors import DataError
from bushpc.files import read_quickly, write_atomically
from bushpc.runs.layout import CellDir, RunDir

# Of run.json. Raise it when an older bushpc would misread what this one writes, and add to _MIGRATIONS.
RUN_FORMAT = 1
# First line of a cell's config.yaml, before its hash: whoever only compares hashes need not parse YAML.
HASH_LINE = "# hash "
# No count and no number of seconds of a real run comes near it; a damaged one may exceed what a float holds.
MOST = 1e12
# Steps per second. A lower rate in a heartbeat is damage, and the time left would not fit into hours.
SLOWEST_RATE = 1e-6
# A process id has fewer digits.
MOST_DIGITS = 10

Count = t.Annotated[int, msgspec.Meta(ge=0, lt=10**12)]
Number = t.Annotated[float, msgspec.Meta(gt=-MOST, lt=MOST)]
Rate = t.Annotated[float, msgspec.Meta(ge=SLOWEST_RATE, lt=MOST)]


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """A note in a run folder. Fields that a file has and the class lacks are passed over."""

    @classmethod
    def read(cls, path: Path) -> t.Self | None:
        """The record in a file; None without the file. Raises: DataError, which names the damaged fields."""
        try:
            text = read_quickly(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return cls._decode(path, text)

    @classmethod
    def read_whole(cls, path: Path) -> t.Self | None:
        """The record in a file; None if the file is missing or damaged."""
        try:
            return cls.read(path)
        except DataError:
            return None

    @classmethod
    def read_valid(cls, path: Path) -> t.Self:
        """What is valid in a file: a damaged field, or all of a missing file, gets the defaults."""
        try:
            text = read_quickly(path)
        except OSError:
            return cls()
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass
        try:
            content = _object(text)
        except (ValueError, RecursionError):
            return cls()
        return cls(**_fields(cls, content)[0])

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_atomically(path, self.to_json())

    def to_json(self) -> str:
        return json.dumps(msgspec.to_builtins(self))

    @classmethod
    def _decode(cls, path: Path, text: bytes) -> t.Self:
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass  # it may still be what Python's json writes, with NaN, say; and one error is not all of them
        try:
            content = _object(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is damaged: {error}. {cls._mend(path)}") from error
        fields, wrong = _fields(cls, content)
        if wrong:
            raise DataError(f"{path} is damaged: {'; '.join(wrong)}. {cls._mend(path)}")
        return cls(**fields)

    @classmethod
    def _mend(cls, path: Path) -> str:
        """What to do about a damaged file."""
        return "Restore it, or delete it if it can be made again"


def _object(text: bytes) -> dict[str, t.Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} where an object is needed")
    return content


def _fields(cls: type[Record], content: Mapping[str, t.Any]) -> tuple[dict[str, t.Any], list[str]]:
    """The valid fields, and for each invalid or missing one its name and what is wrong with it."""
    valid: dict[str, t.Any] = {}
    wrong = []
    for field in msgspec.structs.fields(cls):
        if field.name in content:
            try:
                valid[field.name] = msgspec.convert(content[field.name], field.type)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                wrong.append(f"{field.name}: {error}")
        elif field.required:
            wrong.append(f"{field.name} is missing")
    return valid, wrong


# --- of a cell --------------------------------------------------------------------------------------------------


class Heartbeat(Record, kw_only=True, frozen=True):
    """`CellDir.heartbeat`, written every few seconds by what trains or evaluates the cell. Read it with `read_valid`.

    restarts: starts of the cell before this one. node: as the cluster calls it. rate: steps per second.
    attempt: a `goodput.Attempt`, so that one that is killed leaves its account.
    """

    phase: str = ""
    step: Count = 0
    total: Count = 0
    metric: dict[str, Number] = {}
    rate: Rate | None = None
    restarts: Count = 0
    host: str = ""
    node: str = ""
    pid: int = 0
    time: Number = 0.0
    attempt: t.Any = None


class DoneRecord(Record, kw_only=True, frozen=True):
    """`CellDir.done`. config: hash of the settings. rows: of the per-image CSV. parameters: of the model."""

    finished: str | None = None
    step: int | None = None
    config: str | None = None
    rows: int | None = None
    parameters: int | None = None

    @classmethod
    def _mend(cls, path: Path) -> str:
        return "Delete it and run the same command again"


class TakenOver(Record, kw_only=True, frozen=True):
    """`CellDir.taken_over`, of a cell that did not train. trained_in: folder of the cell that did, as it was then."""

    trained_in: str = ""
    step: int = 0


class JobNote(Record, kw_only=True, frozen=True, omit_defaults=True):
    """`CellDir.job_note` and `RunDir.report_job`: which job works there.

    job_id: as the queue calls it; without a queue the id of a process, which `host` and `process_start` (None if it had
    ended already) tell from a later one. cluster, name, user: what the cluster calls itself and the job, and the user
    id that submitted it; notes of earlier versions lack them. submitted, cancelled: in seconds since 1970. heartbeat:
    a file that shows whether a process of another host lives. packed: other cells share the job. ended: the process has
    said goodbye. lane, turn: of a job that works on one pack of cells after the other the path of its LaneNote, which
    may be in another run, and which pack it is. owner: of the file, where `user` is missing; not in the file.
    """

    executor: str
    job_id: str
    cluster: str = ""
    name: str = ""
    user: int | None = None
    submitted: Number
    log: str
    code: str | None = None
    packed: bool = False
    process_start: str | UnsetType | None = UNSET
    host: str | UnsetType | None = UNSET
    heartbeat: str | None = None
    cancelled: float | None = None
    ended: bool = False
    lane: str | None = None
    turn: Count = 0
    owner: int = -1

    @classmethod
    def read(cls, path: Path) -> t.Self | None:
        """Also says whose file it is: colleagues look at each other's runs, and a queue is asked by user.

        Raises: DataError, as every `read`; `require` checks what the kind of cluster makes necessary.
        """
        try:
            with open(path, "rb", buffering=0) as file:  # a buffer costs more than the reading
                note, owner = cls._decode(path, file.readall()), os.fstat(file.fileno()).st_uid
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        note.require(path, *(name for name in ("log", "heartbeat", "lane") if "\0" in (getattr(note, name) or "")))
        return msgspec.structs.replace(note, owner=owner)

    def require_process(self, path: Path) -> None:
        """Raises: DataError if it does not name a process, as the note of a job without a queue has to."""
        wrong = [name for name in ("host", "process_start") if getattr(self, name) is UNSET]
        wrong += [] if self.job_id.isdecimal() and len(self.job_id) <= MOST_DIGITS else ["job_id"]
        self.require(path, *wrong)

    def require(self, path: Path, *wrong: str) -> None:
        """Raises: DataError if any field is wrong."""
        if wrong:
            raise DataError(f"{path} is damaged ({', '.join(wrong)}). {self._mend(path)}")

    def to_json(self) -> str:
        return super(JobNote, msgspec.structs.replace(self, owner=-1)).to_json()

    @classmethod
    def _mend(cls, path: Path) -> str:
        return "It names the job that works there: if there is none, delete the file and submit again"


# --- of jobs ----------------------------------------------------------------------------------------------------


class SubmittingNote(Record, kw_only=True, frozen=True):
    """`RunDir.submitting`: jobs that are being submitted, for whoever goes on if that command is killed.

    packs: the cells of each job. submitted: in seconds since 1970. cluster: what it calls itself. lanes: each job works
    on its cells in turns, as its LaneNote says.
    """

    job_name: str
    cluster: str = ""
    packs: list[list[str]]
    packed: bool
    executor: str
    submitted: float
    code: str
    lanes: bool = False


class LaneNote(Record, kw_only=True, frozen=True):
    """`RunDir.lane`: a job that works on one pack of cells after the other; its batch shell keeps it up to date.

    turn: number of the pack that it is at; as many as there are packs when it has none left. since: the job's restart
    in which that turn began. submitted: in seconds since 1970. lead_s: seconds before the time limit in which no other
    pack is begun. report: the job writes the report if no other job of the run is left then.
    """

    packs: list[list[str]]
    turn: Count = 0
    since: Count = 0
    submitted: float
    lead_s: float = 0.0
    report: bool = False


class AttemptNote(Record, kw_only=True, frozen=True):
    """`RunDir.attempt_note`: what rank 0 noted of a job's start.

    restart: how often the queue had started the job before. from_step: sum of the steps that its cells had saved.
    stands_since: the first restart that began at this step. outcome: `stopped` or `refused` if it left on purpose.
    signal: what stopped it.
    """

    cells: list[str]
    restart: int
    from_step: int
    stands_since: int = 0
    outcome: str | None = None
    signal: str | None = None


# --- of a run ---------------------------------------------------------------------------------------------------


class FoldsRecord(Record, kw_only=True, frozen=True):
    """source: frozen, published or grouped."""

    source: str = ""
    sha256: str = ""


class SubmissionRecord(Record, kw_only=True, frozen=True):
    """One command that wrote the run. code: the snapshot of the package, `RunDir.snapshot`."""

    time: str = ""
    commit: str | None = None
    code: str = ""
    command: list[str] = []
    versions: dict[str, str] = {}


class RowRecord(Record, kw_only=True, frozen=True):
    """A row of a grid. settings: what sets it apart, key → value."""

    name: str
    label: str = ""
    settings: dict[str, t.Any]
    model: str = ""


class GridRecord(Record, kw_only=True, frozen=True):
    """baseline: the row that the others are compared with."""

    name: str = ""
    title: str = ""
    baseline: str | None = None
    rows: list[RowRecord]


class CellRecord(Record, kw_only=True, frozen=True, omit_defaults=True):
    """A cell of a run. hash: of its settings. row: in a grid. generator_saw: datasets of `evaluate.external` on which
    the generator of its synthetic scans trained. trained_on: see `data.lineage`; absent in runs of early versions.
    started_from: the run or the imported weights that it started from.
    """

    name: str
    fold: int
    hash: str | None = None
    iterations: int = 0
    row: str | None = None
    generator_saw: list[str] = []
    trained_on: list[dict[str, t.Any]] | None = None
    started_from: dict[str, t.Any] | None = None


class VariantRecord(Record, kw_only=True, frozen=True):
    """A way in which the run's models are evaluated, as `conditions.Variant` declares it."""

    name: str
    label: str
    uses_ground_truth: bool = False


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
            raise DataError(f"{run} is not a run folder: it has no run.json. Runs lie below `runs/`; see `ls runs`")
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
        return [cell for cell in self.cells if cell.row == row]

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
                content = _object(text)
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
    newest = RunDir(path.parent).newest_snapshot()
    code = newest or RunDir(path.parent).code / "<hash>"
    return (
        f"{path} has format {written.format}, and this version of bushpc ({metadata.version('bushpc')}) reads up to "
        f"{RUN_FORMAT}. bushpc {versions.get('bushpc', 'of a newer version')} wrote it; use that one, or the code in "
        f"the run folder: (cd {code} && python -m bushpc.cli …)"
    )


# Format → what makes the next one of it. Format 0 is of before formats were numbered, and is like 1.
_MIGRATIONS: dict[int, Callable[[dict[str, t.Any]], dict[str, t.Any]]] = {0: lambda content: content | {"format": 1}}


def read_config_hash(cell: CellDir) -> str | None:
    """The hash on the first line of a cell's config.yaml; None if it has none. Raises: OSError without the file."""
    with cell.config.open(errors="replace") as file:
        line = file.readline().rstrip("\n")
    return line.removeprefix(HASH_LINE) if line.startswith(HASH_LINE) else None
