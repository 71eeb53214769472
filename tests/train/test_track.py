"""Promises of the tracker: each start leaves exactly one account, however it ends, and none of it can end a run."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest

from bushpc.runs.goodput import Attempt, goodput, read_attempts
from bushpc.runs.records import Heartbeat
from bushpc.train.track import HEARTBEAT_S, Tracker


@pytest.fixture
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_START_TIME"):
        monkeypatch.delenv(name, raising=False)


pytestmark = pytest.mark.usefixtures("no_slurm")


def recorded(cell_dir: Path) -> list[Attempt]:
    """The lines of attempts.jsonl, each of which must be whole."""
    lines = (cell_dir / "attempts.jsonl").read_text().splitlines()
    attempts = [Attempt.parse(json.loads(line)) for line in lines]
    assert None not in attempts
    return attempts


class Clock:
    """Stands in for time.monotonic; moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("bushpc.train.track.time.monotonic", clock)
    return clock


def test_every_moment_is_charged_to_one_cause(tmp_path, clock):
    tracker = Tracker(tmp_path, 10, active=True)
    tracker.phase("starting", 0)
    before_us = read_attempts(tmp_path)[0].seconds["start"]  # of the process, before there was a tracker
    clock.now += 3
    tracker.resumed(4)
    tracker.phase("training", 4)
    with tracker.spending("load"):
        clock.now += 1
    with tracker.spending("step"):
        clock.now += 5
        with tracker.spending("save"):
            clock.now += 2
            with tracker.spending("save"):
                clock.now += 2
        clock.now += 5
    clock.now += 0.5
    with contextlib.suppress(RuntimeError), tracker.spending("validate"):
        clock.now += 7
        raise RuntimeError
    with tracker.spending("evaluate"):
        clock.now += 11
    tracker.phase("done", 6)
    [attempt] = recorded(tmp_path)
    assert attempt.seconds == pytest.approx(
        {"start": before_us + 3, "load": 1, "step": 10, "save": 4, "other": 0.5, "validate": 7, "evaluate": 11}
    )
    assert (attempt.from_step, attempt.step, attempt.end) == (4, 6, "done")


def test_heartbeats_carry_the_account_of_the_running_attempt(tmp_path, clock):
    tracker = Tracker(tmp_path, 10, active=True, ranks=4, gpus=4)
    tracker.phase("training", 0)
    with tracker.spending("step"):
        clock.now += HEARTBEAT_S + 1
    tracker.alive(3)
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["phase"], state["step"], state["restarts"]) == ("training", 3, 0)
    [running] = read_attempts(tmp_path)
    assert (running.step, running.seconds["step"], running.ranks, running.gpus) == (3, HEARTBEAT_S + 1, 4, 4)
    assert not (tmp_path / "attempts.jsonl").exists()
    clock.now += HEARTBEAT_S / 2
    tracker.alive(4)
    assert read_attempts(tmp_path) == [running], "a heartbeat is not written at every step"


def train_until_killed(cell_dir: Path) -> None:
    tracker = Tracker(cell_dir, 10, active=True)
    tracker.resumed(0)
    tracker.phase("training", 0)
    with tracker.spending("step"):
        time.sleep(0.01)
    tracker.phase("training", 5)
    time.sleep(60)


