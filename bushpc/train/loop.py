"""Batches → checkpoints: the model-agnostic training loop for every model and engine."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import typing as t
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bushpc.config import CellConfig
from bushpc.data.batches import training_batches
from bushpc.data.loader import FoldData
from bushpc.dist import World, any_rank, gather, seed_everything
from bushpc.errors import TrainingError
from bushpc.runs.saver import Saver
from bushpc.sample import Batch, Losses
from bushpc.train.engine import Engine
from bushpc.train.ledger import Ledger
from bushpc.train.optim import Schedule
from bushpc.train.preempt import LEAD_S, StopFlag
from bushpc.train.track import Tracker

# Maximum fraction of time blocked on saves when the grace time demands more frequent ones.
STALL_SHARE = 0.05
STEPS_REMEMBERED = 20


class Stopped(t.NamedTuple):
    """A cell ended early on request; everything up to `step` is saved."""

    step: int
    signal_name: str


@dataclass(frozen=True, kw_only=True)
class Services:
    """The services that the loop uses. alive: reports this rank's progress to the watchdog.

    validate: returns metrics on the validation part, by the engine's predictor; None if a stop signal interrupts it.
    tune: the same for the loss on the tuning part, which the schedule follows.
    """

    tracker: Tracker
    ledger: Ledger
    stop: StopFlag
    alive: Callable[[str], None]
    saver: Saver
    validate: Callable[[], dict[str, float] | None]
    tune: Callable[[], float | None]


def train(
    cell: CellConfig,
    engine: Engine,
    data: FoldData,
    world: World,
    services: Services,
    schedule: Schedule,
    start: int,
    frozen: str | None,
) -> Stopped | int:
    """Train from step `start` to `cell.train.iterations` or until the schedule stops early; returns the final step.

    On return, the state at the final step or at the stop is on disk. frozen: SHA-256 of the frozen parameters in the
    run's store.
    Raises: TrainingError if loss or gradient is not finite (names step, sample keys and loss terms), ResumeError if
    the last checkpoint cannot be written.
    """
    config, tracker, saver = cell.train, services.tracker, services.saver
    pace = Pace(config.save_every, cell.cluster.grace_s, tracker.say)
    health = Health(engine.device)
    saved = start

    def save(step: int, validation: dict[str, float] | None = None) -> None:
        nonlocal saved
        with tracker.spending("save"):
            # Before the collective call: no checkpoint is sealed while a rank's lines are missing.
            services.ledger.flush()
            raise_if_broken(any_rank(health.broken())[0])  # never save the weights of a broken step
            began = time.monotonic()
            meta = {"config": cell.hash, "settings": cell.settings, "frozen": frozen, "torch": torch.__version__}
            meta |= engine.state() | pace.measured | {"validation": validation, "schedule": schedule.state()}
            if world.is_main:
                saver.still_ours()
                saver.save(step, engine.tensors(), meta)
            else:
                for _ in engine.tensors():  # collective: the main rank gathers the parts of all ranks
                    pass
        pace.saved(time.monotonic() - began, saver.written_s)
        services.stop.lead_s = max(LEAD_S, 2 * pace.stop_s)
        saved = step

    def raise_if_broken(any_broken: bool) -> None:
        if any_broken:
            raise TrainingError(health.what_broke())

    def leave(step: int) -> Stopped:
        if step > saved:
            save(step)
        with tracker.spending("save"):
            saver.finish()
        tracker.phase("stopped", step)
        return Stopped(step=step, signal_name=services.stop.signal_name or "a signal on another rank")

    if any_rank(bool(services.stop))[0]:
        return leave(start)
    tracker.phase("training", start)
    done = start
    engine.train()
    with contextlib.closing(training_batches(cell, data, world, start)) as batches:
        for step in range(start, config.iterations):
            if schedule.needs_tuning_loss(step):
                with tracker.spending("validate"):
                    loss = services.tune()
                if loss is None:
                    return leave(step)
                tracker.tuning(step, loss, schedule.report(step, loss))
                pace.restart()
                engine.train()
            if schedule.over:
                break
            with tracker.spending("load"):
                batch = next(batches)
            with tracker.spending("step"):
                # Dropout depends only on seed, step and rank, so a resumed run draws the same as an uninterrupted one.
                seed_everything(cell.seed, "step", step, world.rank)
                lr = schedule.lr(step)
                parts = batch.split(config.accumulate)
                losses = [engine.losses(part, last=part is parts[-1]) for part in parts]
                norm = engine.update(lr)

            done = step + 1
            services.ledger.note(step, batch.keys, batch.epochs)
            services.alive(f"step {done}")
            tracker.alive(done)
            pace.stepped()
            # Rank 0's clock decides for all. Saving at multiples makes the steps independent of interruptions.
            due = world.is_main and (
                done % pace.save_every == 0 or bool(config.keep_every and done % config.keep_every == 0)
            )
            # This checks the previous step: checking the current one would wait for the GPU.
            any_broken, any_stop, any_due = any_rank(health.broken(), bool(services.stop), due)
            raise_if_broken(any_broken)
            health.watch(done, losses, norm, batch, overflow_allowed=engine.scale is not None)
            if done % config.log_every == 0 or done == config.iterations:
                total, terms = means(losses)
                tracker.train(done, total, terms, lr)
            if any_stop:
                return leave(done)
            validation = None
            if config.validate_every and done % config.validate_every == 0:
                with tracker.spending("validate"):
                    validation = services.validate()
                pace.restart()
                if validation is None:
                    return leave(done)
                tracker.validation(done, validation)
                engine.train()
            if any_due or done == config.iterations or (validation and config.keep_best):
                save(done, validation)
    if done > saved:  # the schedule stopped training between two saves
        save(done)
    with tracker.spending("save"):
        saver.finish()
    return done


class Health:
    """Detects a loss or gradient that is not finite, one step late so that the loop never waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step = 0
        self.batch: Batch | None = None
        self.losses: list[Losses] = []
        self.norm: torch.Tensor | None = None
        self._flag: torch.Tensor | None = None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def watch(
        self, step: int, losses: list[Losses], norm: torch.Tensor, batch: Batch, *, overflow_allowed: bool
    ) -> None:
        """Remember one step. overflow_allowed: with fp16 the loss scale handles infinite gradients."""
        self.step, self.batch, self.losses, self.norm = step, batch, losses, norm
        finite = torch.stack([part.total.detach() for part in losses]).isfinite().all()
        if not overflow_allowed:
            finite = finite & norm.to(finite.device).isfinite()
        if self._copied is None:
            self._flag = finite
            return
        self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        self._copied.record()

    def broken(self) -> bool:
        """Whether the remembered step was not finite on this rank."""
        if self._flag is None:
            return False
        if self._copied is not None:
            self._copied.synchronize()
        return not bool(self._flag)

    def what_broke(self) -> str:
        """Describe the broken step, with the same text on all ranks. Collective.

        Gradients are averaged over ranks, so a broken one shows on every rank; only the losses identify the samples.
        """
        assert self.batch is not None
        assert self.norm is not None
        finite = all(math.isfinite(float(part.total.detach())) for part in self.losses)
        keys = gather([] if finite else self.batch.keys)
        what = "the loss" if keys else "the gradient"
        named = ", ".join(f"{name} {value:.4g}" for name, value in means(self.losses)[1].items())
        return (
            f"{what} is not finite at step {self.step}: samples {', '.join(keys or gather(self.batch.keys))} ({named}, "
            f"gradient norm {float(self.norm):.4g}). Look at these samples, or lower train.lr, or use "
            "engine.precision=fp32; the last checkpoint is untouched"
        )


