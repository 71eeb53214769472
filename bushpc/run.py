"""One cell from start to end; the only place that assembles data, model, engine, trainer and evaluator.

runs/<name>/cells/<cell>/
  config.yaml      frozen, composed configuration
  state.json       phase, step, rate, host, process (heartbeat for `bushpc status`)
  metrics.jsonl    curves
  checkpoints/     sealed checkpoints
  per_image.csv    metrics of every validation image, written when complete
  predictions/     probability maps
  DONE | FAILED    how it ended; neither while it is running, queued or stopped
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from bushpc.config import CellConfig
from bushpc.data.loader import FoldData
from bushpc.dist import World, barrier, leave, seed_everything, share_buffers
from bushpc.errors import TrainingError
from bushpc.evaluate.evaluate import evaluate, validation_metrics
from bushpc.files import write_atomically
from bushpc.models.base import Model
from bushpc.train.loop import Stopped, train
from bushpc.train.preempt import StopFlag
from bushpc.train.track import Tracker

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def run_cell(cell_dir: Path, world: World) -> Stopped | None:
    """Train and evaluate the cell whose `config.yaml` lies in `cell_dir`, from wherever it stands.

    Returns None when it is done (also if it already was), Stopped when a signal ended it early.
    """
    if (cell_dir / "DONE").exists():
        return None
    began = time.time()
    cell = CellConfig.load(cell_dir / "config.yaml")
    tracker = Tracker(cell_dir, cell.train.iterations, active=world.is_main)
    tracker.phase("starting", 0)
    with StopFlag() as stop:
        try:
            stopped = _train_and_evaluate(cell, cell_dir, world, tracker, stop, began)
        finally:
            leave()
    if stopped:
        tracker.say(
            f"stopped by {stopped.signal_name} after step {stopped.step}, saved; the same command goes on from there"
        )
    return stopped


def build_model(cell: CellConfig) -> Model:
    """The cell's model, initialised from its seed, with staged weights where the config says so."""
    seed_everything(cell.seed, "init")
    return cell.model_class(cell.model, cell.weights_dir)


def start_engine(cell: CellConfig, world: World) -> Accelerator:
    """Accelerate as the config asks. Raises: TrainingError when it became something else, as it may silently."""
    wanted_cpu = cell.engine.device == "cpu"
    if cell.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(mixed_precision=PRECISIONS[cell.engine.precision], cpu=wanted_cpu)
    if accelerator.num_processes != world.size or accelerator.device.type != cell.engine.device:
        raise TrainingError(
            f"asked for {world.size} ranks on {cell.engine.device}, got {accelerator.num_processes} "
            f"on {accelerator.device.type}: check the launcher, the drivers and cluster.gpus_per_node"
        )
    return accelerator


def _train_and_evaluate(
    cell: CellConfig, cell_dir: Path, world: World, tracker: Tracker, stop: StopFlag, began: float
) -> Stopped | None:
    assert cell.fold is not None, "dispatch gives every cell its fold"
    accelerator = start_engine(cell, world)
    data = FoldData.open(cell, cell.fold, cell_dir.parent.parent / "folds.csv")
    model = build_model(cell)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    tracker.say(
        f"{type(model).__name__}: {total:,} parameters, {trained:,} trained; {len(data.train)} training and "
        f"{len(data.validation)} validation images; {world.size} rank(s) on {accelerator.device.type}, "
        f"{cell.engine.precision}, global batch {cell.train.batch_size}; code {Path(__file__).parent}"
    )

    def validate(current: Model) -> dict[str, float]:
        share_buffers(current)
        return validation_metrics(cell, current, data, accelerator, world)

    stopped = train(cell, model, data, cell_dir, accelerator, world, tracker, stop, validate)
    if stopped:
        return stopped
    tracker.phase("evaluating", cell.train.iterations)
    share_buffers(model)
    rows = evaluate(cell, model, data, cell_dir, accelerator, world, tracker.say)
    barrier()
    if world.is_main:
        done = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": cell.train.iterations}
        done |= {"wall_seconds": round(time.time() - began, 1), "rows": len(rows)}
        (cell_dir / "FAILED").unlink(missing_ok=True)
        write_atomically(cell_dir / "DONE", json.dumps(done))
        tracker.phase("done", cell.train.iterations)
    return None
