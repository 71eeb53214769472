"""One cell from start to end; the only place that assembles data, model, engine, trainer and evaluator.

config.yaml in the cell's folder (bushpc.runs.layout) ─train→ checkpoints ─evaluate→ per-image CSV, DONE
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import time
import typing as t
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bushpc.cluster.base import cluster_for, this_job
from bushpc.config import CellConfig, way_on
from bushpc.data.cache import DecodingStopped, open_cache
from bushpc.data.features import compute_features
from bushpc.data.loader import FoldData
from bushpc.data.mixture import PREFIX
from bushpc.data.staging import open_stage, stage_shards
from bushpc.dist import World, any_rank, barrier, from_main, from_main_or_raise, leave, seed_everything
from bushpc.errors import ResumeError
from bushpc.evaluate.evaluate import Evaluation, Predicting, evaluate, tuning_loss, validation_metrics
from bushpc.evaluate.explain import explain
from bushpc.evaluate.external import evaluate_external
from bushpc.evaluate.journal import forget
from bushpc.models.base import Model, load_imported
from bushpc.runs import checkpoint, frozen_store
from bushpc.runs.checkpoint import Checkpoint
from bushpc.runs.frozen_store import frozen_parameters
from bushpc.runs.layout import CellDir
from bushpc.runs.lease import Lease, StoppedWaiting
from bushpc.runs.records import DoneRecord
from bushpc.train.context import CellContext
from bushpc.train.engine import Engine, start_ranks
from bushpc.train.fine_tune import freeze
from bushpc.train.ledger import Ledger
from bushpc.train.loop import Services, Stopped, train
from bushpc.train.mirrors import Mirrors
from bushpc.train.optim import Schedule
from bushpc.train.preempt import StopFlag
from bushpc.train.start import load_start
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
        start_ranks(cell, world)
        data = FoldData.open(cell, cell.fold, cell_dir.run.folds)
        at = CellContext(cell, cell_dir, world, tracker, stop, watchdog.alive, lease, data)
        scratch = cluster_for(cell.cluster.executor).scratch
        stage = open_stage(cell.cluster.staging, scratch=scratch, keep_going=at.keep_going, say=_say_on_each_node(at))
        with contextlib.suppress(DecodingStopped):  # the trainer leaves before it would need them
            cell, data = stage_shards(cell, data, stage)
        at = replace(at, cell=cell, data=data, stage=stage)
        stopped = _work_of_its_own_trainer(at) if cell.model_class.trainer else _work(at)
    if stopped:
        tracker.say(
            f"stopped by {stopped.signal_name} after step {stopped.step}, saved; the same command goes on from there"
        )
    return stopped


def build_model(cell: CellConfig) -> Model:
    """The cell's model, initialised from its seed, with staged and imported weights where the config says so."""
    seed_everything(cell.seed, "init")
    model: Model = cell.model_class(cell.model, cell.weights_dir)
    load_imported(model)
    freeze(model, cell.train.freeze)
    return model


def _work(at: CellContext) -> Stopped | None:
    """Train with our loop, then evaluate."""
    cell, data, tracker, main = at.cell, at.data, at.tracker, at.world.is_main
    model = build_model(cell)
    start_of_training = load_start(cell, model)
    frozen = frozen_store.store_frozen(at.dir.run.frozen, frozen_parameters(model)) if main else None
    barrier()  # a stored file that was damaged is whole again now
    resumed, start = resume(at)
    if not resumed:
        start_of_training.require(tracker.say)
    if main and resumed:
        frozen = resumed.meta["frozen"]
    schedule = Schedule(cell.train, sum(data.repeats), resumed.meta.get("schedule") if resumed else None)
    engine = Engine(cell, at.world, model, resumed)
    owed = resumed is not None and resumed.meta.get("validation") is None
    del resumed  # as large as the model and the optimizer's state
    trained = sum(p.numel() for p in engine.trained.values())
    tracker.say(
        f"{type(model).__name__}: {engine.parameters:,} parameters, {trained:,} trained; {_images(data)}; "
        f"{engine.facts}; code {Path(__file__).parent}"
    )

    def validate() -> dict[str, float] | None:
        with engine.predictor() as current:
            return validation_metrics(evaluation(at, current, engine.device, engine.autocast))

    def tune() -> float | None:
        with engine.predictor() as current:
            return tuning_loss(evaluation(at, current, engine.device, engine.autocast))

    if not cell.data.stream:
        decode(cell, data, at.keep_going, tracker.say)
    if cell.loader.features:
        with contextlib.suppress(DecodingStopped):  # the trainer leaves before it would need them
            features = compute_features(
                cell,
                model,
                data,
                engine.device,
                engine.autocast,
                keep_going=at.keep_going,
                say=tracker.say,
                stage=at.stage,
            )
            data = replace(data, features=features)
    at = replace(at, data=data)
    if owed:
        _validate_as_owed(at, start, validate)
    ledger = Ledger(at.dir, at.world, from_main(tracker.attempt), start)
    with at.saver() as saver, ledger:
        services = Services(
            tracker=tracker,
            ledger=ledger,
            stop=at.stop,
            alive=at.alive,
            saver=saver,
            validate=validate,
            tune=tune,
        )
        ended = train(cell, engine, data, at.world, services, schedule, start, frozen)
    if isinstance(ended, Stopped):
        return ended
    with engine.predictor() as final:
        return score(at, evaluation(at, final, engine.device, engine.autocast), ended)


