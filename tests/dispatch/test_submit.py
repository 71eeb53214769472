"""Promises of dispatch on one machine: returns at once, runs what is missing, never twice, never half a run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.dispatch.status import process_start, read_status

SMALL = ("model=unet_small", "data=phantom", "cluster=local", "model.image_size=32", "train.iterations=4")


@pytest.fixture
def cv(tmp_path, phantom_folder, capsys):
    """cv("override", …) runs `bushpc cv` with a tiny model and returns (exit status, what it printed)."""

    def run(*words: str) -> tuple[int, str, str]:
        where = (f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'my runs'}", "name=tiny")
        status = main(["cv", *SMALL, *where, f"loader.cache_dir={tmp_path / 'cache'}", *words])
        return status, *capsys.readouterr()

    return run


def wait_until_still(run_dir: Path, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while True:
        status = read_status(run_dir)
        if not any(cell.live for cell in status.cells) and not status.report_live:
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


def test_a_run_from_submission_to_report_and_again(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"  # with a space: paths reach a shell, and must be quoted
    began = time.monotonic()
    code, said, _ = cv("fold=1")
    assert code == 0
    assert "submitted: fold1\n" in said
    assert time.monotonic() - began < 60, "a submission does not wait for training"
    code, said, _ = cv("fold=1")
    assert "already running: fold1\n" in said
    assert "submitted" not in said
    wait_until_still(run_dir)
    assert read_status(run_dir).complete
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["folds"]["complete"] == ["fold1"] or summary["folds"]["complete"] == [1]

    # A further fold of the same run: the finished one is kept.
    done_before = (run_dir / "cells" / "fold1" / "DONE").stat().st_mtime_ns
    code, said, _ = cv("fold=2", "--wait")
    assert code == 0
    assert "report:" in said
    assert (run_dir / "cells" / "fold1" / "DONE").stat().st_mtime_ns == done_before
    assert [cell.state for cell in read_status(run_dir).cells] == ["done", "done"]

    # Other settings under the same name are refused, and nothing is touched.
    code, _, errors = cv("fold=1", "train.lr=0.5")
    assert code == 2
    assert "train.lr: 0.001 → 0.5" in errors

    # The code that ran is in the run folder, whole.
    [code_folder] = (run_dir / "code").iterdir()
    assert (code_folder / "bushpc" / "run.py").exists()


def test_a_cell_whose_process_is_killed_is_seen_as_stopped_and_goes_on(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    cv("fold=0", "train.iterations=120", "train.save_every=5")
    deadline = time.monotonic() + 120
    while not list((run_dir / "cells" / "fold0" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((run_dir / "cells" / "fold0" / "state.json").read_text())["pid"], signal.SIGKILL)
    wait_until_still(run_dir)
    [cell] = read_status(run_dir).cells
    assert cell.state == "stopped"
    assert "submit again" in cell.reason
    _, said, _ = cv("fold=0", "train.iterations=120", "train.save_every=5")
    assert "submitted: fold0" in said
    wait_until_still(run_dir)
    [cell] = read_status(run_dir).cells
    assert (cell.state, cell.restarts) == ("done", 1)
    assert "resumed from" in Path(cell.log).read_text()


def test_a_failing_cell_says_why_in_one_line(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    code, _, errors = cv("fold=0", "train.lr=1e30", "train.grad_clip=0", "--wait")
    assert code == 1
    assert "the loss is not finite at step" in errors
    [cell] = read_status(run_dir).cells
    assert cell.state == "failed"
    assert "\n" not in cell.reason


def test_a_process_is_named_by_its_start_so_that_a_reused_id_is_not_taken_for_it():
    assert process_start(os.getpid()) == process_start(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    time.sleep(0.05)
    assert process_start(child) is None, "a zombie does not live"
    os.waitpid(child, 0)
    assert process_start(child) is None
