"""Promises while Slurm's controller is away: what is asked of it waits, and nothing is submitted twice.

Its commands are stand-ins that fail with Slurm's own words; tools/bad_days does the same to a real one.
"""

from pathlib import Path

import pytest

from bushpc.cluster.base import NoAnswer, cluster_for
from bushpc.cluster.records import Job, JobRequest
from bushpc.cluster.slurm import SlurmCluster
from bushpc.config import ClusterConfig
from bushpc.errors import DispatchError

LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
GONE = "Unable to contact slurm controller (connect failure)"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(command=shell lines, …): these commands of Slurm. Each notes its arguments in `said`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))  # the cluster's name is kept for each
    monkeypatch.setattr("bushpc.cluster.base.PAUSE_S", 0.01)
    said = tmp_path / "said"

    def make(**commands: str) -> Path:
        for name, lines in commands.items():
            # nth: how often this command has been called.
            script = f'#!/bin/sh\necho {name} "$@" >>{said}\nnth=$(grep -c "^{name} " {said})\n{lines}\n'
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        return said

    return make


def request(tmp_path: Path) -> JobRequest:
    return JobRequest(name="run-1234", work=[print], folder=tmp_path / "jobs", profile=ClusterConfig(), setup=[])


def failing(times: int, words: str, then: str) -> str:
    return f"[ $nth -gt {times} ] || {{ echo '{words}' >&2; exit 1; }}\n{then}"


CONFIG = "echo 'ClusterName = here'"


def test_a_submission_whose_answer_was_lost_is_repeated_and_the_job_that_slurm_had_taken_is_cancelled(
    slurm, tmp_path, capsys
):
    said = slurm(
        scontrol=CONFIG,
        sbatch=failing(1, LOST, "echo Submitted batch job 8"),
        squeue="echo 7",
        scancel="exit 0",
    )
    [job] = cluster_for("slurm").submit(request(tmp_path))
    assert (job.id, job.name, job.cluster) == ("8", "run-1234", "here")
    lines = said.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["scontrol", "sbatch", "squeue", "scancel", "sbatch"]
    assert "--name=run-1234" in lines[2]
    assert lines[3] == "scancel 7"
    assert "asking again for 120 s" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["scontrol", "sbatch"])
def test_a_submission_waits_for_the_controller(slurm, tmp_path, word):
    commands = {"scontrol": CONFIG, "sbatch": "echo Submitted batch job 8", "squeue": "", "scancel": "exit 1"}
    said = slurm(**{**commands, word: failing(3, GONE, commands[word])})
    assert [job.id for job in cluster_for("slurm").submit(request(tmp_path))] == ["8"]
    assert sum(line.startswith(f"{word} ") for line in said.read_text().splitlines()) == 4


def test_it_gives_up_after_the_stated_time_and_other_refusals_are_not_repeated(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr("bushpc.cluster.base.PATIENCE_S", 0.1)
    said = slurm(scontrol=CONFIG, sbatch=f"echo '{GONE}' >&2; exit 1", squeue="")
    with pytest.raises(NoAnswer, match="Unable to contact"):
        cluster_for("slurm").submit(request(tmp_path))
    assert said.read_text().count("sbatch") > 1
    said.unlink()
    slurm(sbatch="echo 'Invalid account or account/partition combination' >&2; exit 1")
    with pytest.raises(DispatchError, match="Invalid account"):
        cluster_for("slurm").submit(request(tmp_path))
    assert said.read_text().count("sbatch") == 1


def test_the_trial_before_a_submission_waits_too_and_calls_no_silence_a_refusal(slurm, tmp_path):
    slurm(scontrol=CONFIG, sbatch=failing(2, f"allocation failure: {GONE}", "exit 0"))
    assert cluster_for("slurm").refusal(request(tmp_path)) == ""


def test_limits_are_asked_for_again(slurm):
    slurm(scontrol=failing(2, f"slurm_load_ctl_conf error: {GONE}", "echo 'MaxArraySize = 42'"), squeue="")
    assert cluster_for("slurm").limits(ClusterConfig()).jobs_at_once == 42


def test_which_cluster_this_is_is_no_answer_either_while_the_controller_is_away(slurm):
    slurm(scontrol=f"echo '{GONE}' >&2; exit 1", squeue=f"echo '{GONE}' >&2; exit 1")
    with pytest.raises(NoAnswer):
        SlurmCluster().states([Job(id="1", executor="slurm", cluster="elsewhere")])
