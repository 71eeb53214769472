"""nnU-Net's own trainer, stepped by us: batches and steps are its own, everything around them is as for all models.

    fold ─export→ raw dataset ─its fingerprint, plans, preprocessing→ nnUNetTrainer ─epoch by epoch→ sealed checkpoints

<cell>/nnunet/
  raw/, preprocessed/   what it trains from; deleted when training is over
  prepared              both are whole
  results/Dataset001_<name>/nnUNetTrainer__nnUNetPlans__2d/
    plans.json, dataset.json, fold_0/checkpoint_final.pth: what `nnUNetv2_predict` asks for

nnU-Net saves in place and counts on its pickles; here its state goes into our own checkpoints, at the end of an epoch.
A stop in between loses the steps since: nnU-Net's epochs are minutes, or seconds on a GPU. Each epoch's random numbers
follow from the seed and its number, so with loader.workers=0 a run that was stopped ends with the weights of one that
was not. Those of a worker process follow from the seed, the epoch at which it started and its number: what it makes is
of the seed, and the order in which batches of several arrive is not.
"""

from __future__ import annotations

import json
import math
import os
import typing as t
from collections.abc import Iterator
from pathlib import Path

import torch

from bushpc.config import CellConfig
from bushpc.data.cache import DecodingStopped, open_cache
from bushpc.data.loader import FoldData
from bushpc.data.nnunet_layout import export, list_scans, real_training_part, split
from bushpc.dist import seed_everything
from bushpc.errors import ResumeError, TrainingError
from bushpc.files import write_atomically
from bushpc.runs.checkpoint import Checkpoint
from bushpc.runs.saver import Saver
from bushpc.shards.exchange.to_nnunet import dataset_name
from bushpc.train.context import CellContext
from bushpc.train.ledger import keep_none
from bushpc.train.loop import Stopped
from bushpc.train.nnunet_surroundings import (
    always_the_same_kernels,
    clear,
    surroundings,
    threads_for_processes,
    workers,
)
from bushpc.train.track import Tracker

if t.TYPE_CHECKING:
    from bushpc.models.nnunet import NnUNet

DATASET, SPLIT, CONFIGURATION, PLANS = 1, 0, "2d", "nnUNetPlans"
VALIDATION_SHARE = 5  # nnU-Net has 50 steps of validation to 250 of training


def train(at: CellContext, model: NnUNet, resumed: Checkpoint | None, saver: Saver) -> Stopped | int:
    """Train from where the cell stands to `cell.train.iterations`, and return that; the network is in `model` then.

    Raises: TrainingError for a loss that is not finite, or scans other than the fold's; ResumeError if the last
    checkpoint could not be written, or the one to go on from is of another network.
    """
    cell, data, tracker, stop = at.cell, at.data, at.tracker, at.stop
    start = resumed.step if resumed else 0
    keep_none(at.dir, "unproved: drawn at random")
    folder = at.dir.nnunet
    if resumed and start == cell.train.iterations:
        model.load_state_dict(resumed.parts["model"])
        clear(folder)
        return start

    def stopped(step: int) -> Stopped:
        saver.finish()
        tracker.phase("stopped", step)
        return Stopped(step=step, signal_name=stop.signal_name or "a stop signal")

    with surroundings(cell, folder):
        if not _prepare(at, folder):
            return stopped(start)
        trainer = _trainer(cell, data, folder)
        _take_network(model, trainer)
        if resumed:
            _restore(model, trainer, resumed)
        patch = " x ".join(map(str, trainer.configuration_manager.patch_size))
        tracker.say(
            f"nnU-Net planned {model.parameter_count():,} parameters, patches of {patch} and batches of "
            f"{trainer.batch_size}; {len(data.train)} training and {len(data.validation)} validation images"
        )
        tracker.phase("training", start)
        saved = _run(at, model, trainer, start, saver)
        if saved < cell.train.iterations:
            return stopped(saved)
    saver.finish()
    clear(folder)
    return saved


