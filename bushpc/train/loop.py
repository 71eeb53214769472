"""Batches → checkpoints: the one training loop, for every model. It reads top to bottom and asks no model's name."""

from __future__ import annotations

import math
import typing as t
from pathlib import Path

import torch
from accelerate import Accelerator

from bushpc import checkpoint
from bushpc.config import CellConfig
from bushpc.data.loader import FoldData, training_batches
from bushpc.dist import World, any_rank, barrier, gather, seed_everything
from bushpc.errors import ResumeError, TrainingError
from bushpc.models.base import Model
from bushpc.sample import Batch, Losses
from bushpc.train.optim import adamw, learning_rate
from bushpc.train.preempt import StopFlag
from bushpc.train.track import Tracker


class Stopped(t.NamedTuple):
    """Training ended before its last step because a stop signal arrived; everything is saved."""

    step: int
    signal_name: str


def train(
    cell: CellConfig,
    model: Model,
    data: FoldData,
    cell_dir: Path,
    accelerator: Accelerator,
    world: World,
    tracker: Tracker,
    stop: StopFlag,
    validate: t.Callable[[Model], dict[str, float]],
) -> Stopped | None:
    """Train `model` in place to `cell.train.iterations`, from the newest checkpoint if there is one.

    cell_dir: the cell's folder in the run directory; checkpoints, metrics and state are written below it.
    validate: metrics of the model on the validation part, called on every rank every `validate_every` steps.
    Raises: ResumeError, TrainingError (loss or gradient not finite: step, sample keys and loss terms are named).
    """
    folder, store = cell_dir / "checkpoints", cell_dir.parent.parent / "frozen"
    optimizer = adamw(model, cell.train)
    resumed = checkpoint.newest(folder, store, log=tracker.say)
    start = 0
    if resumed:
        if resumed.meta["config"] != cell.hash:
            raise ResumeError(
                f"{resumed.path} was written with other settings (hash {resumed.meta['config']}, now {cell.hash})"
            )
        model.load_state_dict(resumed.model)
        optimizer.load_state_dict(resumed.state["optimizer"])
        start = resumed.step
        tracker.say(f"resumed from {resumed.path.name}")
    barrier()  # every rank has read what it goes on from
    frozen = None
    if world.is_main:
        checkpoint.set_aside_after(folder, start)
        frozen = checkpoint.store_frozen(store, checkpoint.split_state(model)[1])
    engine, optimizer = accelerator.prepare(model, optimizer)
    if resumed and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(resumed.state["scaler"])

    def save(step: int) -> None:
        if world.is_main:
            state = {
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            }
            meta = {"config": cell.hash, "frozen": frozen, "torch": torch.__version__, "world": world.size}
            checkpoint.write(folder, step, checkpoint.split_state(model)[0], state, meta)
            checkpoint.retain(folder, cell.train.keep)
        barrier()

    engine.train()
    tracker.phase("training", start)
    batches = training_batches(cell, data, world, start)
    for step in range(start, cell.train.iterations):
        batch = next(batches).to(accelerator.device)
        # Dropout depends on seed, step and rank alone: a resumed run draws what an uninterrupted one would have.
        seed_everything(cell.seed, "step", step, world.rank)
        lr = learning_rate(step, cell.train)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses: Losses = engine(batch)
        accelerator.backward(losses.total)
        norm = accelerator.clip_grad_norm_(engine.parameters(), cell.train.grad_clip or math.inf)
        finite = _is_finite(losses, norm, accelerator)
        any_broken, any_stop = any_rank(not finite, bool(stop), device=accelerator.device)
        if any_broken:  # on all ranks, before the weights are touched
            raise TrainingError(_broken_step(losses, norm, batch, step))
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        tracker.alive(done)
        if done % cell.train.log_every == 0 or done == cell.train.iterations:
            terms = {name: float(value) for name, value in losses.terms.items()}
            tracker.train(done, float(losses.total.detach()), terms, lr)
        if any_stop:
            save(done)
            tracker.phase("stopped", done)
            return Stopped(step=done, signal_name=stop.signal_name or "a signal on another rank")
        if done % cell.train.save_every == 0 or done == cell.train.iterations:
            save(done)
        if cell.train.validate_every and done % cell.train.validate_every == 0:
            engine.eval()
            tracker.validation(done, validate(model))
            engine.train()
    return None


def _is_finite(losses: Losses, norm: torch.Tensor | None, accelerator: Accelerator) -> bool:
    """Whether loss and gradient are numbers. With fp16 an infinite gradient is the scaler's business: it skips."""
    if not math.isfinite(float(losses.total.detach())):
        return False
    return accelerator.scaler is not None or norm is None or math.isfinite(float(norm))


def _broken_step(losses: Losses, norm: torch.Tensor | None, batch: Batch, step: int) -> str:
    """What is known of a broken step, the same on all ranks. Called by all of them, as it asks each for its samples.

    Gradients are averaged over ranks, so a broken one is broken everywhere; only the losses tell whose samples it was.
    """
    mine_is_finite = math.isfinite(float(losses.total.detach()))
    keys = gather([] if mine_is_finite else batch.keys)
    what = "the loss" if keys else "the gradient"
    terms = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.terms.items())
    return (
        f"{what} is not finite at step {step + 1}: samples {', '.join(keys or gather(batch.keys))} ({terms}, gradient "
        f"norm {float(norm if norm is not None else 0.0):.4g}). Look at these samples, or lower train.lr, or use "
        "engine.precision=fp32; the last checkpoint is untouched"
    )
