"""Promises of `bushpc init`: a profile that composes, from answers or words; wrong ones leave nothing behind."""

from __future__ import annotations

import io
import json

import pytest

from bushpc.cli import main
from bushpc.config import compose
from tests.ops.fake_slurm import FAKE

ACCOUNTS = 'case "$*" in *defaultaccount*) echo lab;; *) echo "lab|normal,long"; echo "old|normal";; esac'
NODES = "echo 'gpu*|64|512000|gpu:a100:8(S:0-1)|a100,ib|3|mix'; echo 'cpu|32|128000|(null)|cpu|40|idle'"
CPU = "echo PartitionName=cpu Default=NO MaxTime=30 MaxNodes=1 State=UP GraceTime=0 PreemptMode=OFF"


@pytest.fixture
def site(fake_slurm, tmp_path, monkeypatch):
    """The folder of profiles at a site with a partition of 8 A100s a node, a day long, and one without GPUs."""
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.setenv("BUSHPC_CONFIGS", str(folder))
    scontrol = FAKE["scontrol"].replace("echo PartitionName=gpu", f"{CPU}; echo PartitionName=gpu")
    scontrol = scontrol.replace('echo "JobRequeue', 'echo "ClusterName = Lab 7"; echo "JobRequeue')
    fake_slurm(**FAKE | {"sacctmgr": ACCOUNTS, "sinfo": NODES, "scontrol": scontrol})
    return folder / "cluster"


def init(*words: str, answers: str = "", monkeypatch: pytest.MonkeyPatch | None = None) -> int:
    if monkeypatch:
        monkeypatch.setattr("sys.stdin", io.StringIO(answers))
    return main(["init", *words])


def test_enter_six_times_takes_what_the_site_tells(site, monkeypatch, capsys):
    assert init(answers="\n" * 6, monkeypatch=monkeypatch) == 0
    assert "written: " in capsys.readouterr().out
    cluster = compose(["cluster=lab_7"]).cluster
    assert (cluster.partition, cluster.account, cluster.gpus, cluster.time_min) == ("gpu", "lab", "a100:1", 1440)
    # An eighth of a node of 64 cores; the report's partition allows half an hour.
    assert (cluster.cpus_per_rank, cluster.cpu_jobs.partition, cluster.report_time_min) == (8, "cpu", 30)
    assert [path.name for path in site.iterdir()] == ["lab_7.yaml"]


def test_a_wrong_answer_is_explained_and_asked_again(site, monkeypatch, capsys):
    answers = ["no way", "mine", "gpuu", "gpu", "labb", "old", "h100:1", "a100:2", "1:00", "2000", "90", "-"]
    assert init(answers="\n".join([*answers, ""]), monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().err
    for reason in ("a name of letters", "did you mean 'gpu'?", "did you mean 'lab'?", "GPUs of type h100", "int ≥ 1"):
        assert reason in said
    assert "gpu allow at most 1440 minutes" in said
    cluster = compose(["cluster=mine"]).cluster
    assert (cluster.account, cluster.gpus, cluster.ranks_per_node, cluster.time_min) == ("old", "a100:2", 2, 90)
    assert cluster.cpu_jobs.partition is None


def test_a_script_gives_words_and_gets_json(site, capsys):
    assert init("--name", "mine", "--yes", "--json", "cluster.setup=[module load cuda]", "cluster.time_min=60") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["profile"] == str(site / "mine.yaml")
    assert found["settings"]["setup"] == ["module load cuda"]
    assert (found["settings"]["time_min"], found["settings"]["gpus"]) == (60, "a100:1")
    assert {"name", "verdict", "found", "advice"} == set(found["checks"][0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.partition=gpuu"], "did you mean 'gpu'?"),
        (["partition=gpu"], "did you mean 'cluster.partition=gpu'?"),
        (["train.lr=1"], "has settings of cluster. alone"),
        (["cluster.account=labb"], "did you mean 'lab'?"),
        (["cluster.time_min=1441"], "gpu allow at most 1440 minutes"),
        (["--name", "../x"], "a name of letters"),
        (["--name", "local"], "local.yaml exists; choose another name"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(words, said, site, capsys):
    assert init("--yes", *words) == 2
    assert said in capsys.readouterr().err
    assert not site.exists()


def test_a_profile_is_only_replaced_by_force(site, capsys):
    assert init("--yes", "--name", "mine", "cluster.time_min=60") == 0
    before = (site / "mine.yaml").read_text()
    assert init("--yes", "--name", "mine") == 2
    assert "overwrite it with --force" in capsys.readouterr().err
    assert (site / "mine.yaml").read_text() == before
    assert init("--yes", "--name", "mine", "--force") == 0
    assert compose(["cluster=mine"]).cluster.time_min == 1440


def test_where_nobody_answers_the_flags_are_named(site, monkeypatch, capsys):
    assert init(answers="mine\n", monkeypatch=monkeypatch) == 2
    assert "nobody answers 'Partition of the jobs that train'" in capsys.readouterr().err
    assert not site.exists()


def test_without_slurm_it_says_so(fake_slurm, capsys):
    fake_slurm(true="")
    assert init("--yes") == 2
    assert "Slurm does not answer here" in capsys.readouterr().err
