"""One cell from start to end; the only place that assembles data, model, engine, trainer and evaluator.

config.yaml in the cell's folder (bushpc.runs.layout) ─train→ checkpoints ─evaluate→ per-image CSV, DONE
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bushpc.cluster.base import this_job
from bushpc.config import CellConfig, way_on
from bushpc.data.cache import DecodingStopped, open_cache
from bushpc.data.features import compute_features
from bushpc.data.loader import FoldData
from bushpc.data.mixture import PREFIX
from bushpc.dist import World, any_rank, barrier, from_main, from_main_or_raise, leave, seed_everything
from bushpc.errors import ResumeError
from bushpc.evaluate.evaluate import Predicting, evaluate, tuning_loss, validation_metrics
from bushpc.evaluate.explain import explain
from bushpc.evaluate.external import evaluate_external
from bushpc.evaluate.journal import forget
from bushpc.metrics.registry import METRICS
from bushpc.models.base import Model
from bushpc.runs import checkpoint
from bushpc.runs.checkpoint import Checkpoint, Retention, Saver, frozen_parameters
from bushpc.runs.layout import CellDir
from bushpc.runs.lease import Lease, StoppedWaiting
from bushpc.runs.records import DoneRecord
from bushpc.train.engine import Engine, start_ranks
from bushpc.train.ledger import Ledger
from bushpc.train.loop import Job, Stopped, train
from bushpc.train.mirrors import Mirrors
from bushpc.train.optim import Schedule
from bushpc.train.preempt import StopFlag
from bushpc.train.take_over import take_over
from bushpc.train.track import Tracker
from bushpc.train.watchdog import Watchdog


def run_cell(folder: Path | CellDir, world: World, stop: StopFlag | None = None) -> Stopped | None:
    """Train and evaluate the cell whose `config.yaml` lies in `folder`, from wherever it stands.

    stop: opened by the caller, as early as it could. Returns None when the cell is done (also if it already was),
    Stopped when it was told to leave before.
    """
    cell_dir = CellDir(folder)
    if cell_dir.done.exists():
        return None
    with contextlib.ExitStack() as around:
        if stop is None:  # not `stop or`: a flag that is down is false, and a new one knows of no deadline
            stop = around.enter_context(StopFlag())
        cell = CellConfig.load(cell_dir.config)
        assert cell.fold is not None, "dispatch gives every cell its fold"
        try:
            waiting = Lease(cell_dir.path, job=this_job(), stop=lambda: bool(stop)) if world.is_main else None
            lease = around.enter_context(waiting) if waiting else None
        except StoppedWaiting:
            return Stopped(step=cell_dir.newest_step(), signal_name=stop.signal_name or "a stop signal")
        if world.is_main:
            cell_dir.failed.unlink(missing_ok=True)  # of an attempt before
        watchdog = around.enter_context(Watchdog(cell_dir, world.rank, cell.engine.hang_s))
        gpus = world.size if cell.engine.device == "cuda" else 0
        tracker = Tracker(
            cell_dir,
            cell.train.iterations,
            active=world.is_main,
            ranks=world.size,
            gpus=gpus,
            mirrors=Mirrors(cell.train.track, cell_dir, cell.settings),
        )
        tracker.phase("starting", 0)
        # Not when something failed: NCCL's own farewell may hang then, and hide why. The process ends anyway.
        around.push(lambda kind, *_: leave() if kind is None else None)
        work = _train_by_its_own_trainer if cell.model_class.trainer else _train_and_evaluate
        stopped = work(cell, cell_dir, world, tracker, stop, watchdog.alive, lease)
    if stopped:
        tracker.say(
            f"stopped by {stopped.signal_name} after step {stopped.step}, saved; the same command goes on from there"
        )
    return stopped


def build_model(cell: CellConfig) -> Model:
    """The cell's model, initialised from its seed, with staged weights where the config says so."""
    seed_everything(cell.seed, "init")
    return cell.model_class(cell.model, cell.weights_dir)


