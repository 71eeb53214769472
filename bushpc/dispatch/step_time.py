"""How long a training step takes on a GPU: measured by an earlier run, else estimated without a GPU.

CellConfig, runs beside it ─step_time→ seconds an image, and where they are from
"""

from __future__ import annotations

import dataclasses
import typing as t
from pathlib import Path

from bushpc.config import CellConfig
from bushpc.config.gpu_memory import estimate, memory_settings
from bushpc.errors import BushpcError
from bushpc.runs.goodput import read_attempts
from bushpc.runs.layout import RunDir
from bushpc.runs.run_record import RunRecord


class StepTime(t.NamedTuple):
    """image_s: seconds of one GPU for an image of a step. source: where that is from, in words."""

    image_s: float
    source: str


def step_time(cell: CellConfig, runs_dir: Path) -> StepTime | None:
    """Of this network and training; None where nothing is known.

    runs_dir: where runs of it may lie. The estimate is half of what the arithmetic of an A100 allows
    (benchmarks/2026-11-30_fake_gpu).
    """
    if measured := _measured(cell, runs_dir):
        return measured
    on_gpu = dataclasses.replace(cell.engine, device="cuda")
    if cell.engine.device == "cpu":  # composed without a cluster: as on an A100
        on_gpu = dataclasses.replace(on_gpu, precision="bf16")
    expected = estimate(dataclasses.replace(cell, engine=on_gpu))
    if expected is None or not expected.image_s:
        return None
    return StepTime(expected.image_s, f"estimated for {expected.name}: half of an A100's peak, not measured")


def _measured(cell: CellConfig, runs_dir: Path) -> StepTime | None:
    """Of the newest run of the same network and training that had a GPU."""
    wanted = memory_settings(cell)
    files = sorted(runs_dir.glob("*/run.json"), key=lambda path: -path.stat().st_mtime)
    for run in (RunDir(path.parent) for path in files):
        record = RunRecord.read_whole(run.file)
        if record is None or record.model != cell.choices["model"]:
            continue
        for entry in record.cells:
            folder = run.cell(entry.name)
            attempts = [each for each in read_attempts(folder) if each.gpus and each.step > each.from_step]
            if not attempts:
                continue
            try:
                trained = CellConfig.load(folder.config)
            except BushpcError:
                continue
            if memory_settings(trained) != wanted:
                continue
            seconds = sum(each.seconds["step"] * each.gpus for each in attempts)
            images = sum(each.step - each.from_step for each in attempts) * trained.train.batch_size
            return StepTime(seconds / images, f"measured by {record.name}, {entry.name}")
    return None