def _say_on_each_node(at: CellContext) -> Callable[[str], None]:
    """What a node's own disk lacks is said once per node."""
    if at.world.is_main or at.world.local_rank:
        return at.tracker.say  # silent on all ranks but the first
    return lambda line: print(f"{socket.gethostname()}: {line}", flush=True)


def _validate_as_owed(at: CellContext, step: int, validate: Callable[[], dict[str, float] | None]) -> None:
    """Make the validation of the step resumed from, if a stop signal came before it."""
    every = at.cell.train.validate_every
    if not every or step % every or any_rank(bool(at.stop))[0]:
        return
    with at.tracker.spending("validate"):
        metrics = validate()
    if metrics:
        at.tracker.validation(step, metrics)
        if at.world.is_main:
            try:
                checkpoint.note_validation(at.dir.checkpoint(step), metrics)
            except OSError as error:  # a full disk: the next save says what that means
                at.tracker.say(f"the validation of step {step} could not be noted beside its checkpoint: {error}")


def _work_of_its_own_trainer(at: CellContext) -> Stopped | None:
    """The same for a model whose package brings its trainer; resuming and evaluation are ours."""
    cell, trainer = at.cell, at.cell.model_class.trainer
    assert trainer is not None
    model = build_model(cell)
    resumed, _ = resume(at)
    with at.saver() as saver:
        ended = importlib.import_module(trainer).train(at, model, resumed, saver)
    if isinstance(ended, Stopped):
        return ended
    device = torch.device(cell.engine.device)
    return score(at, evaluation(at, model.to(device), device, contextlib.nullcontext), ended)


def resume(at: CellContext) -> tuple[Checkpoint | None, int]:
    """The checkpoint to resume from, its own or that of `train.weights_from`, and its step. All ranks call it.

    Raises: ResumeError for one of other settings, and for weights that were taken over and cannot be read.
    """
    cell, folder, say = at.cell, at.dir.checkpoints, at.tracker.say
    if cell.train.weights_from:
        from_main_or_raise(lambda: take_over(cell, at.dir, say))
    found = checkpoint.newest(folder, at.dir.run.frozen, say)
    if found:
        _refuse_other_settings(cell, found)
        say(f"resumed from {found.path.name}")
    elif cell.train.weights_from:
        raise ResumeError(f"the weights that were taken over cannot be read from {folder}; mend that and resume")
    start = found.step if found else 0
    at.tracker.resumed(start)
    if at.world.is_main:
        checkpoint.set_aside_after(folder, start)
    return found, start


def evaluation(
    at: CellContext, model: Model, device: torch.device, autocast: Callable[[], t.ContextManager[t.Any]]
) -> Evaluation:
    """The cell's data with these weights, to be scored. autocast: opens the context of the precision."""
    how = Predicting(device=device, autocast=autocast, stop=lambda: bool(at.stop), alive=at.still_alive)
    return Evaluation(at.cell, model, at.data, how, at.world, at.tracker.say)


def score(at: CellContext, what: Evaluation, step: int) -> Stopped | None:
    """Evaluate the weights of `step` and write DONE; Stopped if a stop signal came before."""
    tracker = at.tracker
    tracker.phase("evaluating", step)
    with tracker.spending("evaluate"):
        rows = evaluate(what, at.dir, step)
        if rows is not None and not evaluate_external(what, at.dir, step):
            rows = None
        if rows is not None and at.world.is_main:
            explain(what, at.dir.explain)
    if rows is None:
        tracker.phase("stopped", step)
        return Stopped(step=step, signal_name=at.stop.signal_name or "a signal on another rank")
    barrier()
    if at.world.is_main:
        assert at.lease is not None, "rank 0 holds it"
        at.lease.check()
        done = DoneRecord(
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            step=step,
            config=at.cell.hash,
            rows=len(rows),
            parameters=what.model.parameter_count(),
        )
        done.write(at.dir.done)
        forget(at.dir)
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
