"""Promises of `bushpc drill` on a real Slurm: every disturbance is tried, and no job left. Training is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.ops import drill as drill_module
from bushpc.ops.processes import processes_of

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Sandbox

STAND_IN = Path(__file__).resolve().parents[1] / "stand_in"
pytestmark = pytest.mark.real


@pytest.fixture
def words(tmp_path: Path, phantom_folder: Path) -> list[str]:
    setup = f'cluster.setup=["export PYTHONPATH={STAND_IN}"]'
    where = [f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}"]
    return ["model=unet_small", "data=phantom", "cluster=slurm", "train.batch_size=3", *where, setup]


def drills(slurm: Sandbox) -> list[str]:
    """Ids of jobs that are in the queue, report jobs and competitors included."""
    return slurm.run(["squeue", "--noheader", "--format=%i"]).split()


def test_every_disturbance_is_survived_and_no_job_is_left(slurm, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drill_module, "SECONDS_EACH", 1.5)
    status = main(["drill", "--json", "--preempt-with=--partition=high --exclusive", *words])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (status, found["ok"]) == (0, True), said.err
    outcomes = {outcome["how"]: outcome for outcome in found["outcomes"]}
    assert list(outcomes) == ["TERM", "USR2", "requeue", "KILL", "preempt"]
    for how, outcome in outcomes.items():
        assert outcome["by_itself"], how
        assert outcome["orphans"] == [], how
        assert outcome["lost"] == 0 or how == "KILL"
        # A requeued job waits until the credential of its last start has expired: 5 s in the sandbox.
        assert outcome["waited_s"] > 3, how
        assert outcome["ended_s"] + outcome["waited_s"] + outcome["started_s"] == pytest.approx(outcome["total_s"], 0.1)
    assert outcomes["KILL"]["sealed_s"] is None
    assert outcomes["TERM"]["sealed_s"] <= outcomes["TERM"]["ended_s"]
    assert found["ledgers"] == {"undisturbed": "exact", "disturbed": "exact"}
    assert found["notes"] == [], "one rank was killed, and not the whole step"
    slurm.until(lambda: not drills(slurm))
    assert processes_of(tmp_path / "runs") == []


def test_a_competitor_that_preempts_nothing_is_reported(slurm, words, capsys, monkeypatch):
    monkeypatch.setattr(drill_module, "SECONDS_EACH", 1.5)
    monkeypatch.setattr(drill_module, "QUEUE_WAYS", ())
    assert main(["drill", "--preempt-with=--partition=low", *words]) == 1
    assert "BROKEN: preemption `--partition=low` preempted nothing" in capsys.readouterr().out
    slurm.until(lambda: not drills(slurm))


def test_ctrl_c_takes_the_drill_out_of_the_queue(slurm, words, tmp_path):
    command = [sys.executable, "-m", "bushpc.cli", "drill", *words]
    process = subprocess.Popen(command, env={**os.environ, **slurm.env}, stderr=subprocess.PIPE, text=True)
    slurm.until(lambda: list(tmp_path.glob("runs/drill-*/*/cells/fold0/metrics.jsonl")))
    assert drills(slurm)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "the drill's jobs are cancelled" in said
    assert drills(slurm) == []
    slurm.until(lambda: not processes_of(tmp_path / "runs"))
