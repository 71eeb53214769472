"""Promises of the watchdog: a rank that hangs ends in time and says where; one that works is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from bushpc.process import children, process_start
from bushpc.runs.layout import CellDir
from bushpc.train.watchdog import Watchdog

RANK = """
import ctypes, multiprocessing, sys, time
from pathlib import Path
from bushpc.train.watchdog import Watchdog

def waits_in_python():
    time.sleep(60)

def waits_in_c_with_the_interpreter_lock():
    while True:  # a signal wakes it
        ctypes.PyDLL(None).sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    with Watchdog(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])) as watchdog:
        worker.start()
        print(worker.pid, flush=True)
        for step in range(3):
            watchdog.alive(f"step {step}")
            time.sleep(0.2)
        globals()[sys.argv[4]]()
"""


def start_rank(tmp_path, rank: int, hang_s: float, waits: str) -> subprocess.Popen[str]:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, str(script), str(tmp_path), str(rank), str(hang_s), waits]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_hung_ranks_end_with_their_stacks_their_workers_and_one_reason(tmp_path):
    waits = ["waits_in_python", "waits_in_c_with_the_interpreter_lock"]
    ranks = [start_rank(tmp_path, rank, 4.0, how) for rank, how in enumerate(waits)]
    heard = [rank.communicate(timeout=300) for rank in ranks]
    for rank, (how, process, (out, err)) in enumerate(zip(waits, ranks, heard, strict=True)):
        assert process.returncode == -signal.SIGKILL
        stacks = CellDir(tmp_path).stacks(rank)
        assert f"rank {rank} made no progress for 4 s, last: step 2 (" in err
        assert f"; stacks: {stacks}" in err
        assert how in stacks.read_text()
        assert process_start(int(out)) is None
    failed = (tmp_path / "FAILED").read_text()
    assert failed.count("made no progress") == 1


def test_a_suspended_job_does_not_hang(tmp_path):
    rank = start_rank(tmp_path, 0, 8.0, "waits_in_python")
    worker = int(rank.stdout.readline())
    [guard] = [pid for pid in children(rank.pid) if pid != worker]
    both = (rank.pid, guard)
    time.sleep(0.5)
    for pid in both:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(9)  # longer than hang_s, while all that it does awake takes far less
    for pid in both:
        os.kill(pid, signal.SIGCONT)
    time.sleep(0.5)
    assert not (tmp_path / "FAILED").exists()
    for pid in (*both, worker):
        os.kill(pid, signal.SIGKILL)
    rank.communicate()


def test_a_guard_ends_with_its_rank_and_no_stop_signal_ends_it_before(tmp_path):
    rank = start_rank(tmp_path, 0, 100.0, "waits_in_python")
    worker = int(rank.stdout.readline())
    [guard] = [pid for pid in children(rank.pid) if pid != worker]
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(guard, number)
    time.sleep(0.3)
    assert guard in children(rank.pid)
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 60
    while process_start(guard):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    rank.communicate()


def test_a_rank_that_works_is_left_alone_and_leaves_nothing_behind(tmp_path):
    before = children(os.getpid())
    with Watchdog(tmp_path, 0, 6.0) as watchdog:
        for step in range(40):
            watchdog.alive(f"step {step}")
            time.sleep(0.2)
    assert list((tmp_path / "hang").iterdir()) == []
    assert children(os.getpid()) == before


def test_stacks_can_be_asked_for_at_any_time_without_ending_the_rank(tmp_path):
    with Watchdog(tmp_path, 3, 100.0):
        os.kill(os.getpid(), signal.SIGQUIT)
    assert "test_stacks_can_be_asked_for_at_any_time" in CellDir(tmp_path).stacks(3).read_text()


def test_nothing_is_watched_where_it_is_switched_off(tmp_path):
    before = children(os.getpid())  # other tests may have left helpers of multiprocessing
    with Watchdog(tmp_path, 0, 0) as watchdog:
        watchdog.alive("step 1")
        assert children(os.getpid()) == before
    assert list(tmp_path.iterdir()) == []


def test_a_guard_that_falls_behind_does_not_stop_its_rank(tmp_path):
    before = children(os.getpid())
    with Watchdog(tmp_path, 0, 100.0) as watchdog:
        [guard] = set(children(os.getpid())) - set(before)
        os.kill(guard, signal.SIGSTOP)
        for step in range(20_000):  # more than a pipe holds
            watchdog.alive(f"step {step}")
