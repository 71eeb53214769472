"""Attempts → cost of an arm: hours of GPUs or cores, energy, and how the time was spent."""

from __future__ import annotations

import math
import typing as t
from collections.abc import Iterable

from bushpc.report.results import Cell
from bushpc.runs.goodput import CAUSES


class Cost(t.NamedTuple):
    """Summed over cells that have started.

    gpu_hours: of all attempts. core_hours: of attempts without a GPU, ranks times cores per rank; None if a cell's
    config doesn't say. energy_kwh: of the GPUs; None if an attempt couldn't measure it. seconds: by CAUSES, added up
    over cells that ran at the same time.
    """

    cells: int
    attempts: int
    replayed_steps: int
    gpu_hours: float
    core_hours: float | None
    energy_kwh: float | None
    seconds: dict[str, float]

    @property
    def share(self) -> float | None:
        """Goodput of all cells together."""
        asked_for = math.fsum(self.seconds.values()) - self.seconds["idle"]
        return self.seconds["productive"] / asked_for if asked_for > 0 else None


def cost_of(cells: Iterable[Cell]) -> Cost | None:
    """Cost of all cells; None before one has started. A cell shared by several arms (one folder) counts once."""
    once = {cell.folder.resolve(): cell for cell in cells}.values()
    started = [(cell, cell.goodput) for cell in once if cell.goodput]
    if not started:
        return None
    energies = [account.energy_j for _, account in started if account.gpu_hours]
    measured = [joules for joules in energies if joules is not None]
    cores = [_core_hours(cell) for cell, _ in started]
    return Cost(
        cells=len(started),
        attempts=sum(account.attempts for _, account in started),
        replayed_steps=sum(account.replayed_steps for _, account in started),
        gpu_hours=math.fsum(account.gpu_hours for _, account in started),
        core_hours=None if None in cores else math.fsum(hours for hours in cores if hours is not None),
        energy_kwh=math.fsum(measured) / 3.6e6 if measured and len(measured) == len(energies) else None,
        seconds={cause: math.fsum(account.seconds[cause] for _, account in started) for cause in CAUSES},
    )


def _core_hours(cell: Cell) -> float | None:
    without_gpu = [attempt for attempt in cell.attempts if not attempt.gpus]
    cores = cell.settings.get("cluster.cpus_per_rank")
    if without_gpu and not isinstance(cores, int):
        return None
    return math.fsum(attempt.elapsed_s * attempt.ranks * (cores or 0) for attempt in without_gpu) / 3600
