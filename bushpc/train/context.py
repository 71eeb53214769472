"""What the work on a cell has around it: its settings and folder, who else works on it, and whom to tell.

run_cell ─makes→ CellContext → our loop, a package's own trainer, evaluation
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bushpc.config import CellConfig
from bushpc.data.loader import FoldData
from bushpc.data.staging import Stage
from bushpc.dist import World
from bushpc.metrics.registry import METRICS
from bushpc.runs.layout import CellDir
from bushpc.runs.lease import Lease
from bushpc.runs.retention import Retention
from bushpc.runs.saver import Saver
from bushpc.train.preempt import StopFlag
from bushpc.train.track import Tracker


@dataclass(frozen=True)
class CellContext:
    """What every part of a cell's work needs.

    alive: tells the watchdog. lease: of rank 0 alone. stage: the node's own disk, where the profile names one.
    """

    cell: CellConfig
    dir: CellDir
    world: World
    tracker: Tracker
    stop: StopFlag
    alive: Callable[[str], None]
    lease: Lease | None
    data: FoldData
    stage: Stage | None = None

    def still_alive(self, where: str) -> None:
        """Tell watchdog and heartbeat."""
        self.alive(where)
        self.tracker.alive()

    def keep_going(self) -> bool:
        """Whether decoding may go on."""
        self.still_alive("decoding images")
        return not self.stop

    def saver(self) -> Saver:
        """Writes checkpoints as long as the lease holds."""
        config = self.cell.train
        rule = Retention(
            keep=config.keep,
            every=config.keep_every,
            best=config.keep_best,
            more=config.keep_best is None or METRICS[config.keep_best].more_is_better,
        )
        check = self.lease.check if self.lease else lambda: None
        return Saver(self.dir.checkpoints, rule, check, self.tracker.say)
