"""Promises of `train.weights_from`: one training serves many evaluations, and nobody can tell but by the note of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bushpc.cell import run_cell
from bushpc.config import compose, config_names, differences
from bushpc.dispatch.control import resume, retry
from bushpc.dispatch.plan import Plan, cv_plan, grid_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dispatch.status import read_status
from bushpc.dispatch.status_table import totals_line
from bushpc.dist import World
from bushpc.errors import ConfigError, ResumeError
from bushpc.evaluate.predictor import load
from bushpc.ops.audit import audit_run
from bushpc.report.page import build_report
from bushpc.runs import checkpoint

SMALL = (
    *("model=vit_diffusion_small", "data=phantom", "cluster=local", "model.image_size=32", "model.widths=[32,64]"),
    *("train.iterations=4", "train.batch_size=4", "train.warmup=0", "train.log_every=1", "train.track=[]"),
    *("evaluate.metrics=[dice]", "evaluate.explain=0"),
)
GENERATIVE = ("model.inference=generative", "model.steps=2", "model.samples=2", "evaluate.threshold=0.4")
GRID = """
base: [model=vit_diffusion_small]
rows:
  auxiliary: {set: {model.inference: auxiliary}}
  ddim_2: {set: {model.inference: generative, model.steps: 2}}
  dpm_3: {set: {model.inference: generative, model.sampler: dpm_solver, model.steps: 3}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, phantom_folder) -> tuple[str, ...]:
    """Settings of where all runs of this file lie."""
    folder = tmp_path_factory.mktemp("runs")
    return f"data.root={phantom_folder}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}"


def written(plan: Plan) -> Path:
    """The run folder, as a submission leaves it; nothing is queued."""
    write_run(plan.first.run_dir, plan, ["bushpc", plan.kind])
    return plan.first.run_dir


def run(run_dir: Path, *cells: str) -> None:
    for name in cells:
        assert run_cell((run_dir / "cells" / name).resolve(), World()) is None


@pytest.fixture(scope="module")
def source(place) -> Path:
    """A cross-validation of which fold 0 is done."""
    run_dir = written(cv_plan(compose([*SMALL, *place, "name=source", "fold=0"])))
    run(run_dir, "fold0")
    return run_dir


@pytest.fixture
def cv(place, source, request) -> Callable[..., Plan]:
    """cv("override", …) → the plan of fold 0 of a run that takes the source's weights over, named after its test."""
    name = request.node.name.partition("[")[0]
    words = (*SMALL, *place, f"name={name}", "fold=0", f"train.weights_from={source}")
    return lambda *more: cv_plan(compose([*words, *more]))


def same_results(a: Path, b: Path) -> bool:
    names = ("per_image.csv", "calibration.csv")
    maps = sorted(path.relative_to(a) for path in (a / "predictions").rglob("*.png"))
    assert maps
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (*names, *maps))


def sealed(cell: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cell / "checkpoints" / "step_00000004").iterdir()}


def test_what_is_only_evaluated_equals_what_was_trained_with_these_settings(cv, place, source):
    trained = written(cv_plan(compose([*SMALL, *place, "name=trained", "fold=0", *GENERATIVE])))
    evaluated = written(cv(*GENERATIVE))
    for run_dir in (trained, evaluated):
        run(run_dir, "fold0")
    ours, theirs = evaluated / "cells" / "fold0", trained / "cells" / "fold0"
    assert same_results(ours, theirs)
    # As the settings that only predictions depend on are those that no training sees.
    whole = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
    assert all(sealed(ours)[name] == sealed(theirs)[name] for name in whole)
    assert json.loads((ours / "DONE").read_text())["config"] == json.loads((theirs / "DONE").read_text())["config"]

    # The account is honest: no step was done here, and audit, status and report say where they were.
    attempt = json.loads((ours / "attempts.jsonl").read_text())
    assert (attempt["from_step"], attempt["step"], attempt["seconds"]["step"]) == (4, 4, 0.0)
    [audited] = [cell for cell in audit_run(evaluated).cells if cell.name == "fold0"]
    assert (audited.verdict, audited.steps, audited.trained_in) == ("exact", 4, str(source / "cells" / "fold0"))
    status = read_status(evaluated)
    assert status.cells[0].state == "done"
    assert f"1 trained in {source}, and only evaluated here" in totals_line(status)
    report = build_report(evaluated)
    assert str(source / "cells" / "fold0") in (report.html.with_name("cells.csv")).read_text()
    assert report.html.with_name("report.md").read_text().count("its cost is reported there") == 1
    assert str(source) not in (trained / "cells" / "fold0" / "config.yaml").read_text()

    # It stands by itself from now on.
    member, theirs_too = load(evaluated, fold=0).members[0], load(source, fold=0).members[0]
    assert member.sha256 == theirs_too.sha256
    assert member.model.config.inference == "generative"


