"""Cells that follow a generator's training: one generates scans, the next measures them.

    <row>-fold<k> ─DONE→ <row>-fold<k>-generate: scans/ ─DONE→ <row>-fold<k>-quality: quality/quality.json, page

`dispatch` submits them behind each other; a cell whose source is not done when it starts waits for it.
"""

from __future__ import annotations

import contextlib
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

from bushpc.cluster.base import this_job
from bushpc.config import CellConfig
from bushpc.dist import World
from bushpc.errors import WeightsError
from bushpc.generate.config import GenerateConfig
from bushpc.generate.features import INCEPTION, NONE, require_inception
from bushpc.generate.generate import GeneratorSource, generate
from bushpc.generate.quality import QualityRequest, measure_quality, write
from bushpc.generate.quality.page import write_page
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.lease import Lease, StoppedWaiting
from bushpc.runs.records import DoneRecord
from bushpc.runs.source import wait_for_source
from bushpc.train.loop import Stopped
from bushpc.train.preempt import StopFlag
from bushpc.train.track import Tracker


class _Leave(Exception):
    """A stop signal came between two batches or images. What is finished is kept."""


def run_following(
    cell_dir: CellDir, run: RunDir, world: World, stop: StopFlag, source_lives: Callable[[], bool]
) -> t.Any:
    """Generate or measure, from wherever the cell stands; `train.loop.Stopped` if a stop signal came before the end.

    run: the run that asks for it, in which the source lies. source_lives: whether a job works, or will, on the source.
    Raises: TrainingError if the source has ended without a result; as `generate` and `measure_quality`.
    """
    if cell_dir.done.exists():
        return None
    cell = CellConfig.load(cell_dir.config)
    total = cell.synthesis.n if cell.work == "generate" else 1
    with contextlib.ExitStack() as around:
        try:
            lease = around.enter_context(Lease(cell_dir.path, job=this_job(), stop=lambda: bool(stop)))
        except StoppedWaiting:
            return Stopped(step=0, signal_name=stop.signal_name or "a stop signal")
        cell_dir.failed.unlink(missing_ok=True)
        gpus = 1 if cell.engine.device == "cuda" else 0
        tracker = Tracker(cell_dir, total, active=world.is_main, gpus=gpus)
        tracker.phase("starting", 0)
        reached = 0

        def show(done: int, of: int, text: str = "") -> None:
            nonlocal reached
            reached = min(done, total) if cell.work == "generate" else 0
            tracker.alive(reached)
            if stop:
                raise _Leave

        try:
            source = wait_for_source(str(cell.source), run, source_lives, lambda: show(0, total))
            tracker.phase("evaluating", 0)
            if cell.work == "generate":
                _generate(cell, cell_dir, run, world, show)
            else:
                _measure(cell, cell_dir, source, tracker.say, show)
        except _Leave:
            tracker.phase("stopped", reached)
            return Stopped(step=reached, signal_name=stop.signal_name or "a stop signal")
        lease.check()
        DoneRecord(finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), step=total, config=cell.hash).write(cell_dir.done)
        tracker.phase("done", total)
    return None


def _generate(cell: CellConfig, cell_dir: CellDir, run: RunDir, world: World, show: t.Any) -> None:
    row = str(cell.source).rpartition("fold")[0].removesuffix("-") or None
    source = GeneratorSource(run_dir=run.path, fold=cell.fold, row=row)
    config = GenerateConfig(n=cell.synthesis.n, batch_size=cell.synthesis.batch_size)
    generate(source, cell_dir.scans, config, world=world, show=show)


def _measure(cell: CellConfig, cell_dir: CellDir, source: CellDir, say: Callable[[str], None], show: t.Any) -> None:
    features = cell.synthesis.features
    weights_dir = Path(cell.weights_folder)
    if features == INCEPTION:
        try:
            require_inception(weights_dir)
        except WeightsError as error:
            say(f"FID and KID are left out: {error}")
            features = NONE
    request = QualityRequest(
        synthetic=source.scans,
        against=cell.data.folder,
        part="validation",
        folds=cell.folds,
        fold=cell.fold,
        features=features,
        segmenter=None,
        weights_dir=weights_dir,
        device="auto",
    )
    found = measure_quality(request, say, show)
    folder = cell_dir.quality.parent
    write(found, folder)
    write_page(found, folder, ["bushpc", "quality", str(source.scans), f"against={cell.data.folder}"])
