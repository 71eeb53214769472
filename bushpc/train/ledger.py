"""Which samples every step consumed: written by each rank as it trains, read by `bushpc audit`.

<cell>/ledger/rank<r>.csv   attempt,step,world,rank,samples
<cell>/ledger/none.txt      instead of them: why nothing is noted here

A line a step, which a human can read: `0,12,2,1,3:case044 3:case007` says that in attempt 0 step 12 (steps count from
0) took on rank 1 of 2 case044 and case007 for epoch 3. A step that was done again has a line of each attempt; the
later one counts. A checkpoint is sealed only after the lines of its steps are on the disk.
"""

from __future__ import annotations

import io
import os
import typing as t
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from bushpc.files import flush_folder, write_atomically
from bushpc.runs.layout import CellDir

if t.TYPE_CHECKING:  # reading is done without torch
    from bushpc.dist import World

HEADER = "attempt,step,world,rank,samples\n"
# Lines that wait in memory at most; a flush writes what there is.
BUFFERED = 256
BLOCK = 1 << 16


class Line(t.NamedTuple):
    """One step of one rank. samples: `epoch:key` words, separated by blanks; keys hold none."""

    attempt: int
    step: int
    world: int
    rank: int
    samples: str

    def __str__(self) -> str:
        return f"{self.attempt},{self.step},{self.world},{self.rank},{self.samples}\n"

    @classmethod
    def parse(cls, text: str) -> Line | None:
        """The inverse of `str`, without the line break; None for anything else."""
        *numbers, samples = text.split(",", 4)
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers) or not samples:
            return None
        if not all(word.partition(":")[0].isdecimal() and word.partition(":")[2] for word in samples.split(" ")):
            return None
        attempt, step, world, rank = (int(number) for number in numbers)
        return cls(attempt, step, world, rank, samples)


class Ledger:
    """One rank's writer. Context manager: what was noted is on the disk when it closes.

    attempt: number of this start of the cell, the same on all ranks. start: steps done before.

    A line that cannot be written (a full disk) is kept in memory, said, and tried again at the next flush: losing
    the proof must not end the training, least of all on one rank alone. The audit names what is missing in the end.
    """

    def __init__(self, cell_dir: Path | CellDir, world: World, attempt: int, start: int) -> None:
        self.path = CellDir(cell_dir).ledger_of(world.rank)
        self._world, self._attempt, self._next = world, attempt, start
        self._lines: list[str] = []

    def note(self, step: int, keys: Sequence[str], epochs: Sequence[int]) -> None:
        """The samples of this rank in `step`, counted from 0, in the order of its batch."""
        assert step == self._next, f"step {step} after step {self._next - 1}"
        self._next += 1
        samples = " ".join(f"{epoch}:{key}" for epoch, key in zip(epochs, keys, strict=True))
        self._lines.append(str(Line(self._attempt, step, self._world.size, self._world.rank, samples)))
        if len(self._lines) >= BUFFERED:
            self._write(durable=False)

    def flush(self) -> None:
        """Force all that was noted to the disk."""
        self._write(durable=True)

    def close(self) -> None:
        """The last flush."""
        self.flush()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, durable: bool) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)
            _append_whole_lines(self.path, self._lines, durable)
        except OSError as error:
            warnings.warn(
                f"the ledger {self.path} cannot be written: {error}; {len(self._lines)} lines wait for the next flush",
                stacklevel=3,
            )
            return
        self._lines.clear()


def keep_none(cell_dir: CellDir, why: str) -> None:
    """Note that steps take other samples than one of each an epoch, so that there is nothing to prove."""
    cell_dir.ledger.mkdir(exist_ok=True)
    write_atomically(cell_dir.no_ledger, why)


def why_none(cell_dir: Path | CellDir) -> str | None:
    """What `keep_none` noted; None for a cell that has a ledger, or is to have one."""
    path = CellDir(cell_dir).no_ledger
    return path.read_text() if path.exists() else None


def _append_whole_lines(path: Path, lines: Sequence[str], durable: bool) -> None:
    """Append all lines or none, behind the last whole line: what a kill cut off goes."""
    # Unbuffered: a buffer would be written once more when the file closes after a failure.
    with path.open("ab+", buffering=0) as file:
        end = _end_of_whole_lines(file)
        file.truncate(end)
        left = "".join([HEADER, *lines] if end == 0 else lines).encode()
        try:
            while left:
                left = left[file.write(left) :]
            if durable:
                os.fsync(file.fileno())
                flush_folder(path.parent)
        except OSError:
            file.truncate(end)
            raise


def _end_of_whole_lines(file: io.FileIO) -> int:
    """Where the last line break of a file ends, 0 without one."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def read_ledger(cell_dir: Path | CellDir) -> Iterator[Line | str]:
    """Every line of every rank, in the order of its file; a text that says where, for one that cannot be read.

    The half line that a kill left at the end of a file was never promised, and is passed over.
    """
    for path in CellDir(cell_dir).ledgers():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, text in enumerate(file, 1):
                if text != HEADER and text.endswith("\n"):
                    yield Line.parse(text[:-1]) or f"{path.name}, line {number}"
