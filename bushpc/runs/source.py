"""The cell that another one follows: wait until it is done, as its job may only be on the way to that."""

from __future__ import annotations

import time
from collections.abc import Callable

from bushpc.errors import TrainingError
from bushpc.runs.layout import CellDir, RunDir

POLL_S = 5.0


def wait_for_source(name: str, run: RunDir, lives: Callable[[], bool], waiting: Callable[[], None]) -> CellDir:
    """The folder of the cell `name`, once that is done.

    lives: whether a job works, or will, on it. waiting: called before each pause. Raises: TrainingError if it has ended
    without a result; what `waiting` raises.
    """
    source = run.cell(name).resolve()
    while not source.is_done():
        if source.failed.exists() or not lives():
            if source.is_done():  # in between
                break
            raise TrainingError(
                f"{name} is not done, and no job works on it: `bushpc status {run}` says why. Then `bushpc resume "
                f"{run}` submits both"
            )
        waiting()
        time.sleep(POLL_S)
    return source
