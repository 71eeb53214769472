"""Promises of `bushpc doctor --slurm` on a real Slurm: it finds the known facts about signals, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import typing as t
from collections.abc import Callable
from pathlib import Path

import pytest

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Sandbox

pytestmark = pytest.mark.real

STOPPED = {"CONT", "TERM"}
OF_A_RANK = ("rank0", "child0")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return ["model=unet_small", "data=phantom", "cluster=slurm", f"runs_dir={tmp_path / 'runs'}"]


def examine(sandbox: Sandbox, *words: str) -> dict[str, t.Any]:
    """`bushpc doctor --slurm --json` on the sandbox, as a user runs it."""
    command = [sys.executable, "-m", "bushpc.cli", "doctor", "--slurm", "--json", *words]
    done = subprocess.run(command, env=sandbox.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, t.Any] = json.loads(done.stdout)
    return found


def story(found: dict[str, t.Any], how: str) -> dict[str, t.Any]:
    [one] = [story for story in found["stories"] if story["how"] == how]
    return one


def check(found: dict[str, t.Any], name: str) -> dict[str, str]:
    [one] = [check for check in found["checks"] if check["name"] == name]
    return one


def heard(story: dict[str, t.Any], source: str) -> list[str]:
    """The signals that a process heard before its KILL, each once, in the order of their first coming."""
    return list(dict.fromkeys(name for _, name in story["heard"][source]))


def probes(sandbox: Sandbox) -> list[str]:
    """Command lines of the probe's processes, wherever they ended up."""
    return [line for line in sandbox.processes().values() if "bushpc.ops.probe" in line or "submitit" in line]


def test_two_nodes_are_surveyed_and_the_profile_says_what_was_found(
    slurm: Sandbox,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bushpc.cli import main
    from bushpc.config import compose

    configs = tmp_path / "configs"
    configs.mkdir()
    monkeypatch.setenv("BUSHPC_CONFIGS", str(configs))
    words = [*words, "cluster.nodes=2"]
    assert main(["doctor", "--slurm", "--json", "--write", "here", *words]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)

    # An external requeue tells every process at once, and kills after KillWait (5 s in the sandbox).
    requeue = story(found, "requeue")
    for source in ("rank0", "rank1", "child0", "child1", "batch"):
        assert set(heard(requeue, source)) == STOPPED, source
    assert 1 < requeue["kill_s"] < 60
    # scancel --signal reaches ranks and their children, not the batch shell.
    told = story(found, "signal")
    assert {name for source in ("rank0", "rank1", "child0", "child1") for _, name in told["heard"][source]} == {"TERM"}
    assert told["heard"]["batch"] == []

    assert {fact["environment"]["SLURMD_NODENAME"] for fact in found["nodes"].values()} == {"n1", "n2"}
    assert {check(found, f"{name} on the node")["found"] for name in ("squeue", "scontrol", "sacct")} == {"works"}
    assert "KillWait=5 sec" in check(found, "Slurm says")["found"]
    assert check(found, "clock of the node")["verdict"] == "ok"
    assert "submitted probe job" in said.err

    cluster = compose([*words, "cluster=here"]).cluster
    assert cluster.grace_s == found["grace_s"] == pytest.approx(requeue["kill_s"], abs=0.06)
    profile = (configs / "cluster" / "here.yaml").read_text().replace("\n#   ", " ")
    assert f"KILL after {requeue['kill_s']:.1f} s\n" in profile

    assert probes(slurm) == []
    # A second writing asks for --force before it submits anything.
    jobs = slurm.squeue()
    assert main(["doctor", "--slurm", "--write", "here", *words]) == 2
    assert "--force" in capsys.readouterr().err
    assert set(slurm.squeue()) <= set(jobs)


def test_a_preemption_is_told_by_usr2_where_the_site_sends_it_and_killed_after_grace_and_kill_wait(
    make_sandbox: Callable[..., Sandbox], words: list[str]
) -> None:
    sandbox = make_sandbox("--nodes", "1", "--no-accounting", "--grace", "2", "--user-signal")
    found = examine(sandbox, *words, "--preempt-with=--partition=high --exclusive")
    preempted = story(found, "preempt")
    for source in OF_A_RANK:
        assert [name for name in heard(preempted, source) if name != "CONT"] == ["USR2", "TERM"], source
    # The batch shell is told only when the grace time is over.
    assert set(heard(preempted, "batch")) == STOPPED
    assert min(at for at, name in preempted["heard"]["batch"] if name == "TERM") > 1
    assert preempted["kill_s"] > story(found, "requeue")["kill_s"]
    assert "preemption sends USR2 first" in check(found, "Slurm says")["found"]
    # No accounting: sacct fails on both sides, and that is no more than a warning.
    assert check(found, "sacct")["verdict"] == check(found, "sacct on the node")["verdict"] == "warning"
    assert probes(sandbox) == []


def test_ctrl_c_takes_the_probe_out_of_the_queue(slurm: Sandbox, words: list[str]) -> None:
    before = set(slurm.squeue())
    command = [sys.executable, "-m", "bushpc.cli", "doctor", "--slurm", *words]
    doctor = subprocess.Popen(command, env={**os.environ, **slurm.env}, stderr=subprocess.PIPE, text=True)
    assert doctor.stderr is not None
    assert any("submitted probe job" in line for line in doctor.stderr)
    doctor.send_signal(signal.SIGINT)
    _, said = doctor.communicate(timeout=300)
    assert doctor.returncode == 130
    assert "the probe jobs are cancelled" in said
    mine = {state for job, state in slurm.squeue().items() if job not in before}
    assert mine <= {"CANCELLED", "FAILED"}
    slurm.until(lambda: not probes(slurm))
