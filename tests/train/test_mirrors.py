"""Promises of the mirrors: the tools show what metrics.jsonl holds, each step once, and none of them can end a run."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bushpc.cell import run_cell
from bushpc.config import compose
from bushpc.dist import World
from bushpc.errors import ConfigError
from bushpc.train.loop import Stopped
from bushpc.train.mirrors import Mirrors
from bushpc.train.track import Tracker

Curves = dict[str, list[tuple[int, float]]]


def shown(folder: Path) -> Curves:
    """What TensorBoard makes of a folder: tag → (step, value) in the order in which it has them."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_metrics(cell_dir: Path) -> Curves:
    """The same of metrics.jsonl, where of a step that appears twice the later counts."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for line in map(json.loads, (cell_dir / "metrics.jsonl").read_text().splitlines()):
        kind, step = line.pop("kind"), line.pop("step")
        del line["time"]
        for name, value in (line | line.pop("terms", {})).items():
            curves[f"{kind}/{name}"][step] = value
    return {tag: sorted(points.items()) for tag, points in curves.items()}


def attempt(cell_dir: Path, names: list[str], start: int) -> Tracker:
    PartialState(cpu=True)  # as the engine makes it
    cell_dir.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(cell_dir, 10, active=True, mirrors=Mirrors(names, cell_dir, {"train.lr": 1e-3, "seed": None}))
    tracker.resumed(start)
    return tracker


def test_tensorboard_shows_a_run_that_was_preempted_as_metrics_jsonl_has_it(make_cell, monkeypatch):
    cell_dir = make_cell("watched", "model=unet_small", "model.image_size=64", "train.validate_every=2")
    log_step = Tracker.train

    def log_and_be_preempted(self, step, *args) -> None:
        log_step(self, step, *args)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "train", log_and_be_preempted)
    assert isinstance(run_cell(cell_dir, World()), Stopped)
    assert [step for step, _ in shown(cell_dir / "tensorboard")["train/loss"]] == [1, 2]
    assert run_cell(cell_dir, World()) is None
    curves, expected = shown(cell_dir / "tensorboard"), in_metrics(cell_dir)
    assert curves.keys() == expected.keys() >= {"train/loss", "train/dice", "train/lr", "validation/dice"}
    for tag, points in curves.items():
        assert [step for step, _ in points] == [step for step, _ in expected[tag]]
        assert [value for _, value in points] == pytest.approx([value for _, value in expected[tag]], rel=1e-6)
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_steps_that_are_done_again_after_a_death_take_the_place_of_the_lost_ones(tmp_path):
    killed = attempt(tmp_path / "cell", ["tensorboard"], 0)
    for step in range(1, 6):
        killed.train(step, float(step), {}, 1e-3)
    again = attempt(tmp_path / "cell", ["tensorboard"], 3)
    again.validation(3, {"dice": 0.5})  # which its checkpoint had not got yet
    for step in range(4, 8):
        again.train(step, 10.0 * step, {}, 1e-3)
    again.phase("done", 7)
    curves = shown(tmp_path / "cell" / "tensorboard")
    assert curves["train/loss"] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]
    assert curves["validation/dice"] == [(3, 0.5)]


def test_an_attempt_on_a_node_whose_clock_is_behind_still_replaces_the_lost_steps(tmp_path):
    """TensorBoard reads files by name, and a name begins with the time; two attempts within a second are alike."""
    folder, ahead_s = tmp_path / "cell" / "tensorboard", 900
    for start in (0, 2, 4):
        tracker = attempt(tmp_path / "cell", ["tensorboard"], start)
        for step in range(start + 1, start + 4):
            tracker.train(step, 10.0 * start + step, {}, 1e-3)
        tracker.phase("stopped", start + 3)
        newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        *first, second, origin = newest.name.split(".", 4)
        newest.rename(folder / ".".join([*first, f"{int(second) + ahead_s:010d}", origin]))
        ahead_s -= 300
    assert shown(folder)["train/loss"] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 45), (6, 46), (7, 47)]


def test_a_tool_that_fails_says_so_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def fails(self, values, step):
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoardTracker, "log", fails)
    tracker = attempt(tmp_path / "cell", ["tensorboard"], 0)
    for step in range(1, 4):
        tracker.train(step, 0.5, {}, 1e-3)
    tracker.phase("done", 3)
    assert capsys.readouterr().out.count("tensorboard cannot be written: OSError: no space left") == 1
    assert len((tmp_path / "cell" / "metrics.jsonl").read_text().splitlines()) == 3


def test_only_the_main_rank_opens_a_tool(tmp_path):
    tracker = Tracker(tmp_path, 10, active=False, mirrors=Mirrors(["tensorboard"], tmp_path, {}))
    tracker.train(1, 0.5, {}, 1e-3)
    tracker.phase("done", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_tool_that_is_unknown_or_not_installed_is_refused_on_the_login_node(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown tool in train\.track 'wandbb'; did you mean 'wandb'"):
        compose(["data=phantom", "train.track=[wandbb]"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.track names wandb, .* pip install 'bushpc\[wandb\]'"):
        compose(["data=phantom", "train.track=[wandb]"])
    assert compose(["data=phantom", "train.track=[]"]).train.track == ()


@pytest.fixture
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_settings")
def test_mlflow_keeps_all_attempts_in_one_run_in_the_cells_folder(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra bushpc[mlflow] is not installed")
    cell_dir = tmp_path / "run" / "cells" / "fold0"
    for start in (0, 2):
        tracker = attempt(cell_dir, ["mlflow"], start)
        for step in (start + 1, start + 2):
            tracker.train(step, float(step), {}, 1e-3)
        tracker.phase("stopped", start + 2)
    client = mlflow.MlflowClient((cell_dir / "mlruns").as_uri())
    [experiment] = client.search_experiments(filter_string="name = 'run'")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.data.params["train.lr"]) == ("fold0", "0.001")
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.usefixtures("no_settings")
def test_wandb_writes_offline_into_the_cells_folder_under_one_id(tmp_path, capfd):
    pytest.importorskip("wandb", reason="the extra bushpc[wandb] is not installed")
    cell_dir = tmp_path / "run" / "cells" / "fold0"
    for start in (0, 2):
        tracker = attempt(cell_dir, ["wandb"], start)
        tracker.train(start + 1, 0.5, {}, 1e-3)
        tracker.phase("stopped", start + 1)
    files = list((cell_dir / "wandb").glob("offline-run-*/run-run-fold0.wandb"))
    assert files
    assert all(path.stat().st_size > 100 for path in files)
    assert "cannot be written" not in capfd.readouterr().out
