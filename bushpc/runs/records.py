"""Notes on cells and jobs, with their types. layout.py says where each of them lies, record.py how they are read."""
# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

import os
import typing as t
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from bushpc.errors import DataError
from bushpc.runs.layout import CellDir
from bushpc.runs.record import MOST_DIGITS, Count, Number, Rate, Record

# First line of a cell's config.yaml, before its hash: whoever only compares hashes need not parse YAML.
HASH_LINE = "# hash "


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


def read_config_hash(cell: CellDir) -> str | None:
    """The hash on the first line of a cell's config.yaml; None if it has none. Raises: OSError without the file."""
    with cell.config.open(errors="replace") as file:
        line = file.readline().rstrip("\n")
    return line.removeprefix(HASH_LINE) if line.startswith(HASH_LINE) else None
