"""Promise 9: what bushpc of commit 71c433b wrote, this one reads, and gets the same out of it.

files.tar.gz was written by that commit (make.py): two run folders, an export, and what it made of them itself.
"""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bushpc.cell import run_cell
from bushpc.cli import main
from bushpc.config import CellConfig
from bushpc.dist import World

# Probabilities on another machine: sums in another order through a few layers. 8-bit maps round the difference to 1.
PROB = 1e-3


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_rows(ours: list[dict[str, str]], theirs: list[dict[str, str]], tolerance: float) -> None:
    """Words are equal, numbers nearly; columns may have been added."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert their.keys() <= our.keys()
        for column, value in their.items():
            try:
                number = float(value)
            except ValueError:
                assert our[column] == value, column
            else:
                assert math.isnan(number) or float(our[column]) == pytest.approx(
                    number, abs=tolerance, rel=tolerance
                ), column


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_status_knows_what_is_done_and_how_far_the_stopped_cell_came(old, capsys):
    main(["status", str(old / "runs" / "sam"), "--json"])
    cells = {cell["name"]: cell for cell in json.loads(capsys.readouterr().out)["cells"]}
    assert [(name, cell["state"], cell["step"], cell["total"]) for name, cell in cells.items()] == [
        ("fold0", "done", 12, 12),
        ("fold1", "missing", 4, 9),
    ]


@pytest.mark.parametrize("run", ["sam", "text"])
def test_settings_keep_their_hash_so_that_nothing_is_trained_again(old, run):
    for cell in json.loads((old / "runs" / run / "run.json").read_text())["cells"]:
        config = CellConfig.load(old / "runs" / run / "cells" / cell["name"] / "config.yaml")
        assert config.hash == cell["hash"]
    done = old / "runs" / run / "cells" / "fold0"
    before = contents(done)
    assert run_cell(done, World()) is None
    assert contents(done) == before


def test_a_report_has_the_same_figures(old):
    assert main(["report", str(old / "runs" / "sam")]) == 0
    ours = json.loads((old / "runs" / "sam" / "report" / "summary.json").read_text())
    theirs = json.loads((old / "expected" / "sam" / "summary.json").read_text())
    assert ours["metrics"] == theirs["metrics"]


def test_a_report_on_old_rows_of_every_prompt_source(old):
    assert main(["report", str(old / "runs" / "text")]) == 0
    summary = json.loads((old / "runs" / "text" / "report" / "summary.json").read_text())
    table = rows(old / "runs" / "text" / "cells" / "fold0" / "per_image.csv")
    for source in ("first_pass", "oracle", "none"):
        dice = [float(row["dice"]) for row in table if row["prompts"] == source]
        assert summary["metrics"][source]["dice"]["per_fold"]["0"] == pytest.approx(np.mean(dice))


def test_an_audit_reads_the_old_ledger_and_weights(old, capsys):
    status = main(["audit", str(old / "runs" / "text"), "--json"])
    audit = json.loads(capsys.readouterr().out)
    assert (status, audit["ok"]) == (0, True)
    assert [(cell["name"], cell["steps"], cell["verdict"]) for cell in audit["cells"]] == [
        ("fold0", 4, "exact"),
        ("fold1", 0, "no steps yet"),
    ]


@pytest.mark.parametrize("source", ["runs/sam", "export"])
def test_a_run_and_an_export_predict_what_they_predicted(old, source):
    out, expected = old / "predicted", old / "expected" / "predict"
    assert main(["predict", str(old / source), str(old / "images"), str(out), "--prob"]) == 0
    for theirs in sorted((expected / "probabilities").iterdir()):
        ours = np.asarray(Image.open(out / "probabilities" / theirs.name)).astype(int)
        before = np.asarray(Image.open(theirs)).astype(int)
        assert abs(ours - before).max() <= 1
        masks = [np.asarray(Image.open(folder / "masks" / theirs.name)) for folder in (out, expected)]
        assert (masks[0] == masks[1])[abs(before - 127.5) > 2].all()
    ours, theirs = rows(out / "predictions.csv"), rows(expected / "predictions.csv")
    named = ("file", "status", "height", "width", "class")
    assert [[row[name] for name in named] for row in ours] == [[row[name] for name in named] for row in theirs]


def test_an_export_holds_the_old_weights(old):
    assert main(["export", str(old / "runs" / "sam"), str(old / "again")]) == 0
    ours, theirs = (load_file(old / folder / "fold0" / "model.safetensors") for folder in ("again", "export"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_trains_only_the_stopped_cell_which_ends_as_one_that_nothing_stopped(old, capsys):
    run = old / "runs" / "sam"
    cell, done = run / "cells" / "fold1", contents(run / "cells" / "fold0")
    start = load_file(cell / "checkpoints" / "step_00000004" / "model.safetensors")
    assert main(["resume", str(run)]) == 0
    deadline = time.monotonic() + 600
    while not (cell / "DONE").exists():
        assert not (cell / "FAILED").exists(), (cell / "FAILED").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert contents(run / "cells" / "fold0") == done
    assert json.loads((cell / "DONE").read_text())["step"] == 9
    ours = load_file(cell / "checkpoints" / "step_00000009" / "model.safetensors")
    theirs = load_file(old / "expected" / "sam" / "fold1" / "model.safetensors")
    assert ours.keys() == theirs.keys() == start.keys()
    # On the machine that wrote them they are equal bit for bit. Elsewhere rounding decides the sign of steps whose
    # gradient is nearly zero (Adam), so what counts is how far apart they are beside the way that they went.
    apart, way = (
        math.sqrt(sum(float((ours[name].float() - of[name].float()).norm() ** 2) for name in ours))
        for of in (theirs, start)
    )
    assert apart < 0.1 * way
    expected = rows(old / "expected" / "sam" / "fold1" / "per_image.csv")
    assert_same_rows(rows(cell / "per_image.csv"), expected, 0.05)


@pytest.mark.parametrize("run", ["sam", "text"])
def test_an_old_checkpoint_is_evaluated_as_it_was(old, run):
    cell = old / "runs" / run / "cells" / "fold0"
    for name in ("DONE", "per_image.csv", "calibration.csv"):
        (cell / name).unlink()
    assert run_cell(cell, World()) is None
    assert_same_rows(rows(cell / "per_image.csv"), rows(old / "expected" / run / "fold0" / "per_image.csv"), PROB)