def _run(at: CellContext, model: NnUNet, trainer: t.Any, start: int, saver: Saver) -> int:
    """nnUNetTrainer.run_training, with what every run of ours does at a step and at an epoch's end.

    Returns the last step that was saved: the last of all, unless a stop signal came.
    """
    cell, tracker = at.cell, at.tracker
    os.environ.update(nnUNet_n_proc_DA=str(cell.loader.workers))  # not before: torch gets as many threads in planning
    with workers(cell, trainer):
        if cell.engine.deterministic:
            always_the_same_kernels(trainer)
        saved, per_epoch = start, trainer.num_iterations_per_epoch
        for epoch in range(trainer.current_epoch, trainer.num_epochs):
            seed_everything(cell.seed, "nnunet", epoch)
            trainer.on_epoch_start()
            trainer.on_train_epoch_start()
            outputs = []
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                if at.stop:
                    return saved
                with tracker.spending("load"):
                    batch = next(trainer.dataloader_train)
                with tracker.spending("step"):
                    outputs.append(trainer.train_step(batch))
                if not math.isfinite(outputs[-1]["loss"]):
                    raise TrainingError(
                        f"the loss of step {step} is {outputs[-1]['loss']}, on {', '.join(batch['keys'])}. Lower "
                        "train.lr; the last checkpoint is from before"
                    )
                tracker.alive(step + 1)
                at.still_alive(f"step {step + 1}")
            trainer.on_train_epoch_end(outputs)
            with torch.no_grad(), tracker.spending("validate"):
                trainer.on_validation_epoch_start()
                batches = (next(trainer.dataloader_val) for _ in range(trainer.num_val_iterations_per_epoch))
                trainer.on_validation_epoch_end([trainer.validation_step(batch) for batch in batches])
            trainer.on_epoch_end()
            done = (epoch + 1) * per_epoch
            _log(trainer, tracker, done)
            if done == cell.train.iterations:
                trainer.disable_checkpointing = False  # the one that nnU-Net's own commands read
                trainer.on_train_end()
            if done - saved >= cell.train.save_every or done == cell.train.iterations:
                with tracker.spending("save"):
                    _save(cell, model, trainer, done, saver)
                saved = done
        return saved


def _log(trainer: t.Any, tracker: Tracker, step: int) -> None:
    """An epoch's line: its mean loss, and what nnU-Net thinks of it on patches of the validation part."""
    newest = {name: float(trainer.logger.get_value(name, -1)) for name in ("train_losses", "val_losses", "lrs")}
    terms = {"validation": newest["val_losses"], "pseudo_dice": float(trainer.logger.get_value("mean_fg_dice", -1))}
    tracker.train(step, newest["train_losses"], terms, newest["lrs"])


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _save(cell: CellConfig, model: NnUNet, trainer: t.Any, step: int, saver: Saver) -> None:
    from nnunetv2.utilities.json_export import recursive_fix_for_json_export

    logging = {name: list(values) for name, values in trainer.logger.get_checkpoint().items()}
    recursive_fix_for_json_export(logging)
    scaler = trainer.grad_scaler.state_dict() if trainer.grad_scaler else None
    meta = {"config": cell.hash, "settings": cell.settings, "frozen": None, "torch": torch.__version__}
    meta |= {"validation": None, "schedule": None, "nnunet": {"logging": logging, "scaler": scaler}}
    saver.still_ours()
    saver.save(step, _tensors(model, trainer), meta)


