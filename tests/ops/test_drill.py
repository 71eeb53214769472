"""Promises of the drill: it passes what survives, and names what does not. Trainings are tests/stand_in's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bushpc.cli import main
from bushpc.config import compose
from bushpc.ops import drill as drill_module
from bushpc.ops.drill import compare_checkpoints, shorten
from bushpc.ops.processes import kill_rank, processes_of

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "stand_in"


@pytest.fixture
def words(tmp_path, phantom_folder, monkeypatch):
    """words("faulty") → overrides of a drill on this machine, whose training is the stand-in in that state."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # slots of their own, whatever else runs here
    monkeypatch.setattr(drill_module, "SECONDS_EACH", 0.5)

    def words(state: str = "") -> list[str]:
        setup = f'cluster.setup=["export PYTHONPATH={STAND_IN}","export STAND_IN={state}"]'
        where = [f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}"]
        return ["model=unet_small", "data=phantom", "cluster=local", "train.batch_size=3", *where, setup]

    return words


@pytest.fixture
def drill(words, capsys):
    """drill("faulty") → (exit status, what --json says) of a drill on this machine."""

    def run(state: str = "") -> tuple[int, dict]:
        status = main(["drill", "--json", *words(state)])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.real
def test_a_run_that_survives_passes_and_leaves_a_table_and_no_process(drill, tmp_path):
    status, found = drill()
    assert (status, found["ok"], found["faults"]) == (0, True, [])
    told, killed = found["outcomes"]
    assert (told["how"], told["lost"], told["orphans"], told["faults"]) == ("TERM", 0, [], [])
    assert (killed["how"], killed["orphans"], killed["faults"]) == ("KILL", [], [])
    assert 1 <= killed["lost"] <= found["save_every"]
    assert not told["by_itself"]
    parts = told["ended_s"] + told["waited_s"] + told["started_s"]
    assert parts == pytest.approx(told["total_s"], abs=0.05)
    assert 0 <= told["sealed_s"] <= told["ended_s"] < told["total_s"]
    assert (found["tensors"], found["differing"]) == (1, {})
    assert found["ledgers"] == {"undisturbed": "exact", "disturbed": "exact"}
    assert found["accounts"]["disturbed"]["attempts"] == 3
    assert found["accounts"]["disturbed"]["share"] < found["accounts"]["undisturbed"]["share"]
    assert processes_of(tmp_path / "runs") == []
    written = (Path(found["folder"]) / "drill.md").read_text()
    assert "| KILL of one rank | " in written
    assert written.rstrip().endswith("all as promised")


@pytest.mark.real
def test_lost_steps_and_weights_that_depend_on_the_stops_fail_the_drill(drill):
    status, found = drill("faulty")
    assert status == 1
    told, killed = found["outcomes"]
    assert told["lost"] > 0
    assert told["faults"] == [f"lost {told['lost']} steps, at most 0 are promised"]
    assert killed["faults"] == []
    assert list(found["differing"]) == ["model/weight"]
    assert found["faults"] == ["1 of 1 tensors of the last checkpoint differ from the undisturbed run's"]


