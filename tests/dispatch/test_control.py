"""Promises of what one does with a run: go on, end it, run cells again; on this machine, with real jobs.

Trainings are tests/stand_in's, which start in no time.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.cluster.local import LocalCluster
from bushpc.dispatch.status import RunStatus, read_status
from bushpc.errors import DispatchError
from bushpc.runs.layout import RunDir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def grid(tmp_path, phantom_folder, capsys, monkeypatch):
    """grid("override", …) submits two rows, a and b; returns (exit status, output, errors). Folds 0 and 1 are tried."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # slots of their own, whatever else runs here
    path = tmp_path / "trial.yaml"
    path.write_text("rows: {a: {set: {train.lr: 1.0e-3}}, b: {set: {train.lr: 2.0e-3}}}")

    def run(*words: str) -> tuple[int, str, str]:
        settings = ["model=unet_small", "data=phantom", "cluster=local", "cluster.parallel=4", "model.image_size=32"]
        settings += [f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "name=run", "train.save_every=5"]
        settings += [f"cluster.setup=['export PYTHONPATH={ROOT}/tests/stand_in']"]
        return said(capsys, "grid", f"grid={path}", *settings, *words)

    return run


def said(capsys, *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    return status, *capsys.readouterr()


def saved_of(run_dir: Path) -> dict[str, int]:
    """Newest saved step of the cells that have one."""
    steps = {cell.name: cell.newest_step() for cell in RunDir(run_dir).cell_dirs()}
    return {name: step for name, step in steps.items() if step}


def until(run_dir: Path, reached, timeout: float = 300) -> RunStatus:
    deadline = time.monotonic() + timeout
    while not reached(status := read_status(run_dir)):
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


def until_still(run_dir: Path) -> dict[str, str]:
    """States by cell, once nothing is live; the report job may be."""
    return {
        cell.name: cell.state for cell in until(run_dir, lambda status: not any(c.live for c in status.cells)).cells
    }


def test_a_cancelled_run_has_saved_says_so_and_goes_on(grid, capsys, tmp_path):
    run_dir = tmp_path / "run"
    grid("fold=0", "train.iterations=100000")
    until(run_dir, lambda _: saved_of(run_dir).keys() == {"a-fold0", "b-fold0"})
    assert said(capsys, "cancel", str(run_dir))[1] == "cancelled: a-fold0, b-fold0\n"
    states = until_still(run_dir)
    assert (states["a-fold0"], states["b-fold0"], states["a-fold1"]) == ("stopped", "stopped", "missing")
    assert said(capsys, "cancel", str(run_dir))[1] == "cancelled: nothing was running or queued\n"
    assert "was cancelled; `bushpc resume` goes on" in said(capsys, "status", str(run_dir))[1]
    saved = saved_of(run_dir)

    # Only what may change without changing the result may change.
    code, _, errors = said(capsys, "resume", str(run_dir), "train.iterations=7")
    assert code == 2
    assert "may only get other cluster or loader settings" in errors
    assert "unknown state in --only 'faild'; did you mean 'failed'" in said(
        capsys, "resume", str(run_dir), "--only", "faild"
    )[2]  # fmt: skip
    assert "submitted: a-fold0, b-fold0\n" in said(capsys, "resume", str(run_dir), "--only", "stopped")[1]
    until(run_dir, lambda status: sum(cell.restarts for cell in status.cells) == 2)
    for cell in ("a-fold0", "b-fold0"):
        attempt = json.loads((run_dir / "cells" / cell / "state.json").read_text())["attempt"]
        assert attempt["from_step"] == saved[cell]
    assert said(capsys, "cancel", str(run_dir), "a")[1] == "cancelled: a-fold0\n", "a row stands for its folds"
    assert said(capsys, "cancel", str(run_dir), "b-fold0")[1] == "cancelled: b-fold0\n"
    until_still(run_dir)
    run = json.loads((run_dir / "run.json").read_text())
    assert run["command"][1] == "grid", "what made the run, whatever went on with it"
    assert [submission["command"][1] for submission in run["submissions"]] == ["grid", "resume"]


def test_cells_that_share_a_job_end_each_by_itself_and_are_tried_again(grid, capsys, tmp_path):
    run_dir = tmp_path / "run"
    grid("fold=0", "--list")
    packed = ("cluster.cells_per_job=3", "cluster.parallel=2", "train.iterations=5")
    failing = run_dir / "cells" / "b-fold0"
    failing.mkdir(parents=True)
    (failing / "fails").touch()
    code, out, _ = grid(*packed)
    assert code == 0
    assert "submitted: a-fold0" in out
    jobs = [json.loads(path.read_text())["job_id"] for path in sorted(run_dir.glob("cells/*/job.json"))]
    assert len(jobs) == 10
    assert sorted(jobs.count(job) for job in set(jobs)) == [1, 3, 3, 3]
    states = until_still(run_dir)
    assert states.pop("b-fold0") == "failed"
    assert set(states.values()) == {"done"}, "one that fails takes no other with it"
    assert "b-fold0 failed: RuntimeError: told to fail" in said(capsys, "status", str(run_dir))[1]
    log = Path(json.loads((failing / "job.json").read_text())["log"])
    assert "told to fail" in log.read_text()

    assert "a-fold1 is done; --fresh trains it anew" in said(capsys, "retry", str(run_dir), "a-fold1")[2]
    assert "unknown cell 'c-fold1'" in said(capsys, "retry", str(run_dir), "c-fold1")[2]
    (failing / "fails").unlink()
    assert "submitted: b-fold0\n" in said(capsys, "retry", str(run_dir), "b-fold0")[1]
    assert set(until_still(run_dir).values()) == {"done"}
    assert "submitted: a-fold1\n" in said(capsys, "retry", str(run_dir), "a-fold1", "--fresh")[1]
    assert set(until_still(run_dir).values()) == {"done"}
    [aside] = (run_dir / "replaced").iterdir()
    assert (aside / "DONE").exists()
    assert aside.name.startswith("a-fold1-")


def test_a_failed_cell_of_a_job_that_goes_on_is_failed_at_once(grid, tmp_path, capsys):
    run_dir = tmp_path / "run"
    failing = run_dir / "cells" / "a-fold0"
    failing.mkdir(parents=True)
    (failing / "fails").touch()
    grid("fold=0", "cluster.cells_per_job=2", "train.iterations=100000")
    until(run_dir, lambda status: status.cells[0].state == "failed" and saved_of(run_dir))
    assert said(capsys, "cancel", str(run_dir))[1] == "cancelled: b-fold0\n"
    assert until_still(run_dir)["b-fold0"] == "stopped"


def test_a_row_that_runs_is_not_dropped_and_a_refused_one_keeps_its_reason(grid, capsys, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    grid("fold=0", "train.iterations=100000")
    until(run_dir, lambda _: len(saved_of(run_dir)) == 2)
    (tmp_path / "trial.yaml").write_text("rows: {a: {set: {train.lr: 1.0e-3}}}")
    code, _, errors = grid("fold=0", "train.iterations=100000")
    assert code == 2
    assert "b-fold0 of" in errors
    assert "bushpc cancel" in errors
    said(capsys, "cancel", str(run_dir))
    until_still(run_dir)

    (run_dir / "cells" / "a-fold0" / "FAILED").write_text("out of memory\n")

    def refuse(*_):
        raise DispatchError("the cluster refused the job")

    monkeypatch.setattr(LocalCluster, "submit", refuse)
    code, _, errors = said(capsys, "resume", str(run_dir), "--only", "failed", "cluster.time_min=7")
    assert (code, errors) == (2, "bushpc: the cluster refused the job\n")
    assert (run_dir / "cells" / "a-fold0" / "FAILED").read_text() == "out of memory\n"


def test_what_is_no_run_is_refused(tmp_path, capsys):
    for command in ("resume", "cancel", "status"):
        code, _, errors = said(capsys, command, str(tmp_path))
        assert code == 2
        assert "is not a run folder" in errors
