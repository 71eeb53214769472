"""Promises of one cell: it ends with everything it owes, and a death at any time changes nothing in the end."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bushpc.cell import run_cell
from bushpc.config import CellConfig
from bushpc.data.batches import validation_batches
from bushpc.data.loader import FoldData
from bushpc.dist import World, meet
from bushpc.errors import ResumeError, TrainingError
from bushpc.models.xbusnet import XBusNet
from bushpc.train.ledger import read_ledger
from bushpc.train.loop import Stopped
from bushpc.train.preempt import TIME_LIMIT, StopFlag
from bushpc.train.track import Tracker
from tests.ranks import RANKS


def final_weights(cell_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((cell_dir / "checkpoints").glob("step_*"))[-1] / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = final_weights(a), final_weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows_of(cell_dir: Path) -> list[dict[str, str]]:
    with (cell_dir / "per_image.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_finished_cell_has_all_it_owes(make_cell):
    cell_dir = make_cell("whole")
    assert run_cell(cell_dir, World()) is None
    assert json.loads((cell_dir / "DONE").read_text())["step"] == 6
    rows = rows_of(cell_dir)
    assert {row["prompts"] for row in rows} == {"first_pass", "oracle", "none"}
    validation = {row["key"] for row in rows}
    assert len(rows) == 3 * len(validation)
    for source in ("first_pass", "oracle", "none"):
        assert {path.stem for path in (cell_dir / "predictions" / source).iterdir()} == validation
    steps = [json.loads(line)["step"] for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert json.loads((cell_dir / "state.json").read_text())["phase"] == "done"


def test_a_model_without_prompts_runs_through_the_same_door(make_cell):
    cell_dir = make_cell("unet", "model=unet_small", "model.image_size=64")
    run_cell(cell_dir, World())
    assert {row["prompts"] for row in rows_of(cell_dir)} == {"none"}


# Noise in training and in predictions, averaged weights, and a loss that follows the epochs.
DIFFUSION = (
    *("model=vit_diffusion_small", "model.image_size=32", "model.widths=[8,16]", "model.topo_weight=0.1"),
    *("model.topo_ramp=1", "model.inference=generative", "model.sampler=ddpm", "model.steps=2", "model.samples=2"),
)


@pytest.mark.parametrize("overrides", [(), DIFFUSION], ids=["xbusnet", "diffusion"])
def test_a_stop_signal_saves_and_the_next_start_ends_with_the_same_weights(make_cell, monkeypatch, overrides):
    undisturbed, disturbed = make_cell("undisturbed", *overrides), make_cell("disturbed", *overrides)
    run_cell(undisturbed, World())
    log_step = Tracker.train

    def log_and_be_preempted(self, step, *args) -> None:
        log_step(self, step, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "train", log_and_be_preempted)
        for step in (1, 2):
            # The signal came after the vote of its step, so the next one is the last.
            assert run_cell(disturbed, World()) == Stopped(step=2 * step, signal_name="SIGTERM")
            assert not (disturbed / "DONE").exists()
    assert json.loads((disturbed / "state.json").read_text())["phase"] == "stopped"
    assert run_cell(disturbed, World()) is None
    assert_same_weights(undisturbed, disturbed)
    assert rows_of(undisturbed) == rows_of(disturbed)


def child(cell_dir: Path) -> None:
    torch.set_num_threads(1)
    run_cell(cell_dir, World())


def test_kill_9_costs_the_steps_since_the_last_checkpoint_and_nothing_else(make_cell):
    undisturbed, disturbed = make_cell("undisturbed"), make_cell("disturbed")
    whole = RANKS.Process(target=child, args=(undisturbed,))
    whole.start()
    killed = RANKS.Process(target=child, args=(disturbed,))
    killed.start()
    deadline = time.monotonic() + 120
    while not list((disturbed / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert not (disturbed / "DONE").exists()
    again = RANKS.Process(target=child, args=(disturbed,))
    again.start()
    for process in (whole, again):
        process.join()
        assert process.exitcode == 0
    assert_same_weights(undisturbed, disturbed)
    assert rows_of(undisturbed) == rows_of(disturbed)


def ranked_child(cell_dir: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    world = World(rank=rank, size=size, local_rank=rank)
    meet(world, cell_dir, "test")
    run_cell(cell_dir, world)


@pytest.mark.real
def test_two_ranks_train_together_and_score_every_image_once(make_cell):
    cell_dir = make_cell("two", "cluster.ranks_per_node=2")
    ranks = [RANKS.Process(target=ranked_child, args=(cell_dir, rank, 2)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    [newest, _] = sorted((cell_dir / "checkpoints").glob("step_*"), reverse=True)
    assert json.loads((newest / "meta.json").read_text())["world"] == 2
    by_two = {(row["key"], row["prompts"]): float(row["dice"]) for row in rows_of(cell_dir)}
    assert len(rows_of(cell_dir)) == len(by_two) == 3 * len(list((cell_dir / "predictions" / "first_pass").iterdir()))
    with (cell_dir / "calibration.csv").open() as file:
        assert sum(int(row["pixels"]) for row in csv.DictReader(file)) == len(by_two) * 64 * 64

    # Both ranks predicted with what the checkpoint holds, BatchNorm's running statistics included.
    for name in ("DONE", "per_image.csv"):
        (cell_dir / name).unlink()
    run_cell(cell_dir, World())
    by_one = {(row["key"], row["prompts"]): float(row["dice"]) for row in rows_of(cell_dir)}
    assert by_one == pytest.approx(by_two, abs=0.01)


def test_resume_with_other_settings_is_refused(make_cell):
    cell_dir = make_cell("other")
    run_cell(cell_dir, World())
    (cell_dir / "DONE").unlink()
    config = (cell_dir / "config.yaml").read_text()
    (cell_dir / "config.yaml").write_text(config.replace("weight_decay: 0.01", "weight_decay: 0.1", 1))
    with pytest.raises(ResumeError, match=r"other settings: .*→ 0\.1.*resume_changes=\[train\.weight_decay\]"):
        run_cell(cell_dir, World())
    (cell_dir / "config.yaml").write_text(config.replace("seed: 0", "seed: 1", 1))
    with pytest.raises(ResumeError, match=r"other settings: seed: 0 → 1.*skip some.*start again"):
        run_cell(cell_dir, World())


def test_a_setting_that_is_allowed_by_name_may_change(make_cell):
    cell_dir = make_cell("longer")
    run_cell(cell_dir, World())
    (cell_dir / "DONE").unlink()
    config = (cell_dir / "config.yaml").read_text().replace("iterations: 6", "iterations: 8", 1)
    (cell_dir / "config.yaml").write_text(config.replace("resume_changes: []", "resume_changes: [train.iterations]", 1))
    assert run_cell(cell_dir, World()) is None
    assert json.loads((cell_dir / "DONE").read_text())["step"] == 8
    steps = [json.loads(line)["step"] for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_stop_during_evaluation_leaves_at_once_and_the_next_start_evaluates(make_cell, monkeypatch):
    cell_dir = make_cell("evaluating", "evaluate.batch_size=1")
    predict = XBusNet.predict

    def predict_and_be_preempted(self, batch):
        os.kill(os.getpid(), signal.SIGUSR2)
        return predict(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(XBusNet, "predict", predict_and_be_preempted)
        assert run_cell(cell_dir, World()) == Stopped(step=6, signal_name="SIGUSR2")
    assert not (cell_dir / "per_image.csv").exists()
    assert len(list((cell_dir / "predictions" / "first_pass").iterdir())) == 1
    assert run_cell(cell_dir, World()) is None
    assert (cell_dir / "DONE").exists()


def test_a_stop_during_start_up_leaves_before_the_first_step(make_cell):
    cell_dir = make_cell("starting")
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert run_cell(cell_dir, World(), stop) == Stopped(step=0, signal_name="SIGTERM")
    assert not list((cell_dir / "checkpoints").glob("step_*"))


def test_the_time_limit_that_a_job_knows_stops_its_cell(make_cell, monkeypatch):
    cell_dir = make_cell("limited")
    log_step = Tracker.train
    with StopFlag() as stop:

        def and_time_is_up(self, *args):
            log_step(self, *args)
            stop.deadline = time.time()

        monkeypatch.setattr(Tracker, "train", and_time_is_up)
        stopped = run_cell(cell_dir, World(), stop)
    assert stopped.signal_name == TIME_LIMIT
    assert 1 <= stopped.step < 6


def test_the_best_checkpoint_by_a_validation_is_kept_besides_the_newest(make_cell):
    overrides = (
        "train.validate_every=2",
        "train.keep=1",
        "train.keep_best=dice",
        "train.save_every=3",
        "train.ema=0.5",
    )
    cell_dir = make_cell("best", *overrides)
    run_cell(cell_dir, World())
    lines = [json.loads(line) for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    dice = {line["step"]: line["dice"] for line in lines if line["kind"] == "validation"}
    best = max(dice, key=lambda step: dice[step])
    kept = {int(path.name.removeprefix("step_")) for path in (cell_dir / "checkpoints").glob("step_*")}
    assert kept == {best, 6}


def stop_before_validation_of_step_2(cell_dir, monkeypatch) -> None:
    """The signal comes after the vote of step 1, so step 2 is the last, and is saved without its validation."""
    log_step = Tracker.train

    def log_and_be_preempted(self, step, *args) -> None:
        log_step(self, step, *args)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "train", log_and_be_preempted)
        assert run_cell(cell_dir, World()) == Stopped(step=2, signal_name="SIGTERM")


def test_a_validation_that_a_stop_signal_came_before_is_made_up_for(make_cell, monkeypatch):
    cell_dir = make_cell("owed", "train.validate_every=2")
    stop_before_validation_of_step_2(cell_dir, monkeypatch)
    run_cell(cell_dir, World())
    lines = [json.loads(line) for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, 4, 6]


def test_the_best_checkpoint_is_kept_though_a_stop_signal_came_before_its_validation(make_cell, monkeypatch):
    cell_dir = make_cell("owed_best", "train.validate_every=2", "train.keep=1", "train.keep_best=dice")
    dice = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr("bushpc.cell.validation_metrics", lambda *_: {"dice": next(dice)})
    stop_before_validation_of_step_2(cell_dir, monkeypatch)
    run_cell(cell_dir, World())
    kept = {int(path.name.removeprefix("step_")) for path in (cell_dir / "checkpoints").glob("step_*")}
    assert kept == {2, 6}


TUNED = (  # 16 training scans, 4 of them held out: an epoch is 3 steps
    *("model=unet_small", "model.image_size=32", "train.iterations=60", "train.batch_size=4", "train.save_every=4"),
    *("train.schedule=plateau", "train.plateau_patience=1", "train.stop_patience=2", "train.holdout=0.25"),
    "train.warmup=0",
)


def lines_of(cell_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines if line["kind"] == kind]


def test_a_plateau_and_an_early_stop_come_at_the_same_steps_however_often_a_run_was_preempted(make_cell, monkeypatch):
    losses = {3: 1.0, 6: 0.5, 9: 0.7, 12: 0.4, 15: 0.5, 18: 0.6}

    def measured(at) -> float:
        cell = at.cell
        return losses[lines_of(Path(cell.runs_dir) / cell.name / "cells" / "fold0", "train")[-1]["step"]]

    monkeypatch.setattr("bushpc.cell.tuning_loss", measured)
    undisturbed, disturbed = make_cell("tuned", *TUNED), make_cell("tuned_disturbed", *TUNED)
    run_cell(undisturbed, World())
    assert [(line["step"], line["loss"]) for line in lines_of(undisturbed, "tuning")] == list(losses.items())
    assert json.loads((undisturbed / "DONE").read_text())["step"] == 18
    rates = {line["step"]: line["lr"] for line in lines_of(undisturbed, "train")}
    assert rates[9] / rates[10] == pytest.approx(4)
    assert rates[15] / rates[16] == pytest.approx(4)

    log_step = Tracker.train

    def log_and_be_preempted(self, step, *args) -> None:
        log_step(self, step, *args)
        if step in (2, 7, 11, 17):  # the step after it is the last: 3, 12 and 18 end an epoch, 8 does not
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "train", log_and_be_preempted)
        stops = [run_cell(disturbed, World()) for _ in range(4)]
    assert [stopped.step for stopped in stops] == [3, 8, 12, 18]
    run_cell(disturbed, World())
    assert json.loads((disturbed / "DONE").read_text())["step"] == 18
    assert_same_weights(undisturbed, disturbed)


def test_the_held_out_loss_is_the_models_own_on_samples_that_never_train(make_cell):
    cell_dir = make_cell("held", *TUNED, "train.iterations=4", "train.save_every=1", "train.keep=9")
    run_cell(cell_dir, World())
    [line] = lines_of(cell_dir, "tuning")
    cell = CellConfig.load(cell_dir / "config.yaml")
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    drawn = {word.partition(":")[2] for text in read_ledger(cell_dir) for word in text.samples.split(" ")}
    assert not drawn & {record.key for record in data.holdout}
    model = cell.model_class(cell.model)
    model.load_state_dict(load_file(cell_dir / "checkpoints" / "step_00000003" / "model.safetensors"))
    model.eval()
    with torch.no_grad():
        [batch] = validation_batches(cell, data, "none", World(), data.holdout)
        assert line["loss"] == pytest.approx(float(model(batch.to("cpu")).total), rel=1e-5)
    assert sorted(batch.keys) == sorted(record.key for record in data.holdout)


def test_a_non_finite_loss_stops_with_step_samples_and_terms(make_cell):
    cell_dir = make_cell("nan", "train.lr=1e30", "train.grad_clip=0")
    with pytest.raises(TrainingError, match=r"not finite at step \d+: samples phantom\d+.*dice"):
        run_cell(cell_dir, World())
    assert not (cell_dir / "DONE").exists()