def test_the_rows_of_a_grid_share_one_training(place, source, tmp_path):
    path = tmp_path / "modes.yaml"
    path.write_text(GRID)
    words = [word for word in SMALL if not word.startswith("model=")]
    words += [*place, f"grid={path}", "name=modes", "fold=0", f"train.weights_from={source}"]
    run_dir = written(grid_plan(words))
    done = source / "cells" / "fold0"
    assert (run_dir / "cells" / "auxiliary-fold0").resolve() == done, "it is that very cell, so nothing is left to do"
    run(run_dir, "ddim_2-fold0", "dpm_3-fold0")
    ddim, dpm = run_dir / "cells" / "ddim_2-fold0", run_dir / "cells" / "dpm_3-fold0"
    assert sealed(ddim) == sealed(dpm) == sealed(done)
    assert not same_results(ddim, dpm)
    # A row that was only evaluated is as good a source as any, and names the one that trained.
    again = written(
        cv_plan(compose([*SMALL, *place, *GENERATIVE, "name=again", "fold=0", f"train.weights_from={run_dir}"]))
    )
    run(again, "fold0")
    [audited] = [cell for cell in audit_run(again).cells if cell.name == "fold0"]
    assert audited.trained_in == str(done)


def test_no_weights_are_taken_that_other_settings_would_not_have_given(cv, source):
    with pytest.raises(ConfigError, match=r"fold0 differs in \(there → here\) seed: 0 → 1; train.lr: 0.001 → 0.002"):
        cv("train.lr=2e-3", "seed=1", *GENERATIVE)
    with pytest.raises(ConfigError, match=r"differs in .* model.depth: 1 → 2\. Only what"):
        cv("model.depth=2")
    with pytest.raises(ConfigError, match=r"fold1 is not done there; see `bushpc status"):
        cv("fold=1")
    with pytest.raises(ConfigError, match=r"is no run folder: it has no run.json"):
        cv(f"train.weights_from={source / 'cells'}")
    assert not cv().first.run_dir.exists(), "nothing is written before all is known to be there"


def test_other_samples_or_folds_are_other_training(cv, source, tmp_path):
    moved = shutil.copytree(source, tmp_path / "moved")
    content = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**content, "manifest_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"was trained on other data: its manifest_sha256 is 0000"):
        cv(f"train.weights_from={moved}")


class Killed(BaseException):
    """As KILL does, it gives nobody the time to tidy up."""


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_kill_while_weights_are_taken_leaves_nothing_half(cv, source, monkeypatch, at):
    """Killed before its first, second … file."""
    run_dir = written(cv(f"name=killed{at}", *GENERATIVE))
    cell, calls = run_dir / "cells" / "fold0", 0

    def until_killed(function):
        def wrapped(*args):
            nonlocal calls
            if calls == at:
                raise Killed
            calls += 1
            return function(*args)

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr("bushpc.train.take_over.write_atomically", until_killed(checkpoint.write_atomically))
        patched.setattr(checkpoint, "share_file", until_killed(checkpoint.share_file))
        with pytest.raises(Killed):
            run(run_dir, "fold0")
    assert checkpoint.steps(cell / "checkpoints") == []
    [audited] = [found for found in audit_run(run_dir).cells if found.name == "fold0"]
    assert audited.violations == ()
    run(run_dir, "fold0")
    assert sealed(cell) == sealed(source / "cells" / "fold0")
    assert audit_run(run_dir).ok
    assert not list((cell / "checkpoints").glob(".*"))