def _tensors(model: NnUNet, trainer: t.Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        yield "model", name, tensor
    for name, parameter in model.named_parameters():
        momentum = trainer.optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            yield "optimizer", f"momentum_buffer/{name}", momentum


def _restore(model: NnUNet, trainer: t.Any, resumed: Checkpoint) -> None:
    """nnUNetTrainer.load_checkpoint, from a checkpoint of ours. Raises: ResumeError for one of another plan."""
    if not torch.equal(model.blueprint.cpu(), resumed.parts["model"]["blueprint"]):
        raise ResumeError(
            f"{resumed.path} is of a network that nnU-Net planned otherwise: by another version of nnunetv2? Go on "
            "with the one that run.json names, or start anew under another name=…"
        )
    model.load_state_dict(resumed.parts["model"])
    for name, parameter in model.named_parameters():
        momentum = resumed.parts.get("optimizer", {}).get(f"momentum_buffer/{name}")
        if momentum is not None:
            trainer.optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
    of_trainer = resumed.meta["nnunet"]
    trainer.logger.load_checkpoint(of_trainer["logging"])
    if trainer.grad_scaler and of_trainer["scaler"]:
        trainer.grad_scaler.load_state_dict(of_trainer["scaler"])
    trainer.current_epoch = resumed.step // trainer.num_iterations_per_epoch


# --- before and around training -------------------------------------------------------------------------------------


def _prepare(at: CellContext, folder: Path) -> bool:
    """Have nnU-Net's raw and preprocessed dataset and its plans below `folder`; False where a stop signal came."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as nnunet

    if (folder / "prepared").exists():
        return True
    clear(folder)

    cell, data, say = at.cell, at.data, at.tracker.say

    def keep_going() -> bool:
        at.still_alive("preparing images")
        return not at.stop

    threads, quiet = max(1, cell.loader.workers), {"verbose": False, "show_progress_bar": False}
    planned, scans = real_training_part(data, cell.data.normals), [*data.train, *data.validation]
    try:
        cache = open_cache(
            data.manifest, data.folder, cell.model.image_size, cell.loader, keep_going=keep_going, log=say
        )
        say(f"preparing {len(scans)} images for nnU-Net in {folder}; it plans from {len(planned)} real training scans")
        raw = export(data, planned, cache, folder, keep_going)
        with threads_for_processes(at.stop, at.still_alive):
            nnunet.extract_fingerprint_dataset(DATASET, num_processes=threads, **quiet)
            nnunet.plan_experiment_dataset(DATASET)
            for dataset in (raw, folder / "preprocessed" / raw.name):
                list_scans(dataset, data, scans)
            nnunet.preprocess_dataset(DATASET, PLANS, (CONFIGURATION,), (threads,), **quiet)
    except DecodingStopped:
        return False
    write_atomically(folder / "prepared", "")
    return not at.stop


def _trainer(cell: CellConfig, data: FoldData, folder: Path) -> t.Any:
    """nnU-Net's trainer with what this run tells it, and its network. Raises: TrainingError if it has another split."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    preprocessed = folder / "preprocessed" / dataset_name(data.manifest.dataset)
    trainer = nnUNetTrainer(
        plans=json.loads((preprocessed / f"{PLANS}.json").read_text()) | {"continue_training": False},
        configuration=CONFIGURATION,
        fold=SPLIT,
        dataset_json=json.loads((preprocessed / "dataset.json").read_text()),
        device=torch.device(cell.engine.device),
    )
    per_epoch = cell.model.iterations_per_epoch  # type: ignore[attr-defined]
    trainer.num_iterations_per_epoch = per_epoch
    trainer.num_val_iterations_per_epoch = max(1, per_epoch // VALIDATION_SHARE)
    trainer.num_epochs = cell.train.iterations // per_epoch
    trainer.initial_lr, trainer.weight_decay = cell.train.lr, cell.train.weight_decay
    # Its own are pickles written in place, and `best` is chosen on the validation part, which nothing may depend on.
    trainer.disable_checkpointing = True
    trainer.logger.plot_progress_png = lambda folder: None  # seconds an epoch; the curves are in metrics.jsonl
    seed_everything(cell.seed, "init")
    trainer.initialize()
    theirs, ours = trainer.do_split(), split(data)
    if theirs != (ours["train"], ours["val"]):
        raise TrainingError(
            f"nnU-Net would train on {len(theirs[0])} scans and validate on {len(theirs[1])} that are not the fold's "
            f"{len(ours['train'])} and {len(ours['val'])}: {preprocessed / 'splits_final.json'} was changed, or this "
            f"version of nnunetv2 reads another file. Delete {folder} and resume, with the version of constraints.txt"
        )
    if cell.engine.deterministic:  # its cross-entropy has no deterministic kernel on a GPU
        torch.use_deterministic_algorithms(True, warn_only=True)
    return trainer


def _take_network(model: NnUNet, trainer: t.Any) -> None:
    *_, mirroring = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    blueprint: t.Any = {"plans": trainer.plans_manager.plans, "configuration": CONFIGURATION}
    described = {key: value for key, value in trainer.dataset_json.items() if key != "dataset"}  # the list of files
    blueprint |= {"dataset": described, "mirroring": list(mirroring)}
    model.build(blueprint, getattr(trainer.network, "_orig_mod", trainer.network))  # the latter if it was compiled
