"""Promises about a shell's variables and about other clusters: they neither move, hide nor end a run's jobs."""

from __future__ import annotations

import json
import shutil
import typing as t
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.sites import home, logs, run_folder, until_reported, words

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Sandbox

pytestmark = pytest.mark.real

# What login profiles of real sites and users set.
PROFILE = {
    "SBATCH_EXPORT": "NONE",
    "SBATCH_PARTITION": "high",
    "SBATCH_TIMELIMIT": "1",
    "SLURM_EXPORT_ENV": "NONE",
    "SQUEUE_STATES": "RUNNING",
    "SQUEUE_FORMAT": "%j",
    "SQUEUE_PARTITION": "high",
    "SCANCEL_STATE": "RUNNING",
    "SLURM_CLUSTERS": "elsewhere",
    "SINFO_FORMAT": "%n",
    "LC_ALL": "C",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


@pytest.fixture(scope="module")
def here(site: Callable[..., Sandbox], phantom_folder: Path) -> Sandbox:
    sandbox = site()
    shutil.copytree(phantom_folder, home(sandbox) / "phantom")
    return sandbox


def test_a_run_is_the_same_whatever_the_shell_has_set(here: Sandbox) -> None:
    cv = words(here, "cv", "run", "cluster.partition=low")
    here.run(["scontrol", "update", "PartitionName=low", "State=DOWN"])
    run_dir = run_folder(here, "run")
    first, again, status = here.bushpc(cv, cv, ["status", str(run_dir), "--json"], **PROFILE)
    assert first.status == again.status == 0, first.said + again.said
    assert "SBATCH_TIMELIMIT" in first.said
    assert "submitted" not in again.said
    assert {cell["state"] for cell in json.loads(from_brace(status.said))["cells"]} == {"queued"}
    asked = {line for line in here.run(["squeue", "--noheader", "--format=%P %l"]).splitlines()}
    assert {line.split()[0] for line in asked} == {"low"}
    assert "1:00" not in {line.split()[1] for line in asked}

    here.run(["scontrol", "update", "PartitionName=low", "State=UP"])
    assert until_reported(here, "run")["complete"] is True


def test_variables_fill_what_the_profile_leaves_open(here: Sandbox) -> None:
    [answer] = here.bushpc(words(here, "cv", "open", "fold=0"), SBATCH_PARTITION="high")
    assert "SBATCH_PARTITION=high" in answer.said
    assert {line.strip() for line in here.run(["squeue", "--noheader", "--format=%P"]).splitlines()} == {"high"}
    here.until(lambda: not here.squeue() or (run_folder(here, "open") / "cells" / "fold0" / "DONE").exists())


def test_a_job_of_the_same_number_on_another_cluster_is_never_touched(
    here: Sandbox, site: Callable[..., Sandbox]
) -> None:
    there = site(nodes=1, cluster="elsewhere")
    run_dir = run_folder(here, "mine")
    cv = words(here, "cv", "mine", "fold=0", "train.iterations=2000")
    assert here.bushpc(cv)[0].status == 0
    told = here.bushpc(["status", str(run_dir), "--json"])[0].said
    cell = next(cell for cell in json.loads(from_brace(told))["cells"] if cell["name"] == "fold0")
    number = int(cell["job_id"].partition("_")[0])
    for _ in range(number):  # strangers with all numbers up to the run's own
        stranger = there.sbatch("sleep 600", "--cpus-per-task=1", "--mem=10")
    assert stranger == str(number)

    answers = there.bushpc(["status", str(run_dir), "--json"], ["cancel", str(run_dir)], cv)
    assert set(there.squeue().values()) <= {"RUNNING", "PENDING"}, [answer.said for answer in answers]
    assert len(there.squeue()) == number, answers[2].said
    assert "elsewhere" in answers[1].said
    assert answers[1].status == answers[2].status == 2, "the cell's job is on the other cluster, and may run"
    assert here.squeue()[cell["job_id"]] in ("RUNNING", "PENDING")

    assert "cancelled: fold0" in here.bushpc(["cancel", str(run_dir)])[0].said
    here.wait(cell["job_id"].partition("_")[0])
    assert len(there.squeue()) == number, logs(run_dir)


def from_brace(text: str) -> str:
    """JSON that follows other words of a command."""
    return text[text.index("{") :]
