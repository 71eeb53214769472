"""What a job does for a cell: train and evaluate it, or what follows the training of a generator."""

from __future__ import annotations

import functools
import typing as t

from bushpc.config import CellConfig
from bushpc.dispatch.status import read_status
from bushpc.errors import DispatchError
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.lease import StoppedWaiting
from bushpc.runs.source import wait_for_source

if t.TYPE_CHECKING:
    from bushpc.dist import World
    from bushpc.train.loop import Stopped
    from bushpc.train.preempt import StopFlag


def run_work(cell_dir: CellDir, run: RunDir, world: World, stop: StopFlag) -> Stopped | None:
    """The cell from wherever it stands; Stopped when it was told to leave before its end. run: that asks for it."""
    cell = CellConfig.load(cell_dir.config)
    lives = functools.partial(_lives, run, str(cell.source))
    if cell.work == "train":
        from bushpc.cell import run_cell

        if cell.source is not None:
            try:
                wait_for_source(cell.source, run, lives, functools.partial(_leave_at, stop))
            except StoppedWaiting:
                from bushpc.train.loop import Stopped as Left  # here: it imports torch

                return Left(step=cell_dir.newest_step(), signal_name=stop.signal_name or "a stop signal")
        return run_cell(cell_dir, world, stop)
    from bushpc.generate.cell import run_following

    return run_following(cell_dir, run, world, stop, lives)


def _leave_at(stop: StopFlag) -> None:
    if stop:
        raise StoppedWaiting


def _lives(run: RunDir, name: str) -> bool:
    """Whether a job works on the cell, or will; also where the queue cannot be asked from here."""
    try:
        return any(cell.name == name and (cell.live or cell.state == "done") for cell in read_status(run.path).cells)
    except DispatchError:
        return True