def test_what_was_taken_over_does_not_need_its_source_any_more(cv, place, source, tmp_path):
    theirs = shutil.copytree(source, tmp_path / "theirs")
    run_dir = written(cv(f"train.weights_from={theirs}", *GENERATIVE))
    shutil.rmtree(theirs)
    with pytest.raises(ResumeError, match=r"cannot be taken over: .* is no run folder.*bring them back and resume"):
        run(run_dir, "fold0")
    with pytest.raises(ConfigError, match="is no run folder"):
        resume(run_dir, ["bushpc", "resume", str(run_dir)])

    shutil.copytree(source, theirs)
    ledger = (theirs / "cells" / "fold0" / "ledger" / "rank0.csv").read_bytes()
    run(run_dir, "fold0")
    assert (theirs / "cells" / "fold0" / "ledger" / "rank0.csv").read_bytes() == ledger
    shutil.rmtree(theirs)
    first = (run_dir / "cells" / "fold0" / "per_image.csv").read_bytes()
    for name in ("DONE", "per_image.csv"):
        (run_dir / "cells" / "fold0" / name).unlink()
    run(run_dir, "fold0")
    assert (run_dir / "cells" / "fold0" / "per_image.csv").read_bytes() == first
    with pytest.raises(ConfigError, match="is no run folder"):
        retry(run_dir, ["fold0"], ["bushpc", "retry"], fresh=True)
    assert (run_dir / "cells" / "fold0" / "DONE").exists()


def test_weights_that_were_damaged_are_taken_again_and_never_trained(cv, source, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    run_dir = written(cv(*GENERATIVE))
    cell = run_dir / "cells" / "fold0"
    run(run_dir, "fold0")
    (cell / "DONE").unlink()
    with (cell / "checkpoints" / "step_00000004" / "model.safetensors").open("r+b") as file:
        file.write(b"damage")
    run(run_dir, "fold0")
    assert sealed(cell) == sealed(source / "cells" / "fold0")
    assert audit_run(run_dir).ok


def test_a_cell_that_began_to_train_begins_anew_where_it_is_only_to_evaluate(place, source, cv, monkeypatch):
    words = (*SMALL, *place, *GENERATIVE, "name=began", "fold=0")
    run_dir = written(cv_plan(compose(words)))
    run(run_dir, "fold0")
    (run_dir / "cells" / "fold0" / "DONE").unlink()
    written(cv_plan(compose([*words, f"train.weights_from={source}"])))
    assert not (run_dir / "cells" / "fold0" / "checkpoints").exists()
    [aside] = (run_dir / "stale").iterdir()
    assert (aside / "checkpoints" / "step_00000004").exists()
    run(run_dir, "fold0")
    # And the other way round; but what is done is done.
    written(cv_plan(compose(words)))
    assert (run_dir / "cells" / "fold0" / "DONE").exists()
    (run_dir / "cells" / "fold0" / "DONE").unlink()
    written(cv_plan(compose(words)))
    assert not (run_dir / "cells" / "fold0" / "taken_over.json").exists()


@pytest.mark.parametrize("model", [name for name in config_names("model") if not name.endswith("_small")])
def test_settings_of_prediction_and_evaluation_leave_the_training_the_same(model):
    cell = compose([f"model={model}", "data=phantom"])
    other = compose(
        [f"model={model}", "data=phantom", "evaluate.threshold=0.7", "also_prompts=[]", "prompting.tau=0.4"]
    )
    assert other.training_hash == cell.training_hash
    assert len(differences(cell, other)) == 3
    assert other.unlike(cell.settings) == []
    assert dataclasses.replace(cell, seed=1).training_hash != cell.training_hash
