"""`train.start_from` in a job: the trained model of another run becomes the first weights of this one.

A checkpoint of the cell wins over it. So the start is read at every attempt, and only the first one, which has no
checkpoint, needs it: a run goes on when the run that it started from is gone.
"""

from __future__ import annotations

import typing as t
from collections.abc import Callable
from pathlib import Path

from bushpc.config import CellConfig
from bushpc.data.starts import Starts
from bushpc.errors import BushpcError, ResumeError
from bushpc.models.base import Model, set_tensors


class Loaded(t.NamedTuple):
    """said: what the log states. problem: why the weights could not be loaded; "" if they were."""

    said: str = ""
    problem: str = ""

    def require(self, say: Callable[[str], None]) -> None:
        """Log the start. Raises: ResumeError if the weights could not be loaded."""
        if self.problem:
            raise ResumeError(
                f"{self.problem}. It was there when this was submitted: bring it back and resume, or submit again with "
                "another train.start_from under another name=…"
            )
        if self.said:
            say(self.said)


def load_start(cell: CellConfig, model: Model) -> Loaded:
    """Load the weights that the cell's fold starts from into `model`, if train.start_from names any."""
    given = cell.train.start_from
    if given is None:
        return Loaded()
    try:
        start = Starts.open(Path(given), cell.train.start_row, f"train.start_from={given}").for_fold(cell.fold)
        if start.sha256 != cell.train.start_sha256:
            return Loaded(problem=f"{start.title} in {given} has changed since this was submitted")
        set_tensors(model, start.tensors())
    except (BushpcError, RuntimeError) as error:
        return Loaded(problem=str(error))
    return Loaded(said=f"starts from {start.title}, step {start.step}, trained on {start.data}")
