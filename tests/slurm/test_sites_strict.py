"""Promises on a strict site: typed GPUs, an account and a partition per kind of job, no --mem, wckeys.

Daemons run as root, jobs and commands as `researcher`; trainings are tests/stand_in's.
"""

from __future__ import annotations

import shutil
import typing as t
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.sites import home, logs, run_folder, shares, until_reported, words

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Answer, Sandbox

pytestmark = pytest.mark.real

KINDS = (
    "typed-gpus",
    "type-required",
    "gpu-partition",
    "accounts",
    "refuses-mem",
    "wckeys",
    "autobind",
    "ordinary-user",
)
# What the site wants to be told.
GPU_JOBS = ("cluster.gpus=a100:1", "cluster.partition=gpu", "cluster.account=lab_gpu")
CPU_JOBS = ("cluster.cpu_jobs.partition=cpu", "cluster.cpu_jobs.account=lab_cpu")


@pytest.fixture(scope="module")
def strict(site: Callable[..., Sandbox], phantom_folder: Path) -> Sandbox:
    sandbox = site(*KINDS, cpus=2)  # no more than the machine has: tasks are bound to them
    shutil.copytree(phantom_folder, home(sandbox) / "phantom")
    sandbox.run(["chmod", "-R", "a+rX", str(home(sandbox) / "phantom")])
    return sandbox


def test_five_folds_run_and_are_reported_with_the_right_profile(strict: Sandbox) -> None:
    [answer] = strict.bushpc(words(strict, "cv", "right", *GPU_JOBS, *CPU_JOBS))
    assert answer.status == 0, answer.said
    assert until_reported(strict, "right")["complete"] is True
    assert {share["gpus"] for share in shares(run_folder(strict, "right")).values()} <= {"0", "1", "2", "3"}
    assert {path.owner() for path in run_folder(strict, "right").rglob("*")} == {"researcher"}


# What is wrong → a word of the message. All of it is refused by the site's own plugin or limits, or by bushpc before.
WRONG = {
    "cluster.gpus=1": "must name a type",
    "cluster.gpus=h100:1": "a100",
    "cluster.gpus=a100:5 cluster.cells_per_job=5": "4",
    "cluster.mem_gb=4": "--mem is not allowed",
    "cluster.account=nobody": "lab_gpu",
    "cluster.cpu_jobs.partition=gpu": "only jobs with GPUs",
    "cluster.cpu_jobs.account=null": "lab_cpu",
    "cluster.sbatch={wckey:other}": "wckey",
    "cluster.sbatch={licences:fast}": "licenses",
}


@pytest.fixture(scope="module")
def refusals(strict: Sandbox) -> dict[str, Answer]:
    """What each wrong profile is told. One process asks for all, as starting one takes seconds."""
    commands = [words(strict, "cv", f"wrong{k}", *GPU_JOBS, *CPU_JOBS, *wrong.split()) for k, wrong in enumerate(WRONG)]
    return dict(zip(WRONG, strict.bushpc(*commands), strict=True))


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_profile_is_refused_with_the_reason(refusals: dict[str, Answer], wrong: str) -> None:
    assert refusals[wrong].status == 2
    assert WRONG[wrong] in refusals[wrong].said
    assert "Traceback" not in refusals[wrong].said


def test_of_a_refused_run_nothing_is_queued(strict: Sandbox, refusals: dict[str, Answer]) -> None:
    names = strict.run(["sacct", "--allusers", "--allocations", "--noheader", "--parsable2", "--format=JobName"])
    assert "right" in names
    assert "wrong" not in names, refusals
    assert not list(home(strict).glob("runs/wrong*/cells/*/job.json"))


def test_a_job_in_a_hidden_partition_is_still_in_the_queue(strict: Sandbox) -> None:
    """Ordinary users see a hidden partition's jobs, even their own, only with --all."""
    cv, folder = words(strict, "cv", "hidden", *GPU_JOBS, *CPU_JOBS, "fold=0"), str(run_folder(strict, "hidden"))
    strict.run(["scontrol", "update", "PartitionName=gpu", "State=DOWN"])
    try:
        assert strict.bushpc(cv)[0].status == 0
        strict.run(["scontrol", "update", "PartitionName=gpu", "Hidden=yes"])
        status, again, cancelled = strict.bushpc(["status", folder], cv, ["cancel", folder])
    finally:
        strict.run(["scontrol", "update", "PartitionName=gpu", "State=UP", "Hidden=no"])
    assert "1 queued" in status.said
    assert "already running: fold0" in again.said
    assert "submitted" not in again.said
    assert "cancelled: fold0" in cancelled.said


def test_a_rank_has_the_cores_that_were_asked_for_where_tasks_are_bound(strict: Sandbox) -> None:
    [answer] = strict.bushpc(words(strict, "cv", "cores", *GPU_JOBS, *CPU_JOBS, "fold=0", "cluster.cpus_per_rank=2"))
    assert answer.status == 0, answer.said
    run_dir = run_folder(strict, "cores")
    strict.until(lambda: shares(run_dir), what=lambda: logs(run_dir))
    assert len(shares(run_dir)["fold0"]["cores"]) == 2