def _train_and_evaluate(
    cell: CellConfig,
    cell_dir: CellDir,
    world: World,
    tracker: Tracker,
    stop: StopFlag,
    alive: Callable[[str], None],
    lease: Lease | None,
) -> Stopped | None:
    assert cell.fold is not None
    start_ranks(cell, world)
    data = FoldData.open(cell, cell.fold, cell_dir.run.folds)
    folder = cell_dir.checkpoints
    model = build_model(cell)
    frozen = checkpoint.store_frozen(cell_dir.run.frozen, frozen_parameters(model)) if world.is_main else None
    barrier()  # a stored file that was damaged is whole again now
    resumed = _newest(cell, cell_dir, tracker.say)
    start = resumed.step if resumed else 0
    tracker.resumed(start)
    if world.is_main:
        checkpoint.set_aside_after(folder, start)
        frozen = resumed.meta["frozen"] if resumed else frozen
    schedule = Schedule(cell.train, sum(data.repeats), resumed.meta.get("schedule") if resumed else None)
    engine = Engine(cell, world, model, resumed)
    owed = resumed is not None and resumed.meta.get("validation") is None
    del resumed  # as large as the model and the optimizer's state
    trained = sum(p.numel() for p in engine.trained.values())
    tracker.say(
        f"{type(model).__name__}: {engine.parameters:,} parameters, {trained:,} trained; {_images(data)}; "
        f"{engine.facts}; code {Path(__file__).parent}"
    )

    def still_alive(where: str) -> None:
        alive(where)
        tracker.alive()

    def keep_going() -> bool:
        still_alive("decoding images")
        return not stop

    how = Predicting(device=engine.device, autocast=engine.autocast, stop=lambda: bool(stop), alive=still_alive)

    def validate() -> dict[str, float] | None:
        with engine.predictor() as current:
            return validation_metrics(cell, current, data, how, world)

    def tune() -> float | None:
        with engine.predictor() as current:
            return tuning_loss(cell, current, data, how, world)

    if not cell.data.stream:
        decode(cell, data, keep_going, tracker.say)
    if cell.loader.features:
        with contextlib.suppress(DecodingStopped):  # the trainer leaves before it would need them
            data = replace(
                data,
                features=compute_features(
                    cell, model, data, engine.device, engine.autocast, keep_going=keep_going, say=tracker.say
                ),
            )
    saver = _saver(cell, folder, tracker, lease)
    ledger = Ledger(cell_dir, world, from_main(tracker.attempt), start)
    if owed and cell.train.validate_every and start % cell.train.validate_every == 0 and not any_rank(bool(stop))[0]:
        with tracker.spending("validate"):  # a stop signal came before it
            metrics = validate()
        if metrics:
            tracker.validation(start, metrics)
            if world.is_main:
                try:
                    checkpoint.note_validation(cell_dir.checkpoint(start), metrics)
                except OSError as error:  # a full disk: the next save says what that means
                    tracker.say(f"the validation of step {start} could not be noted beside its checkpoint: {error}")
    job = Job(
        tracker=tracker,
        ledger=ledger,
        stop=stop,
        alive=alive,
        saver=saver,
        validate=validate,
        tune=tune,
    )
    with saver, ledger:
        ended = train(cell, engine, data, world, job, schedule, start, frozen)
    if isinstance(ended, Stopped):
        return ended
    with engine.predictor() as final:
        return _evaluate(cell, final, data, cell_dir, ended, how, world, tracker, stop, lease)


def _train_by_its_own_trainer(
    cell: CellConfig,
    cell_dir: CellDir,
    world: World,
    tracker: Tracker,
    stop: StopFlag,
    alive: Callable[[str], None],
    lease: Lease | None,
) -> Stopped | None:
    """The same for a model whose package brings its trainer; what is around it, and the evaluation, are ours."""
    assert cell.fold is not None
    assert cell.model_class.trainer is not None
    start_ranks(cell, world)
    data = FoldData.open(cell, cell.fold, cell_dir.run.folds)
    folder = cell_dir.checkpoints
    model = build_model(cell)
    resumed = _newest(cell, cell_dir, tracker.say)
    start = resumed.step if resumed else 0
    tracker.resumed(start)
    checkpoint.set_aside_after(folder, start)

    def still_alive(where: str) -> None:
        alive(where)
        tracker.alive()

    trainer = importlib.import_module(cell.model_class.trainer)
    with _saver(cell, folder, tracker, lease) as saver:
        ended = trainer.train(cell, model, data, cell_dir, resumed, saver, tracker, stop, still_alive)
    if isinstance(ended, Stopped):
        return ended
    device = torch.device(cell.engine.device)
    how = Predicting(device=device, autocast=contextlib.nullcontext, stop=lambda: bool(stop), alive=still_alive)
    return _evaluate(cell, model.to(device), data, cell_dir, ended, how, world, tracker, stop, lease)


