"""Promises of dispatch on a real Slurm: one array and its report, nothing twice, and a killed cell goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real


@pytest.fixture
def clone(tmp_path):
    """A clone whose `.venv` is the environment that the tests run in."""
    clone = tmp_path / "clone"
    (clone / ".venv").mkdir(parents=True)
    (clone / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (clone / "slurm").symlink_to(ROOT / "slurm")
    subprocess.run(["git", "init", "--quiet", clone], check=True)
    return clone


@pytest.fixture
def submit(slurm, clone, tmp_path, phantom_folder):
    """submit("override", …): `sbatch slurm/cv_xbusnet.sh` with settings for a small model; returns its output."""
    settings = [
        *("model=xbusnet_small", "data=phantom", "cluster=slurm", "name=cv", f"runs_dir={tmp_path / 'runs'}"),
        *(f"data.root={phantom_folder}", f"loader.cache_dir={tmp_path / 'cache'}", "model.image_size=64"),
        *("train.batch_size=4", "train.save_every=5", "train.log_every=5", "cluster.time_min=30"),
    ]

    def run(*overrides: str) -> str:
        log = tmp_path / "submit.out"
        log.unlink(missing_ok=True)
        command = ["sbatch", "--parsable", f"--output={log}", "slurm/cv_xbusnet.sh", *settings, *overrides]
        [state] = slurm.wait(slurm.run(command, cwd=clone).strip())
        assert state == "COMPLETED", log.read_text()
        return log.read_text()

    return run


def state_of(run_dir: Path) -> dict[str, dict]:
    from bushpc.dispatch.status import read_status

    return {cell["name"]: cell for cell in json.loads(read_status(run_dir).to_json())["cells"]}


def wait_for(what, timeout: float = 600.0):
    deadline = time.monotonic() + timeout
    while not (result := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.5)
    return result


def test_five_folds_run_as_one_array_and_a_killed_cell_goes_on(slurm, submit, tmp_path):
    run_dir = tmp_path / "runs" / "cv"
    said = submit("train.iterations=80")
    assert "submitted: fold0, fold1, fold2, fold3, fold4" in said
    job_ids = {cell["job_id"] for cell in state_of(run_dir).values()}
    [array] = {job_id.partition("_")[0] for job_id in job_ids}
    assert job_ids == {f"{array}_{k}" for k in range(5)}

    # Again, while they run: nothing is submitted.
    again = submit("train.iterations=80")
    assert "submitted" not in again
    assert "already running" in again

    # One cell is killed in the middle of training.
    victim = wait_for(
        lambda: next(
            (
                cell
                for cell in state_of(run_dir).values()
                if cell["state"] == "running"
                and cell["step"] < 60
                and list((run_dir / "cells" / cell["name"] / "checkpoints").glob("step_*"))
            ),
            None,
        )
    )
    slurm.run(["scancel", "--signal=KILL", "--full", victim["job_id"]])
    report_job = json.loads((run_dir / "jobs" / "report.json").read_text())["job_id"]
    wait_for(lambda: not any(cell["live"] for cell in state_of(run_dir).values()))
    states = state_of(run_dir)
    assert states.pop(victim["name"])["state"] == "stopped"
    assert {cell["state"] for cell in states.values()} == {"done"}

    # The report followed by dependency, and does not average what is not there.
    slurm.wait(report_job)
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["complete"] is False
    assert [missing["cell"] for missing in summary["folds"]["missing"]] == [victim["name"]]

    # Again: only the killed one runs, and goes on from its checkpoint.
    finished = {name: (run_dir / "cells" / name / "DONE").stat().st_mtime_ns for name in states}
    assert f"submitted: {victim['name']}\n" in submit("train.iterations=80")
    wait_for(lambda: state_of(run_dir)[victim["name"]]["state"] == "done")
    assert finished == {name: (run_dir / "cells" / name / "DONE").stat().st_mtime_ns for name in states}
    log = Path(state_of(run_dir)[victim["name"]]["log"]).read_text()
    assert "resumed from step_" in log
    slurm.wait(json.loads((run_dir / "jobs" / "report.json").read_text())["job_id"])
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["complete"] is True
    assert set(summary["metrics"]) == {"first_pass", "oracle", "none"}

    # And once more: nothing is left to do.
    assert "already done: fold0, fold1, fold2, fold3, fold4" in submit("train.iterations=80")


def test_one_cell_spans_two_nodes_with_one_task_per_rank(slurm, submit, tmp_path):
    submit("train.iterations=4", "fold=0", "cluster.nodes=2", "name=two_nodes")
    run_dir = tmp_path / "runs" / "two_nodes"
    wait_for(lambda: not state_of(run_dir)["fold0"]["live"])
    cell = state_of(run_dir)["fold0"]
    assert cell["state"] == "done", Path(cell["log"]).read_text()
    assert "2 rank(s) on cpu" in Path(cell["log"]).read_text()


def test_a_preempted_cell_comes_back_by_itself_and_a_cancelled_one_does_not(slurm, submit, tmp_path):
    run_dir = tmp_path / "runs" / "preempted"
    # Too many steps to be done before the test cancels it, however slow the machine is.
    overrides = ("fold=0", "name=preempted", "train.iterations=100000", "cluster.nodes=2")
    submit(*overrides)
    wait_for(lambda: state_of(run_dir)["fold0"]["step"] >= 5)
    job_id = state_of(run_dir)["fold0"]["job_id"]
    urgent = slurm.sbatch("sleep 5", "--partition=high", "--nodes=2", "--exclusive")
    log = Path(state_of(run_dir)["fold0"]["log"])
    wait_for(lambda: "resumed from step_" in log.read_text())
    slurm.wait(urgent)
    assert "stopped by SIGTERM after step" in log.read_text()
    assert "another process works" not in log.read_text()
    assert state_of(run_dir)["fold0"]["job_id"] == job_id
    assert state_of(run_dir)["fold0"]["restarts"] == 1
    # The report job still waits for the cell: a requeue does not count as an end.
    assert not (run_dir / "report").exists()

    slurm.run(["scancel", job_id])
    wait_for(lambda: not state_of(run_dir)["fold0"]["live"])
    slurm.wait(job_id)
    assert state_of(run_dir)["fold0"]["state"] == "stopped"
    assert state_of(run_dir)["fold0"]["restarts"] == 1


def test_packing_runs_on_a_compute_node(slurm, clone, tmp_path):
    out, log = tmp_path / "packed here", tmp_path / "pack.out"
    words = ["phantom", f"out={out}", "count=6"]
    job = slurm.run(["sbatch", "--parsable", f"--output={log}", "slurm/pack.sh", *words], cwd=clone).strip()
    [state] = slurm.wait(job)
    assert state == "COMPLETED", log.read_text()
    assert (out / "manifest.json").exists()
