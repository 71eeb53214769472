"""Promises of lanes: every pack is in one, the site's limit is kept, and what a job does next follows from files."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time

import pytest

from bushpc.cluster.records import Limits, ThisJob
from bushpc.cluster.slurm_limits import explain_refusal
from bushpc.cluster.slurm_script import turn_lines
from bushpc.config import ClusterConfig
from bushpc.dispatch.lanes import choose, deal, share_out
from bushpc.dispatch.share import take_share
from bushpc.dispatch.turns import REPORT, next_turn
from bushpc.errors import DispatchError
from bushpc.runs.layout import RunDir
from bushpc.runs.records import LaneNote

SMALL, LARGE = ClusterConfig(executor="slurm"), ClusterConfig(executor="slurm", nodes=2)


def packs_of(count: int, name: str = "cell") -> list[list[str]]:
    return [[f"{name}{k}"] for k in range(count)]


@pytest.mark.parametrize(("packs", "jobs"), itertools.product((1, 2, 5, 20), (1, 2, 4, 30)))
def test_every_pack_is_dealt_once_and_no_lane_is_two_longer_than_another(packs, jobs):
    lanes = deal(packs_of(packs), jobs)
    assert sorted(pack for lane in lanes for pack in lane) == sorted(packs_of(packs))
    assert len(lanes) == min(jobs, packs)
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


@pytest.mark.parametrize("room", range(2, 9))
def test_jobs_are_shared_out_so_that_the_longest_lane_is_as_short_as_can_be(room):
    packs = {SMALL: 6, LARGE: 2}
    jobs = share_out(room, packs)
    best = min(
        max(packs[SMALL] / small, packs[LARGE] / large)
        for small, large in itertools.product(range(1, 7), range(1, 3))
        if small + large <= room
    )
    assert sum(jobs.values()) <= room
    assert max(packs[profile] / jobs[profile] for profile in packs) == best


def test_with_room_for_all_cells_and_the_report_there_is_a_job_for_each():
    way = choose({SMALL: packs_of(5)}, Limits(room=6), report="job", window=None)
    assert (way.lanes, way.report, way.jobs, way.said) == (False, "job", {SMALL: 5}, [])


def test_where_only_the_report_does_not_fit_the_last_cell_writes_it():
    way = choose({SMALL: packs_of(5)}, Limits(room=5, why="five"), report="job", window=None)
    assert (way.lanes, way.report, way.jobs) == (True, "last_cell", {SMALL: 5})


def test_what_was_taken_is_said_and_the_window_counts_what_is_there():
    way = choose({SMALL: packs_of(5)}, Limits(room=4, why="four"), report="job", live=1, window=4)
    assert way.jobs == {SMALL: 3}
    assert way.said == ["5 cells in 3 jobs: cluster.submit_window=4, 1 of them taken"]


def test_without_room_nothing_is_submitted_and_it_is_said_why():
    with pytest.raises(DispatchError, match=r"no room for a job: four are there\. Nothing was submitted"):
        choose({SMALL: packs_of(1)}, Limits(room=0, why="four are there"), report="job", window=None)


def test_cells_with_other_resources_wait_where_there_is_room_for_one_kind_only():
    way = choose(
        {SMALL: packs_of(5), LARGE: packs_of(2, "large")}, Limits(room=1, why="one"), report="job", window=None
    )
    assert way.jobs == {SMALL: 1}
    assert "2 cells need jobs with other resources" in way.said[1]


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ("sbatch: error: AssocMaxSubmitJobLimit sbatch: error: Batch job submission failed: Job violates", True),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit Job violates accounting/QOS policy", True),
        ("sbatch: error: MaxSubmitJobsPerAccount Job violates accounting/QOS policy (job submit limit, …)", True),
        ("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, …)", True),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit Job violates accounting/QOS policy (…)", False),
        ("sbatch: error: invalid partition specified: gpu", False),
    ],
)
def test_a_refusal_for_too_many_jobs_is_told_from_others(said, limit):
    explained = explain_refusal(said)
    assert (explained is not None) is limit
    assert explained is None or "cluster.submit_window=N" in explained


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run of three cells that one job works through."""
    run = RunDir(tmp_path)
    for name in "abc":
        run.cell(name).path.mkdir(parents=True)
    run.file.write_text(json.dumps({"cells": [{"name": name, "fold": 0} for name in "abc"]}))
    run.jobs.mkdir()
    LaneNote(packs=[["a"], ["b"], ["c"]], submitted=10.0, report=True).write(run.lane("x-0"))
    return run


