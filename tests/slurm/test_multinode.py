"""Promises of slurm/train_multinode.sh on a real Slurm: one task per rank on two nodes, and back after a preemption."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bushpc.dispatch.status import CellStatus, read_status

ROOT = Path(__file__).resolve().parents[2]
# What a site without GPUs and with small nodes gives on sbatch's line.
CPU_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30")
pytestmark = pytest.mark.real


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose `.venv` is the environment that the tests run in."""
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / ".venv").symlink_to(Path(sys.executable).parents[1])
    (clone / "slurm").symlink_to(ROOT / "slurm")
    subprocess.run(["git", "init", "--quiet", clone], check=True)
    return clone


def wait_for(what, explain=lambda: "", timeout: float = 300.0):
    deadline = time.monotonic() + timeout
    while not (result := what()):
        assert time.monotonic() < deadline, f"waited too long\n{explain()}"
        time.sleep(0.2)
    return result


def test_a_preempted_training_on_two_nodes_comes_back_and_finishes(slurm, clone, tmp_path, phantom_folder):
    run_dir, log = tmp_path / "runs" / "two_nodes", tmp_path / "train.out"
    settings = [
        *("model=xbusnet_small", "data=phantom", "cluster=slurm", "engine=ddp", "model.image_size=64"),
        *("name=two_nodes", f"runs_dir={tmp_path / 'runs'}", f"data.root={phantom_folder}"),
        *(f"loader.cache_dir={tmp_path / 'cache'}", "train.iterations=120", "train.batch_size=4", "train.log_every=5"),
        "train.save_every=1000",
    ]
    command = ["sbatch", "--parsable", f"--output={log}", *CPU_NODES, "slurm/train_multinode.sh", *settings]
    job_id = slurm.run(command, cwd=clone).strip()

    def cell() -> CellStatus:
        return read_status(run_dir).cells[0]

    wait_for(lambda: (run_dir / "cells" / "fold0" / "metrics.jsonl").exists(), log.read_text)
    assert (cell().state, cell().job_id) == ("running", job_id)
    urgent = slurm.sbatch("sleep 1", "--partition=high", "--nodes=2", "--exclusive")
    wait_for(lambda: "resumed from step_" in log.read_text(), log.read_text)
    slurm.wait(urgent)
    wait_for(lambda: cell().state == "done", log.read_text)
    [state] = slurm.wait(job_id)
    assert state == "COMPLETED", log.read_text()

    said = log.read_text()
    assert f"job {job_id} goes back into the queue: it was told to stop, and saved" in said
    assert said.count("2 rank(s) on cpu") == 2, "one task per rank, both times"
    assert json.loads((run_dir / "run.json").read_text())["command"][:2] == ["bushpc", "train"]
    assert not list((tmp_path / "runs").glob(".meeting*")), "ranks met, and cleared up"


def test_a_cell_that_cannot_work_ends_the_job_with_one_message_and_stays_out_of_the_queue(slurm, clone, tmp_path):
    log = tmp_path / "train.out"
    command = ["sbatch", "--parsable", f"--output={log}", *CPU_NODES, "slurm/train_multinode.sh"]
    words = ["cluster=slurm", "model=unet_small", "data=phantom", f"data.root={tmp_path}", "train.batch_size=4"]
    command += [*words, f"runs_dir={tmp_path / 'runs'}"]
    [state] = slurm.wait(slurm.run(command, cwd=clone).strip())
    assert state == "FAILED"
    assert log.read_text().count("bushpc: ") == 1, log.read_text()
    assert "manifest.json" in log.read_text()
    assert not list(tmp_path.glob("runs/*"))