@pytest.mark.real
def test_ctrl_c_ends_the_drills_jobs(words, tmp_path):
    command = [sys.executable, "-m", "bushpc.cli", "drill", *words()]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/drill-*/*/cells/fold0/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(tmp_path / "runs")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "the drill's jobs are cancelled" in said
    while processes_of(tmp_path / "runs") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(tmp_path / "runs") == []


def test_nobody_can_compete_on_one_machine(words, tmp_path, capsys):
    assert main(["drill", "--preempt-with=--partition=high", *words()]) == 2
    assert "cluster=slurm" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_short_training_leaves_room_for_every_disturbance(words, tmp_path):
    overrides = [*words(), "fold=0", "train.validate_every=5", "train.keep_best=dice", "train.keep=1"]
    cell = compose(overrides)
    short = shorten(cell, tmp_path, "disturbed", each=12, ways=4)
    assert (short.train.iterations, short.train.save_every, short.train.log_every) == (60, 4, 1)
    assert (short.train.keep, short.train.validate_every, short.train.keep_best) == (2, 0, None)
    assert short.run_dir == tmp_path / "disturbed"
    kept = ("model", "data", "seed", "augment", "prompting", "engine", "evaluate")
    assert all(getattr(short, name) == getattr(cell, name) for name in kept)


def test_the_short_training_gets_to_its_end_whatever_the_model_says_of_epochs_and_early_stops(words, tmp_path):
    tuned = ("train.epochs=100", "train.holdout=0.2", "train.schedule=constant", "train.stop_patience=1")
    short = shorten(compose([*words(), "fold=0", *tuned]), tmp_path, "disturbed", each=12, ways=4).train
    assert short.iterations == 60
    assert short.tuned  # what the schedule remembers is at stake, too
    assert short.stop_patience > short.iterations  # of losses, there is at most one a step


def test_the_batch_shell_notes_its_times_and_keeps_the_ranks_exit_status(tmp_path, phantom_folder):
    folder = tmp_path / "with a space"
    folder.mkdir()
    words = ["model=unet_small", "data=phantom", "cluster=slurm", "fold=0", f"data.root={phantom_folder}"]
    setup = shorten(compose(words), folder, "disturbed", each=12, ways=4).cluster.setup
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\nexit 75\n')
    (tmp_path / "srun").chmod(0o755)
    script = "\n".join([*setup, "trap 'echo \"status $?\"' EXIT", 'srun --quiet "a  b"'])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    before = time.time()
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("--quiet a  b\nstatus 75\n", "", 75)
    kinds, moments = zip(*(line.split() for line in (folder / "times").read_text().splitlines()), strict=True)
    assert kinds == ("start", "end")
    assert before - 0.01 <= float(moments[0]) <= float(moments[1]) <= time.time() + 0.01


@pytest.fixture
def two_checkpoints(tmp_path):
    """two_checkpoints(ours, theirs) → their comparison, each as the tensors of model.safetensors."""

    def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[int, dict[str, float]]:
        for name, tensors in (("ours", ours), ("theirs", theirs)):
            (tmp_path / name).mkdir()
            save_file(tensors, tmp_path / name / "model.safetensors")
        return compare_checkpoints(tmp_path / "ours", tmp_path / "theirs")

    return compare


def test_checkpoints_are_compared_bit_by_bit(two_checkpoints):
    a = {"same": torch.tensor([1.0, float("nan")]), "off": torch.tensor([1.0, 2.0]), "zero": torch.tensor([0.0])}
    b = {"same": torch.tensor([1.0, float("nan")]), "off": torch.tensor([1.0, 2.5]), "zero": torch.tensor([-0.0])}
    only = {"only": torch.tensor([1])}
    assert two_checkpoints(a, b | only) == (4, {"model/off": 0.5, "model/only": np.inf, "model/zero": 0.0})


def test_another_type_or_shape_is_another_tensor(two_checkpoints):
    a = {"type": torch.zeros(2), "shape": torch.zeros(2, 1)}
    b = {"type": torch.zeros(2, dtype=torch.float64), "shape": torch.zeros(1, 2)}
    assert two_checkpoints(a, b) == (2, {"model/shape": np.inf, "model/type": np.inf})


SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def start():
    """start(command, NAME=value) → a process with that environment, which ends with the test."""
    processes = []

    def start(command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(command, env={"PATH": os.environ["PATH"], **environment}))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def until_found(run_dir: Path, count: int) -> list:
    deadline = time.monotonic() + 120
    while len(found := processes_of(run_dir)) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_a_runs_processes_are_found_by_command_line_and_environment_and_nobody_elses(start, tmp_path):
    run_dir = tmp_path / "run"
    before = time.time()
    by_command = start([*SLEEP, f"{run_dir}/cells/fold0"])
    by_environment = start(SLEEP, PYTHONPATH=f"{run_dir}/code/1a", SLURM_JOB_ID="7", SLURMD_NODENAME="n3")
    start([*SLEEP, f"{run_dir}-longer/cells/fold0"])
    found = {process.pid: process for process in until_found(run_dir, 2)}
    assert found.keys() == {by_command.pid, by_environment.pid}
    assert (found[by_environment.pid].job, found[by_environment.pid].node) == ("7", "n3")
    assert before - 0.1 <= found[by_command.pid].started <= time.time()
    by_command.kill()
    assert [process.pid for process in until_found(run_dir, 1)][-1:] == [by_environment.pid]


def test_one_rank_is_killed_and_no_other(start, tmp_path):
    # As the ranks of a job look: their command names submitit's entry, and Slurm their number.
    task = [sys.executable, "-c", "import time; time.sleep(60)", "submitit.core._submit", f"{tmp_path}/run/jobs/1"]
    ranks = [start(task, SLURM_PROCID=str(number)) for number in range(2)]
    other = start([*SLEEP, f"{tmp_path}/run/cells"], SLURM_PROCID="1")
    assert {process.rank for process in until_found(tmp_path / "run", 3)} == {0, 1, None}
    assert kill_rank(tmp_path / "run", 1)
    assert ranks[1].wait(60) == -signal.SIGKILL
    assert ranks[0].poll() is None
    assert other.poll() is None
    assert not kill_rank(tmp_path / "run", 1)
