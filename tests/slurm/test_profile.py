"""Promises of cluster profiles on a real Slurm with typed GPUs: what it could never give is refused before the queue,
in its own numbers; a dry run prints what sbatch gets; and a first profile follows from what the site tells."""

from __future__ import annotations

import re
import shutil
import typing as t
from collections.abc import Callable
from pathlib import Path

import pytest

from bushpc.cluster import slurm_options, slurm_site
from bushpc.cluster.base import cluster_for
from bushpc.config import ClusterConfig
from tests.slurm.sites import home, run_folder, words

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Sandbox

pytestmark = pytest.mark.real

NUMBER = re.compile(r"(?<=-)[0-9a-f]{8}\b|(?<=afterany:).*")


@pytest.fixture(scope="module")
def typed(site: Callable[..., Sandbox], phantom_folder: Path) -> Sandbox:
    sandbox = site("typed-gpus", "local-disk")
    shutil.copytree(phantom_folder, home(sandbox) / "phantom")
    return sandbox


REFUSED = {
    "cluster.gpus=h100:1": r"no node of this cluster has GPUs of type h100; .* Valid: a100, v100.* 4 GPUs of type a100",
    "cluster.gpus=a100:8 cluster.cells_per_job=8": r"more than 4 GPUs of type a100; set cluster.gpus to at most 4",
    "cluster.gpus=a100:1 cluster.nodes=2 train.batch_size=4": r"this cluster has 1 nodes with what a cell asks for",
    "cluster.partition=lwo": r"unknown cluster.partition 'lwo'; did you mean 'low'",
    "cluster.mem_gb=900": r"no node of this cluster has 1 cores, 900 GB; it has 1 x 4 cores",
    "cluster.constraint=p100": r"unknown cluster.constraint 'p100'; did you mean '[av]100'",
    "cluster.sbatch.licence=sps": r"unknown option of sbatch 'licence'; did you mean 'licenses'",
    "cluster.sbatch.hnt=nomultithread": r"unknown option of sbatch 'hnt'; did you mean 'hint'",
    "cluster.sbatch.mail-type=ENDD": r"sbatch refuses --mail-type=ENDD: Invalid --mail-type specification",
    "cluster.srun.gpu_bid=none": r"unknown option of srun 'gpu-bid'; did you mean 'gpu-bind'",
    "cluster.cpu_jobs.partition=lwo": r"the report job, .*: unknown cluster.cpu_jobs.partition 'lwo'; did you",
    "cluster.submit_window=0": r"cluster.submit_window=0: must be ≥ 1",
}


def test_what_the_site_could_never_give_is_refused_before_anything_is_queued(typed: Sandbox) -> None:
    answers = typed.bushpc(*(words(typed, "cv", "refused", *each.split()) for each in REFUSED))
    for answer, (given, message) in zip(answers, REFUSED.items(), strict=True):
        assert answer.status == 2, f"{given}: {answer.said}"
        assert re.search(message, answer.said), f"{given}: {answer.said}"
    assert not run_folder(typed, "refused").exists()
    assert typed.squeue() == {}


def test_options_that_the_help_of_slurm_does_not_list_are_taken_where_slurm_takes_them(
    typed: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", typed.env["SLURM_CONF"])
    assert "hint" not in slurm_options.options_in(typed.run(["sbatch", "--help"]).splitlines())
    slurm_options.require_accepted("sbatch", ("--hint=nomultithread", "--spread-job"), typed.env["SLURM_CONF"])


def test_a_dry_run_prints_the_very_scripts_that_are_submitted_and_writes_nothing(typed: Sandbox) -> None:
    typed.run(["scontrol", "update", "PartitionName=low", "State=DOWN"])
    more = (
        "cluster.gpus=v100:1",
        "cluster.gres=[nvme:100]",
        "cluster.gpus_by=gres",
        "cluster.sbatch.hint=nomultithread",
    )
    command = words(typed, "cv", "dry", *more, "cluster.cpu_jobs.sbatch.nice=10")
    [dry] = typed.bushpc([*command, "--dry-run"])
    assert dry.status == 0, dry.said
    assert not run_folder(typed, "dry").exists()
    assert typed.squeue() == {}

    [real, again] = typed.bushpc(command, [*command, "--dry-run"])
    assert real.status == 0, real.said
    assert "# nothing is missing" in again.said
    sent = [path.read_text() for path in sorted(run_folder(typed, "dry").glob("jobs/*/*_submission.sh"))]
    typed.bushpc(["cancel", str(run_folder(typed, "dry"))])
    typed.run(["scontrol", "update", "PartitionName=low", "State=UP"])
    printed = re.split(r"^# --- .*\n", dry.said, flags=re.MULTILINE)[1:]
    assert len(printed) == 2
    assert {NUMBER.sub("", text).strip() for text in printed} == {NUMBER.sub("", text).strip() for text in sent}
    assert any("#SBATCH --gres=gpu:v100:1,nvme:100\n" in text for text in sent)


def test_a_first_profile_follows_from_what_the_site_tells(typed: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", typed.env["SLURM_CONF"])
    slurm = cluster_for("slurm")
    found = slurm.suggest(ClusterConfig(executor="slurm"))
    assert {key: found[key] for key in ("partition", "gpus")} == {"partition": "low", "gpus": "a100:1"}
    assert "partition" not in slurm.suggest(ClusterConfig(executor="slurm", partition="high"))
    told = {check.name: check.found for check in slurm.describe()}
    assert "1 x 4 cores" in told["partition low"]
    assert "4 GPUs of type v100; no time limit" in told["partition high"]
    assert slurm_site.gpu_types(ClusterConfig(executor="slurm")) == ["a100", "v100"]
