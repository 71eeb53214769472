"""Where a cell's time went: its attempts → seconds by cause. For trainer, status and report; reads files, no torch.

    <cell>/attempts.jsonl   a line per start of the cell, written when that start has ended
    <cell>/state.json       the heartbeat; its `attempt` is the running start, or the last one that died
    <cell>/taken_over.json  only if the cell did not train: whose weights it has, and where that time is recorded

Every moment from the first submission to the last sign of life has exactly one cause, so the causes sum to the wall
time. It is unknown what an attempt did after its last sign of life: that time counts as waiting for the next attempt.
"""

from __future__ import annotations

import json
import math
import typing as t
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bushpc.files import read_quickly
from bushpc.runs.layout import CellDir
from bushpc.runs.record import MOST
from bushpc.runs.records import Heartbeat, TakenOver

# What an attempt can spend its time on; `other` is the loop's own work in between.
SPENDINGS = ("start", "load", "step", "save", "validate", "evaluate", "other")
# Cause → its name in tables, in display order.
CAUSES = {
    "productive": "training steps",
    "load": "waiting for data",
    "save": "waiting for saves",
    "evaluate": "validation, evaluation",
    "other": "other",
    "replay": "steps done again",
    "lost": "steps lost",
    "start": "start",
    "queue": "queue",
    "requeue": "requeue",
    "idle": "not submitted",
}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a cell: a line of attempts.jsonl.

    number: from 0. job, restart: Slurm's job id and restart count, "" and 0 outside Slurm.
    submitted, began: times of submission and start, in seconds since 1970.
    from_step, step: steps done when training began, and at the last sign of life.
    seconds: all its time by SPENDINGS. end: `done` or `stopped`, or "" if no end was recorded.
    energy_j: joules used by its GPUs (see bushpc.train.energy); None without GPUs or driver counters.
    """

    number: int
    job: str
    restart: int
    host: str
    pid: int
    ranks: int
    gpus: int
    submitted: float
    began: float
    from_step: int
    step: int
    seconds: dict[str, float]
    end: str
    energy_j: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start to the last sign of life."""
        return math.fsum(self.seconds.values())

    @property
    def last_sign(self) -> float:
        """Time of the last sign of life, in seconds since 1970."""
        return self.began + self.elapsed_s

    def to_json(self) -> str:
        """Its line in attempts.jsonl, without the line break."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, content: t.Any) -> Attempt | None:
        """The inverse of `asdict`; None for invalid or incomplete content."""
        if not isinstance(content, dict):
            return None
        content = {"energy_j": None, **content}  # older lines lack it
        if content.keys() != _JSON_TYPES.keys():
            return None
        for name, value in content.items():
            if type(value) not in _JSON_TYPES[name]:
                return None
        seconds = content["seconds"]
        if seconds.keys() != set(SPENDINGS) or any(type(value) not in _NUMBER for value in seconds.values()):
            return None
        attempt = cls(**content)
        counts = (attempt.number, attempt.ranks, attempt.gpus, attempt.from_step, attempt.step - attempt.from_step)
        amounts = (attempt.submitted, attempt.began, attempt.energy_j or 0, *seconds.values())
        return attempt if all(0 <= amount < MOST for amount in (*counts, *amounts)) else None


_NUMBER = (int, float)
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("job", "host", "end"), (str,)),
    **dict.fromkeys(("number", "restart", "pid", "ranks", "gpus", "from_step", "step"), (int,)),
    **dict.fromkeys(("submitted", "began"), _NUMBER),
    "seconds": (dict,),
    "energy_j": (*_NUMBER, type(None)),
}


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Where the time of a cell went. seconds: by CAUSES; they sum to `wall_s`.

    wall_s: from the first submission to the last sign of life. replayed_steps: steps repeated because an attempt died
    after the last checkpoint. gpu_hours: of all attempts, productive or not.
    energy_j: joules used by the GPUs of all attempts; None if any attempt has no value, as the sum would be too low.
    """

    attempts: int
    replayed_steps: int
    gpu_hours: float
    energy_j: float | None
    seconds: dict[str, float]

    @property
    def wall_s(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def share(self) -> float | None:
        """Goodput: productive seconds over all seconds in which the cell was submitted; None if there are none."""
        asked_for = self.wall_s - self.seconds["idle"]
        return self.seconds["productive"] / asked_for if asked_for > 0 else None

    def to_dict(self) -> dict[str, t.Any]:
        """For JSON."""
        return {"share": self.share, "wall_s": self.wall_s, **asdict(self)}


def goodput(attempts: Sequence[Attempt], saved: int | None = None) -> Goodput | None:
    """Account for the attempts of one cell, in order; None without any.

    saved: step of the newest checkpoint, if the last attempt died and none is running: later steps are lost, and become
    repeated steps when the cell resumes.
    """
    if not attempts:
        return None
    seconds = dict.fromkeys(CAUSES, 0.0)
    before, reached, replayed = None, 0, 0
    for attempt in attempts:
        for cause, waited in _waits(before, attempt).items():
            seconds[cause] += waited
        spent = attempt.seconds
        again = max(0, min(reached, attempt.step) - attempt.from_step)
        replay = spent["step"] * again / (attempt.step - attempt.from_step) if again else 0.0
        seconds["replay"] += replay
        seconds["productive"] += spent["step"] - replay
        seconds["evaluate"] += spent["validate"] + spent["evaluate"]
        for cause in ("start", "load", "save", "other"):
            seconds[cause] += spent[cause]
        before, reached, replayed = attempt, max(reached, attempt.step), replayed + again
    last = attempts[-1]
    if saved is not None and not last.end and last.step > max(saved, last.from_step):
        lost = last.seconds["step"] * (last.step - max(saved, last.from_step)) / (last.step - last.from_step)
        lost = min(lost, seconds["productive"])
        seconds["lost"] += lost
        seconds["productive"] -= lost
    gpu_hours = math.fsum(attempt.elapsed_s * attempt.gpus for attempt in attempts) / 3600
    drawn = [attempt.energy_j for attempt in attempts if attempt.gpus]
    told = [joules for joules in drawn if joules is not None]
    return Goodput(
        attempts=len(attempts),
        replayed_steps=replayed,
        gpu_hours=gpu_hours,
        energy_j=math.fsum(told) if told and len(told) == len(drawn) else None,
        seconds=seconds,
    )


def trained_in(cell_dir: Path | CellDir) -> str:
    """Folder (at the time) of the cell whose weights this cell took over; "" for a cell that trains itself."""
    return TakenOver.read_valid(CellDir(cell_dir).taken_over).trained_in


def _waits(before: Attempt | None, attempt: Attempt) -> dict[str, float]:
    """Seconds between an attempt and the previous one, by cause; never negative, although clocks of nodes differ."""
    # `bushpc train` records the submission when it is already running.
    submitted = min(attempt.submitted, attempt.began)
    if before is None:
        return {"queue": attempt.began - submitted}
    last_sign = before.last_sign
    # `bushpc train` in a batch job records a submission at every start, so check Slurm's restart count too.
    same = attempt.submitted == before.submitted or attempt.restart > before.restart
    if same and attempt.job == before.job:
        return {"requeue": max(0.0, attempt.began - last_sign)}
    return {"idle": max(0.0, submitted - last_sign), "queue": max(0.0, attempt.began - max(submitted, last_sign))}


def read_attempts(cell_dir: Path | CellDir, heartbeat: Heartbeat | None = None) -> list[Attempt]:
    """All attempts of a cell, by number, the running one last; invalid lines are skipped.

    heartbeat: the cell's, if the caller has read it.
    """
    by_number: dict[int, Attempt] = {}
    cell = CellDir(cell_dir)
    for line in _lines(cell.attempts):
        attempt = Attempt.parse(_json(line)) if line else None
        if attempt:
            by_number.setdefault(attempt.number, attempt)
    latest = (Heartbeat.read_valid(cell.heartbeat) if heartbeat is None else heartbeat).attempt
    number = latest.get("number") if isinstance(latest, dict) else None
    if not (isinstance(number, int) and number in by_number):  # else it has ended, and its line is read
        running = Attempt.parse(latest)
        if running:
            by_number.setdefault(running.number, running)
    return [by_number[number] for number in sorted(by_number)]


def read_note(path: Path) -> dict[str, t.Any]:
    """The object in an optional JSON file; empty if the file is missing or damaged."""
    content = _json("\n".join(_lines(path)))
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> list[str]:
    try:
        return read_quickly(path).decode(errors="replace").split("\n")
    except OSError:
        return []


def _json(text: str) -> t.Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