def test_an_attempt_that_was_killed_is_recorded_by_the_next_exactly_once(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 60
    while not read_attempts(tmp_path) or read_attempts(tmp_path)[0].step < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    assert not (tmp_path / "attempts.jsonl").exists()

    again = Tracker(tmp_path, 10, active=True)
    assert again.attempt == 1
    [killed] = recorded(tmp_path)
    assert (killed.number, killed.pid, killed.step, killed.end) == (0, child.pid, 5, "")
    assert killed.seconds["step"] >= 0.01
    again.phase("stopped", 5)
    third = Tracker(tmp_path, 10, active=True)
    third.phase("done", 10)
    assert [(attempt.number, attempt.end) for attempt in recorded(tmp_path)] == [(0, ""), (1, "stopped"), (2, "done")]
    account = goodput(read_attempts(tmp_path))
    assert account is not None
    assert account.attempts == 3


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"\xff\x00", b'{"attempt": {"number": "x"}}', b'{"attempt": 3}'])
def test_a_damaged_heartbeat_stops_nothing_and_its_attempts_number_is_not_used_again(tmp_path, garbage):
    Tracker(tmp_path, 10, active=True).phase("stopped", 3)
    Tracker(tmp_path, 10, active=True).phase("training", 3)
    (tmp_path / "state.json").write_bytes(garbage)
    tracker = Tracker(tmp_path, 10, active=True)
    assert tracker.attempt == 2
    tracker.phase("done", 10)
    assert [attempt.number for attempt in recorded(tmp_path)] == [0, 2]


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path):
    Tracker(tmp_path, 10, active=True).phase("stopped", 3)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"number": 1, "jo')
    Tracker(tmp_path, 10, active=True).phase("done", 10)
    assert [attempt.number for attempt in read_attempts(tmp_path, Heartbeat())] == [0, 1]


def test_what_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, capsys):
    cell_dir = tmp_path / "cell"
    cell_dir.mkdir()
    tracker = Tracker(cell_dir, 10, active=True)
    shutil.rmtree(cell_dir)
    for step in range(3):
        tracker.train(step + 1, 0.5, {"dice": 0.5}, 1e-4)
        tracker.phase("training", step + 1)
    assert capsys.readouterr().out.count("cannot be written") == 1
    cell_dir.mkdir()
    tracker.phase("training", 4)
    assert json.loads((cell_dir / "state.json").read_text())["step"] == 4


def test_only_the_main_rank_writes(tmp_path):
    tracker = Tracker(tmp_path, 10, active=False)
    tracker.phase("training", 0)
    tracker.train(1, 0.5, {}, 1e-4)
    with tracker.spending("step"):
        tracker.alive(1)
    tracker.phase("done", 10)
    assert list(tmp_path.iterdir()) == []


def test_the_wait_for_a_job_is_queue_and_the_wait_after_a_preemption_requeue(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr("bushpc.train.track.process_start", lambda pid: None)  # as if it were a rank's, just started
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(now) - 5000))
    (tmp_path / "job.json").write_text(json.dumps({"submitted": int(now) - 5600}))
    tracker = Tracker(tmp_path, 10, active=True)
    tracker.phase("stopped", 3)
    account = goodput(read_attempts(tmp_path))
    assert account is not None
    assert account.seconds["queue"] == pytest.approx(600)
    assert account.seconds["start"] == pytest.approx(5000, abs=30)  # no sign of life since its job began

    # The job ran for 1000 s and came back 4000 s later, 100 s ago.
    [stopped] = recorded(tmp_path)
    old = json.loads(stopped.to_json()) | {"seconds": stopped.seconds | {"start": 900.0}}
    (tmp_path / "attempts.jsonl").write_text(json.dumps(old) + "\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(now) - 100))
    again = Tracker(tmp_path, 10, active=True)
    again.phase("done", 10)
    account = goodput(read_attempts(tmp_path))
    assert account is not None
    assert account.seconds["queue"] == pytest.approx(600)
    assert account.seconds["requeue"] == pytest.approx(4000, abs=30)
    assert account.seconds["idle"] == 0
    assert recorded(tmp_path)[1].seconds["start"] == pytest.approx(100, abs=30)


def test_an_allocation_that_was_there_before_is_not_taken_for_this_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(time.time()) - 90_000))
    (tmp_path / "job.json").write_text(json.dumps({"submitted": time.time()}))
    Tracker(tmp_path, 10, active=True).phase("done", 0)
    account = goodput(read_attempts(tmp_path))
    assert account is not None
    assert account.wall_s < 80_000
