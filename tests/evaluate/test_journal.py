"""Promises of an evaluation that is stopped: what is done is not done again, and the numbers end the same."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from bushpc.cell import build_model
from bushpc.config import CellConfig
from bushpc.data.loader import FoldData
from bushpc.dist import World
from bushpc.evaluate.evaluate import Evaluation, Predicting, evaluate
from bushpc.models.base import Model
from bushpc.runs.layout import CellDir
from bushpc.sample import Batch, Prediction

STEP = 6


class Counted(torch.nn.Module):
    """A model as it is, that remembers what it was asked."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.asked = model, []

    def predict(self, batch: Batch) -> Prediction:
        self.asked += batch.keys
        return self.model.predict(batch)

    makes = frozenset({"prob_BKHW"})


class Stopping:
    """Tells to leave after so many batches; with None, never."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def __call__(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


def score(cell_dir: Path, stop_after: int | None = None, step: int = STEP) -> tuple[list[str], bool]:
    """Evaluate a cell with weights as initialised. Returns the keys that were predicted, and whether it ended."""
    cell = CellConfig.load(cell_dir / "config.yaml")
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    model = Counted(build_model(cell))
    how = Predicting(
        device=torch.device("cpu"), autocast=contextlib.nullcontext, stop=Stopping(stop_after), alive=lambda _: None
    )
    rows = evaluate(Evaluation(cell, model, data, how, World()), CellDir(cell_dir), step)
    return model.asked, rows is not None


def results(cell_dir: Path) -> list[bytes]:
    files = sorted([*cell_dir.glob("*.csv"), *cell_dir.glob("predictions/**/*.png")])
    assert len(files) == 6  # of 4 images
    return [file.read_bytes() for file in files]


@pytest.fixture
def make(make_cell):
    """Cells of a model that reads no prompts, scored two images at a time."""
    small = ("model=unet_small", "model.image_size=64", "evaluate.batch_size=2", "prompts=none", "also_prompts=[]")
    return lambda name: make_cell(name, *small)


def test_a_stopped_evaluation_goes_on_and_ends_as_one_that_was_not(make):
    whole, stopped = make("whole"), make("stopped")
    asked, ended = score(whole)
    assert ended
    first, ended = score(stopped, stop_after=1)
    assert not ended
    assert first == asked[:2]
    assert not (stopped / "per_image.csv").exists()
    rest, ended = score(stopped)
    assert ended
    assert rest == asked[2:]
    assert results(stopped) == results(whole)


def test_a_line_that_a_kill_cut_off_costs_its_batch_and_nothing_else(make):
    whole, cut = make("whole"), make("cut")
    asked, _ = score(whole)
    score(cut, stop_after=1)
    (journal,) = (cut / "evaluated").glob("*.jsonl")
    journal.write_text(journal.read_text()[:-40])
    rest, ended = score(cut, stop_after=1)  # its lines stand behind the cut one
    assert not ended
    assert rest == asked[:2]
    rest, ended = score(cut)
    assert ended
    assert rest == asked[2:]
    assert results(cut) == results(whole)


def test_what_other_weights_predicted_does_not_count(make):
    cell_dir = make("on")
    asked, _ = score(cell_dir, stop_after=1)
    again, ended = score(cell_dir, step=STEP + 1)
    assert ended
    assert again[: len(asked)] == asked
