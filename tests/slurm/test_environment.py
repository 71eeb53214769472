"""Promises on a real Slurm: ranks have an environment, and only jobs of the run are touched.

The variables of a shell, and two clusters with equal job numbers: test_sites_environment.py.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

from bushpc.cluster.base import cluster_for
from bushpc.cluster.records import Job
from bushpc.errors import DispatchError

pytestmark = pytest.mark.real


def test_ranks_start_where_the_profile_submits_with_export_none(slurm, phantom_folder, tmp_path):
    """Some sites want --export=NONE. srun would then start the ranks without PATH and PYTHONPATH."""
    words = (
        *("model=unet_small", "model.image_size=32", "train.iterations=4", "data=phantom", "cluster=slurm", "fold=0"),
        *(f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}", f"loader.cache_dir={tmp_path / 'cache'}"),
        *("name=run", "cluster.partition=low", "cluster.time_min=20", "cluster.sbatch={export: NONE}"),
    )
    [cv] = slurm.bushpc(["cv", *words], MPLBACKEND="module://matplotlib_inline.backend_inline", LC_ALL="C")
    assert cv.status == 0, cv.said
    run_dir = tmp_path / "runs" / "run"
    assert "export=NONE" in next((run_dir / "jobs").rglob("*_submission.sh")).read_text()
    slurm.until((run_dir / "report" / "index.html").exists, what=lambda: str(slurm.squeue()))
    assert (run_dir / "cells" / "fold0" / "DONE").exists()


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
