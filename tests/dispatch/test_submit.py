"""Promises of dispatch on one machine: returns at once, runs what is missing, never twice, never half a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.dispatch.job import CellJob
from bushpc.dispatch.status import process_start, read_status
from bushpc.dispatch.submit import clean_environment
from bushpc.files import exclusive

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model=unet_small", "data=phantom", "cluster=local", "model.image_size=32", "train.iterations=4")


@pytest.fixture
def cv(tmp_path, phantom_folder, capsys, monkeypatch):
    """cv("override", …) runs `bushpc cv` on a tiny model, in the clone; returns (exit status, output, errors)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # slots of their own, whatever else runs here

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


def states(run_dir: Path) -> dict[str, str]:
    return {cell.name: cell.state for cell in read_status(run_dir).cells}


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
    assert states(run_dir) == {"fold0": "missing", "fold1": "done"} | dict.fromkeys(
        ("fold2", "fold3", "fold4"), "missing"
    )
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["complete"] is False, "one fold of five is no cross-validation"
    assert summary["metrics"]["none"]["dice"]["mean"] is None

    # A further fold of the same run: the finished one is kept.
    done_before = (run_dir / "cells" / "fold1" / "DONE").stat().st_mtime_ns
    code, said, _ = cv("fold=2", "--wait")
    assert code == 0
    assert "report:" in said
    assert (run_dir / "cells" / "fold1" / "DONE").stat().st_mtime_ns == done_before
    assert [name for name, state in states(run_dir).items() if state == "done"] == ["fold1", "fold2"]

    # Other settings under the same name are refused, whatever the fold, and nothing is touched.
    for fold in (1, 3):
        code, _, errors = cv(f"fold={fold}", "train.lr=0.5")
        assert code == 2
        assert "train.lr: 0.001 → 0.5" in errors
    # Settings that cannot change the result may change.
    assert cv("fold=1", "train.save_every=3")[0] == 0

    # The code that ran is that of the run folder, not the clone's, which may be edited meanwhile.
    job = json.loads((run_dir / "cells" / "fold1" / "job.json").read_text())
    assert f"code {run_dir / 'code' / job['code'] / 'bushpc'}\n" in Path(job["log"]).read_text()


def test_a_cell_whose_process_is_killed_is_seen_as_stopped_and_goes_on(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    cv("fold=0", "train.iterations=120", "train.save_every=5")
    deadline = time.monotonic() + 120
    while not list((run_dir / "cells" / "fold0" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((run_dir / "cells" / "fold0" / "state.json").read_text())["pid"], signal.SIGKILL)
    wait_until_still(run_dir)
    cell = read_status(run_dir).cells[0]
    assert cell.state == "stopped"
    assert "submit again" in cell.reason
    _, said, _ = cv("fold=0", "train.iterations=120", "train.save_every=5")
    assert "submitted: fold0" in said
    wait_until_still(run_dir)
    cell = read_status(run_dir).cells[0]
    assert (cell.state, cell.restarts) == ("done", 1)
    assert "resumed from" in Path(cell.log).read_text()


def test_a_submission_lets_go_of_the_callers_pipe(tmp_path, phantom_folder):
    """Whoever reads its output to the end, as a shell's `$(…)` does, must not wait for the cells."""
    words = [*SMALL, f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "name=piped", "cluster.parallel=1"]
    words += ["train.iterations=60", f"loader.cache_dir={tmp_path / 'cache'}"]
    subprocess.run([sys.executable, "-m", "bushpc.cli", "cv", *words], capture_output=True, check=True, cwd=ROOT)
    assert "done" not in states(tmp_path / "piped").values(), "the pipe was held while cells ran"
    subprocess.run(["pkill", "--signal", "KILL", "--full", str(tmp_path / "piped")], check=False)
    wait_until_still(tmp_path / "piped")


@pytest.mark.real
def test_a_cell_of_two_ranks_runs_where_one_cell_fits(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    code, _, errors = cv("fold=0", "cluster.ranks_per_node=2", "cluster.parallel=1", "--wait")
    assert code == 0, errors
    assert "2 rank(s)" in Path(read_status(run_dir).cells[0].log).read_text()


def test_a_job_that_dies_before_it_starts_is_not_taken_for_a_running_one(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    code, _, errors = cv("fold=0", "cluster.setup=[exit 3]", "--wait")
    assert code == 1
    assert "fold0 stopped" in errors
    assert cv("fold=0", "--wait")[0] == 0
    assert states(run_dir)["fold0"] == "done"


def test_two_processes_never_work_on_one_cell(make_cell, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "1")
    cell_dir = make_cell("twice")
    job = CellJob(run_dir=str(cell_dir.parent.parent), cell="fold0", submission="a")
    with exclusive(cell_dir / ".rank0.lock") as alone:
        assert alone
        # flock is per open file, so this process meets its own lock as another one would.
        with pytest.raises(SystemExit, match="another process works on"):
            job()
    assert not (cell_dir / "FAILED").exists()
    assert not (cell_dir / "state.json").exists()


def test_a_job_inside_a_job_does_not_inherit_its_limits(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    with clean_environment():
        assert "SLURM_MEM_PER_CPU" not in os.environ
        assert "WORLD_SIZE" not in os.environ
        assert os.environ["SBATCH_ACCOUNT"] == "mine"
    assert os.environ["SLURM_MEM_PER_CPU"] == "1"


def test_a_failing_cell_says_why_in_one_line(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    code, _, errors = cv("fold=0", "train.lr=1e30", "train.grad_clip=0", "--wait")
    assert code == 1
    assert "is not finite at step" in errors
    cell = read_status(run_dir).cells[0]
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