def test_a_lane_goes_through_its_packs_and_writes_the_report_at_the_end(run):
    job, steps = ThisJob(executor="local", id="7", queue_id="7"), []
    status = None
    while (turn := next_turn(run, "x-0", job, status)) is not None:
        steps.append(turn)
        if turn != REPORT:
            run.cell("abc"[int(turn)]).done.write_text("{}")
        status = 0
    assert steps == ["0", "1", "2", REPORT]


def test_a_lane_that_comes_back_goes_on_where_it_was_and_passes_over_what_is_not_its_own(run):
    job = ThisJob(executor="local", id="7", queue_id="7")
    run.cell("a").failed.write_text("no\n")
    note = {"executor": "local", "job_id": "8", "log": "", "submitted": 11.0, "host": None, "process_start": None}
    run.cell("b").job_note.write_text(json.dumps(note))  # submitted again since
    assert next_turn(run, "x-0", job, None) == "2"
    assert next_turn(run, "x-0", job, None) == "2"
    run.cell("c").job_note.write_text(json.dumps({**note, "submitted": 10.0, "cancelled": 12.0}))
    assert next_turn(run, "x-0", job, None) == REPORT, "no job will work on b: its process has ended"


def test_the_batch_shell_starts_the_ranks_once_for_each_turn_and_a_signal_ends_neither(tmp_path):
    """The lines of a real batch script in a real shell; a small program is asked for turns, another is srun."""
    ask = tmp_path / "ask.py"
    ask.write_text(
        "import os, signal, sys, time\n"
        "open('asked', 'a').write(sys.argv[-1] + ' ')\n"
        "time.sleep(0.3)\n"
        "turn = len(open('asked').read().split()) - 1\n"
        "sys.exit(1) if turn == 3 else print(turn)\n"
    )
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\necho $BUSHPC_TURN $1 >> {tmp_path}/ran\nexit $((BUSHPC_TURN * 5))\n")
    srun.chmod(0o755)
    script = "\n".join([*turn_lines([sys.executable, str(ask)]), "srun --unbuffered", "echo ended $? >> ran"])
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shell = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=env, start_new_session=True)
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    os.killpg(shell.pid, 15)  # as the cluster does: the question, too, gets it
    assert shell.wait(60) == 0
    assert (tmp_path / "asked").read_text() == "none 0 5 10 "
    assert (tmp_path / "ran").read_text() == "0 --unbuffered\n1 --unbuffered\n2 --unbuffered\nended 10\n"


@pytest.mark.parametrize(
    ("variables", "gpus", "shares"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, ["0", "1", "2", "3"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2, ["GPU-a", "GPU-a", "GPU-b", "GPU-b"]),
        ({"CUDA_VISIBLE_DEVICES": "2"}, 1, ["2", "2", "2", "2"]),
        ({}, 4, ["0", "1", "2", "3"]),
        ({}, 0, [None, None, None, None]),
    ],
)
def test_each_cell_of_a_whole_node_has_its_own_gpu(monkeypatch, variables, gpus, shares):
    seen = []
    for number in range(4):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        take_share(number, 4, gpus)
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert seen == shares


def test_cores_are_shared_out_where_the_job_has_all_that_it_may_run_on():
    code = (
        "import os, sys; from bushpc.dispatch.share import take_share; take_share(int(sys.argv[1]), 2, 0)\n"
        "print(sorted(os.sched_getaffinity(0)))"
    )
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")

    def left(number: int, told: int) -> list[int]:
        env = {**os.environ, "SLURM_CPUS_ON_NODE": str(told)}
        done = subprocess.run(
            [sys.executable, "-c", code, str(number)], env=env, capture_output=True, text=True, check=True
        )
        return list(json.loads(done.stdout))

    half = len(cores) // 2
    assert [left(0, len(cores)), left(1, len(cores))] == [cores[:half], cores[half:]]
    assert left(0, 1) == cores, "bound already, or shared with other jobs"
