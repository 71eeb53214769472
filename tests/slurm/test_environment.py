"""Promises on a real Slurm: no variable of a shell decides where jobs go, and only jobs of the run are touched."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bushpc.cluster.base import Job, cluster_for
from bushpc.errors import DispatchError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real
# What login profiles, notebooks and sites set; each of them alone once broke a run.
SHELL = {
    "SBATCH_PARTITION": "high",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_EXPORT": "NONE",
    "SQUEUE_STATES": "RUNNING",
    "SLURM_CLUSTERS": "elsewhere",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "latin-1",
}


@pytest.fixture
def bushpc(slurm, tmp_path, phantom_folder):
    """bushpc("cv", …, VARIABLE=…): a command in a process of its own; returns it with its output."""

    def run(command: str, *words: str, conf: str = slurm.env["SLURM_CONF"], **variables: str):
        env = {**os.environ, "SLURM_CONF": conf, "PYTHONPATH": str(ROOT), **variables}
        return subprocess.run(
            [sys.executable, "-m", "bushpc.cli", command, *words],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )

    return run


@pytest.fixture
def settings(tmp_path, phantom_folder):
    return (
        *("model=unet_small", "model.image_size=32", "train.iterations=4", "data=phantom", "cluster=slurm"),
        *(f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}", f"loader.cache_dir={tmp_path / 'cache'}"),
        *("name=run", "cluster.partition=low", "cluster.time_min=20"),
    )


def test_a_run_ends_and_is_seen_whatever_the_shell_has_set(slurm, bushpc, settings, tmp_path):
    run_dir = tmp_path / "runs" / "run"
    said = bushpc("cv", *settings, **SHELL)
    assert said.returncode == 0, said.stderr
    for name in ("SBATCH_PARTITION=high", "SBATCH_TIMELIMIT=1", "SBATCH_EXPORT=NONE", "SQUEUE_STATES=RUNNING"):
        assert name in said.stderr, "what does not count is said"
    note = json.loads((run_dir / "cells" / "fold0" / "job.json").read_text())
    assert note["name"].startswith("run-")
    assert (note["cluster"], note["user"]) == (cluster_for("slurm").here(), os.getuid())
    array = note["job_id"].partition("_")[0]
    assert "already running" in bushpc("cv", *settings, **SHELL).stdout, "waiting cells are seen"
    slurm.wait(array)
    assert {row["Partition"] for row in slurm.sacct(array)} == {"low"}
    status = json.loads(bushpc("status", str(run_dir), "--json", **SHELL).stdout)
    assert {cell["state"] for cell in status["cells"]} == {"done"}
    report = json.loads(next((run_dir / "jobs").glob("report*.json")).read_text())["job_id"]
    assert slurm.wait(report) == ["COMPLETED"]
    assert (run_dir / "report" / "index.html").exists()
    # The same by hand, in the same shell.
    written = bushpc("report", str(run_dir), **SHELL)
    assert written.returncode == 0, written.stderr


def test_no_job_of_the_same_number_is_touched_that_is_not_ours(slurm):
    cluster = cluster_for("slurm")
    array = slurm.sbatch("sleep 600", "--hold", "--array=0-3", "--job-name=theirs")
    ours = Job(id=f"{array}_0", executor="slurm", cluster=cluster.here(), name="ours-1a2b3c4d", owner=os.getuid())
    assert cluster.states([ours]) == {}
    cluster.cancel([ours])
    for do in (lambda: cluster.signal(ours, "TERM"), lambda: cluster.kill_ranks(ours)):
        with pytest.raises(DispatchError, match="not in the queue"):
            do()
    assert {slurm.squeue()[f"{array}_{k}"] for k in range(4)} == {"PENDING"}
    # One task of an array that is ours: the others stay.
    cluster.cancel([dataclasses.replace(ours, name="theirs")])
    queue = slurm.squeue()
    assert [queue[f"{array}_{k}"] for k in (1, 2, 3)] == ["PENDING"] * 3
    assert queue.get(f"{array}_0") != "PENDING"
    slurm.run(["scancel", array])


def test_another_clusters_jobs_are_neither_ended_nor_submitted_twice(slurm, bushpc, settings, make_sandbox, tmp_path):
    """Two clusters whose job numbers are equal: commands that talk to the wrong one refuse."""
    other = make_sandbox("--nodes", "1", "--cluster", "other")
    slurm.run(["scontrol", "update", "partition=low", "state=down"])  # jobs wait
    try:
        assert bushpc("cv", *settings).returncode == 0
        run_dir = tmp_path / "runs" / "run"
        array = int(json.loads((run_dir / "cells" / "fold0" / "job.json").read_text())["job_id"].partition("_")[0])
        there = other.env["SLURM_CONF"]
        for _ in range(array):  # until the other one has a job of that number
            number = other.sbatch("sleep 600", "--hold", "--array=0-4")
        assert int(number) >= array
        before = other.squeue()
        for words in (
            ("status", str(run_dir)),
            ("cancel", str(run_dir)),
            ("retry", str(run_dir), "fold0"),
            ("cv", *settings),
            ("resume", str(run_dir)),
        ):
            refused = bushpc(*words, conf=there)
            assert refused.returncode == 2, (words, refused.stdout)
            assert "on the cluster 'sandbox', and this command talks to 'other'" in refused.stderr
            assert f"SLURM_CONF={there}" in refused.stderr
        assert other.squeue() == before
        assert "cancelled: fold0, fold1, fold2, fold3, fold4" in bushpc("cancel", str(run_dir)).stdout
    finally:
        slurm.run(["scontrol", "update", "partition=low", "state=up"])