class Pace:
    """Measures steps and saves, and saves more often if the site's grace time is too short for a save at the stop.

    save_every: current interval; `configured` steps, or fewer if the grace time is shorter than a step and a save.
    """

    def __init__(self, configured: int, grace_s: float | None, say: Callable[[str], None]) -> None:
        self.configured = self.save_every = configured
        self.grace_s, self.say = grace_s, say
        self.save_s = self._write_s = 0.0
        self._steps: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self.restart()

    @property
    def step_s(self) -> float:
        """Median of the last steps: the first one compiles, and a few others wait."""
        return statistics.median(self._steps) if self._steps else 0.0

    @property
    def stop_s(self) -> float:
        """Maximum seconds from a stop signal to the end of its save: one step, one pending write, one save."""
        return self.step_s + self._write_s + self.save_s

    @property
    def measured(self) -> dict[str, float]:
        """Timings for meta.json; the next submission reads them."""
        times = {"step_s": self.step_s, "save_s": self.save_s, "stop_s": self.stop_s}
        return {name: round(seconds, 4) for name, seconds in times.items()}

    def restart(self) -> None:
        """Start timing the next step."""
        self._mark = time.monotonic()

    def stepped(self, seconds: float | None = None) -> None:
        """Record the end of a step."""
        self._steps.append(time.monotonic() - self._mark if seconds is None else seconds)
        self.restart()

    def saved(self, stall_s: float, written_s: Sequence[float]) -> None:
        """Record a save: how long it blocked the loop, and how long each background write took so far.

        If the grace time is too short, saves become more frequent: as often as writes can keep up without blocking the
        loop, and without spending more than a small share of the time on copies.
        """
        self._write_s = statistics.median(written_s[-STEPS_REMEMBERED:]) if written_s else 0.0
        self.save_s = stall_s + self._write_s
        self.restart()
        if self.grace_s is None or self.stop_s <= self.grace_s:
            return
        often = math.ceil(max(self._write_s, stall_s / STALL_SHARE) / max(self.step_s, 1e-6))
        before, self.save_every = self.save_every, min(self.configured, max(1, often))
        if self.save_every != before:
            self.say(
                f"stopping may take {self.stop_s:.1f} s (a step, a pending write and a save), but the site allows "
                f"{self.grace_s:g} s (cluster.grace_s). A stop may lose the steps since the last save, so the run now "
                f"saves every {self.save_every} steps"
            )


def means(losses: list[Losses]) -> tuple[float, dict[str, float]]:
    """Total and terms of a step, averaged over its parts and all ranks. Collective."""
    names = list(losses[0].terms)
    rows = gather([[float(part.total.detach()), *(float(part.terms[name]) for name in names)] for part in losses])
    total, *terms = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return total, dict(zip(names, terms, strict=True))