def _newest(cell: CellConfig, cell_dir: CellDir, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from, its own or the one that `train.weights_from` names. All ranks call it.

    Raises: ResumeError for one of other settings, and for weights that were taken over and cannot be read.
    """
    if cell.train.weights_from:
        from_main_or_raise(lambda: take_over(cell, cell_dir, say))
    folder = cell_dir.checkpoints
    found = checkpoint.newest(folder, cell_dir.run.frozen, say)
    if found:
        _refuse_other_settings(cell, found)
        say(f"resumed from {found.path.name}")
    elif cell.train.weights_from:
        raise ResumeError(f"the weights that were taken over cannot be read from {folder}; mend that and resume")
    return found


def _saver(cell: CellConfig, folder: Path, tracker: Tracker, lease: Lease | None) -> Saver:
    rule = Retention(
        keep=cell.train.keep,
        every=cell.train.keep_every,
        best=cell.train.keep_best,
        more=cell.train.keep_best is None or METRICS[cell.train.keep_best].more_is_better,
    )
    return Saver(folder, rule, lease.check if lease else lambda: None, tracker.say)


def _evaluate(
    cell: CellConfig,
    model: Model,
    data: FoldData,
    cell_dir: CellDir,
    step: int,
    how: Predicting,
    world: World,
    tracker: Tracker,
    stop: StopFlag,
    lease: Lease | None,
) -> Stopped | None:
    """Score the weights of `step`, and write DONE; Stopped where a stop signal came before."""
    tracker.phase("evaluating", step)
    with tracker.spending("evaluate"):
        rows = evaluate(cell, model, data, cell_dir, step, how, world, tracker.say)
        if rows is not None and not evaluate_external(cell, model, data, cell_dir, step, how, world, tracker.say):
            rows = None
        if rows is not None and world.is_main:
            explain(cell, model, data, cell_dir, how, tracker.say)
    if rows is None:
        tracker.phase("stopped", step)
        return Stopped(step=step, signal_name=stop.signal_name or "a signal on another rank")
    barrier()
    if world.is_main:
        assert lease is not None, "rank 0 holds it"
        lease.check()
        done = DoneRecord(
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            step=step,
            config=cell.hash,
            rows=len(rows),
            parameters=model.parameter_count(),
        )
        done.write(cell_dir.done)
        forget(cell_dir)
        tracker.phase("done", step)
    return None


def _images(data: FoldData) -> str:
    """How many images each part has, for the log."""
    draws, synthetic = sum(data.repeats), sum(record.key.startswith(PREFIX) for record in data.train)
    train = f"{len(data.train)} training" + (f" ({synthetic} synthetic)" if synthetic else "")
    train += f" (drawn {draws} times an epoch)" if draws > len(data.train) else ""
    held = f", {len(data.holdout)} held-out training" if data.holdout else ""
    return f"{train}{held} and {len(data.validation)} validation images"


def decode(cell: CellConfig, data: FoldData, keep_going: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Have the node's cache ready, all ranks of the node together, or as far as it got when a stop signal came."""
    with contextlib.suppress(DecodingStopped):  # the trainer leaves before it would need it
        open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader, keep_going=keep_going, log=say)


def _refuse_other_settings(cell: CellConfig, found: Checkpoint) -> None:
    then = found.meta.get("settings")
    if not isinstance(then, dict):
        raise ResumeError(f"{found.path} was written by another version of bushpc; start anew under another name=…")
    changed = [line for line in cell.unlike(then) if line.partition(":")[0] not in cell.resume_changes]
    if changed:
        names = [line.partition(":")[0] for line in changed]
        raise ResumeError(f"{found.path} was written with other settings: {'; '.join(changed)}; {way_on(names)}")
