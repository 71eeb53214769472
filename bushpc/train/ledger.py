"""The ledger records which samples every step consumed. Each rank writes it during training; `bushpc audit` reads it.

<cell>/ledger/rank<r>.csv   attempt,step,world,rank,samples
<cell>/ledger/none.txt      instead of these: the reason why no ledger is kept

There is one readable line per step: `0,12,2,1,3:case044 3:case007` means that in attempt 0, step 12 (steps count from
0) took case044 and case007 for epoch 3 on rank 1 of 2. A repeated step has a line for each attempt; the later one
counts. A checkpoint is sealed only after the lines of its steps are on disk.
"""

from __future__ import annotations

import io
import os
import typing as t
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from bushpc.errors import BushpcWarning
from bushpc.files import flush_folder, write_atomically
from bushpc.runs.layout import CellDir
from bushpc.runs.record import MOST_DIGITS

if t.TYPE_CHECKING:  # readers do without torch
    from bushpc.dist import World

HEADER = "attempt,step,world,rank,samples\n"
# Maximum number of lines buffered in memory.
BUFFERED = 256
BLOCK = 1 << 16


class LedgerLine(t.NamedTuple):
    """One step of one rank. samples: `epoch:key` words separated by spaces; keys contain none."""

    attempt: int
    step: int
    world: int
    rank: int
    samples: str

    def __str__(self) -> str:
        return f"{self.attempt},{self.step},{self.world},{self.rank},{self.samples}\n"

    @classmethod
    def parse(cls, text: str) -> LedgerLine | None:
        """The inverse of `str`, without the line break; None if the text is not a ledger line."""
        *numbers, samples = text.split(",", 4)
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers) or not samples:
            return None
        if not all(word.partition(":")[0].isdecimal() and word.partition(":")[2] for word in samples.split(" ")):
            return None
        if any(len(number) > MOST_DIGITS for number in numbers):
            return None
        attempt, step, world, rank = (int(number) for number in numbers)
        return cls(attempt, step, world, rank, samples)


class Ledger:
    """One rank's writer. Context manager: closing it writes all lines to disk.

    attempt: number of this start of the cell, the same on all ranks. start: steps done before.

    Lines that cannot be written (a full disk) stay in memory with a warning and are retried at the next flush: losing
    the ledger must not end the training, least of all on one rank only. The audit reports lines that stay missing.
    """

    def __init__(self, cell_dir: Path | CellDir, world: World, attempt: int, start: int) -> None:
        self.path = CellDir(cell_dir).ledger_of(world.rank)
        self._world, self._attempt, self._next = world, attempt, start
        self._lines: list[str] = []

    def note(self, step: int, keys: Sequence[str], epochs: Sequence[int]) -> None:
        """Record this rank's samples in `step`, counted from 0, in batch order."""
        assert step == self._next, f"step {step} after step {self._next - 1}"
        self._next += 1
        samples = " ".join(f"{epoch}:{key}" for epoch, key in zip(epochs, keys, strict=True))
        self._lines.append(str(LedgerLine(self._attempt, step, self._world.size, self._world.rank, samples)))
        if len(self._lines) >= BUFFERED:
            self._write(durable=False)

    def flush(self) -> None:
        """Write all recorded lines to disk with fsync."""
        self._write(durable=True)

    def close(self) -> None:
        """Flush for the last time."""
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
                f"the ledger {self.path} cannot be written: {error}. {len(self._lines)} lines wait for the next flush",
                BushpcWarning,
                stacklevel=3,
            )
            return
        self._lines.clear()


def keep_none(cell_dir: CellDir, why: str) -> None:
    """Record why a cell has no ledger: its epochs don't take every sample once, so there is nothing to audit."""
    cell_dir.ledger.mkdir(exist_ok=True)
    write_atomically(cell_dir.no_ledger, why)


def why_none(cell_dir: Path | CellDir) -> str | None:
    """The reason recorded by `keep_none`; None for a cell that has or will have a ledger."""
    path = CellDir(cell_dir).no_ledger
    return path.read_text() if path.exists() else None


def _append_whole_lines(path: Path, lines: Sequence[str], durable: bool) -> None:
    """Append all lines or none after the last complete line; a line truncated by a kill is removed."""
    # Unbuffered: after a failed write, closing the file would write the buffer again.
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
    """Position after the last line break of a file; 0 if there is none."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def read_ledger(cell_dir: Path | CellDir) -> Iterator[LedgerLine | str]:
    """Every line of every rank, in the order of its file; a text that says where, for one that cannot be read.

    An incomplete last line, left by a kill, is skipped.
    """
    for path in CellDir(cell_dir).ledgers():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, text in enumerate(file, 1):
                if text != HEADER and text.endswith("\n"):
                    yield LedgerLine.parse(text[:-1]) or f"{path.name}, line {number}"
