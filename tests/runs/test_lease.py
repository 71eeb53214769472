"""Promises of the lease: one holder, a dead one loses, a stopped one notices, and of two takers one wins."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bushpc.cluster.base import this_job
from bushpc.errors import ResumeError
from bushpc.process import process_start
from bushpc.runs.lease import Lease, LeaseError, StoppedWaiting

# Holds a lease, says so, and checks it for every line it is given.
HOLDER = """
import sys
from pathlib import Path
from bushpc.cluster.base import this_job
from bushpc.runs.lease import Lease, LeaseError
try:
    with Lease(Path(sys.argv[1]), job=this_job(), renew_s=0.05, ttl_s=float(sys.argv[2])) as lease:
        print("held", flush=True)
        for line in sys.stdin:
            lease.check()
            print("mine", flush=True)
except LeaseError as error:
    print("lost", error, flush=True)
"""


class Process:
    """A process of its own that holds, or tries to hold, the lease of `folder`."""

    def __init__(self, folder: Path, ttl_s: float = 60.0, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), str(ttl_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def hears(self) -> str:
        return self.process.stdout.readline().strip()

    def checks(self) -> str:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hears()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    started = []

    def start(ttl_s: float = 60.0, **environment: str) -> Process:
        started.append(Process(tmp_path, ttl_s, **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.process.stdin.close()
        process.process.stdout.close()


def holder_file(folder: Path) -> Path:
    [path] = folder.glob("lease.*.json")
    return path


def as_of_another_machine(folder: Path, **changes: object) -> None:
    """Rewrite who holds the lease, as a process of another node would have written it; its date stays."""
    path = holder_file(folder)
    dated = path.stat().st_mtime
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "another", **changes}))
    os.utime(path, (dated, dated))


def test_a_second_process_is_refused_and_told_who_works_there(start, tmp_path):
    holder = start(SLURM_JOB_ID="77")
    assert holder.hears() == "held"
    with pytest.raises(ResumeError, match=f"job 77, process {holder.process.pid} on "), Lease(tmp_path):
        pass
    assert holder.checks() == "mine"


def test_a_killed_holder_of_this_machine_is_replaced_at_once(start, tmp_path):
    holder = start()
    assert holder.hears() == "held"
    holder.kill()
    began = time.monotonic()
    with Lease(tmp_path) as lease:
        lease.check()
    assert time.monotonic() - began < 30  # waiting for it takes 60 s


def test_one_that_left_is_followed_at_once_even_from_another_machine(tmp_path):
    with Lease(tmp_path):
        pass
    as_of_another_machine(tmp_path)
    began = time.monotonic()
    with Lease(tmp_path) as lease:
        lease.check()
    assert time.monotonic() - began < 30  # waiting for it takes 60 s


def test_a_silent_holder_of_another_machine_is_waited_for_until_its_time_is_over(tmp_path):
    with Lease(tmp_path):
        pass
    as_of_another_machine(tmp_path)
    os.utime(holder_file(tmp_path))  # it renewed a moment ago
    began = time.monotonic()
    with Lease(tmp_path, ttl_s=1.0) as lease:
        lease.check()
    assert time.monotonic() - began > 0.9


def test_a_holder_that_lives_is_not_taken_for_dead_because_its_clock_is_late(tmp_path):
    with Lease(tmp_path):
        pass
    as_of_another_machine(tmp_path)
    path, left = holder_file(tmp_path), threading.Event()

    def renew_by_a_clock_an_hour_late() -> None:
        while not left.wait(0.2):
            os.utime(path, (time.time() - 3600, time.time() - 3600))

    os.utime(path, (time.time() - 3600, time.time() - 3600))
    renewer = threading.Thread(target=renew_by_a_clock_an_hour_late)
    renewer.start()
    try:
        with pytest.raises(LeaseError, match="another process works on"), Lease(tmp_path, renew_s=2.0):
            pass
    finally:
        left.set()
        renewer.join()
    with Lease(tmp_path, renew_s=2.0) as lease:  # silent now, and old: two renewals of it are waited for
        lease.check()


def test_a_stop_signal_ends_the_wait_for_a_silent_holder(tmp_path):
    with Lease(tmp_path):
        pass
    as_of_another_machine(tmp_path)
    os.utime(holder_file(tmp_path))
    answers = iter([False, True])
    with pytest.raises(StoppedWaiting), Lease(tmp_path, stop=lambda: next(answers)):
        pass
    assert holder_file(tmp_path).name == "lease.1.json"


def test_an_earlier_start_of_the_same_job_is_followed_at_once_and_another_job_is_not(tmp_path, monkeypatch):
    with Lease(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    naps, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (naps.append(seconds), sleep(seconds)))
    for job_id, restart, at_once in (("8", 1, True), ("8", 2, False), ("9", 1, False)):
        as_of_another_machine(tmp_path, job_id=job_id, restart=restart)
        os.utime(holder_file(tmp_path))
        naps.clear()
        with Lease(tmp_path, job=this_job(), ttl_s=0.8):
            assert (not naps) is at_once, (job_id, restart)


def test_a_holder_that_was_stopped_for_long_notices_before_it_writes(start, tmp_path):
    sleeper = start(ttl_s=0.5)
    assert sleeper.hears() == "held"
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    with Lease(tmp_path, ttl_s=0.5) as lease:
        os.kill(sleeper.process.pid, signal.SIGCONT)
        assert f"lost {tmp_path} belongs to process {os.getpid()} on " in sleeper.checks()
        sleeper.process.wait(timeout=300)
        lease.check()  # it did not take ours with it when it left
    assert len(list(tmp_path.glob("*lease*"))) == 1


def test_a_file_server_that_is_away_for_a_moment_ends_no_holder_and_one_that_stays_away_does(tmp_path, monkeypatch):
    answers = os.listdir
    away = [OSError(errno.ESTALE, "Stale file handle")] * 2

    def listdir(folder):
        if away:
            raise away.pop()
        return answers(folder)

    with Lease(tmp_path, renew_s=0.05, ttl_s=4.0) as lease:
        monkeypatch.setattr(os, "listdir", listdir)
        lease.check()
        assert not away
        away += [OSError(errno.EIO, "Input/output error")] * 100
        with pytest.raises(LeaseError, match=r"could not be found out for 4 s \(.*Input/output error"):
            lease.check()
        away.clear()


def test_of_many_takers_exactly_one_wins(start, tmp_path):
    for _ in range(3):
        dead = start()
        assert dead.hears() == "held"
        dead.kill()
        takers = [start() for _ in range(6)]
        with ThreadPoolExecutor() as pool:
            heard = list(pool.map(Process.hears, takers))
        [winner] = [taker for taker, word in zip(takers, heard, strict=True) if word == "held"]
        assert sum(word.startswith("lost another process works on") for word in heard) == 5
        assert winner.checks() == "mine"
        winner.kill()


def test_a_slow_taker_that_judged_by_an_old_state_backs_off(tmp_path):
    class Slow(Lease):
        """Sees the folder as it was before the first holder came, as a network file system may show it once."""

        stale = True

        def _numbers(self) -> list[int]:
            seen = [] if self.stale else super()._numbers()
            self.stale = False
            return seen

    with Lease(tmp_path):
        pass
    with (
        Lease(tmp_path, renew_s=0.05) as second,  # number 2; 1 is deleted
        pytest.raises(LeaseError, match="another process works on"),
        Slow(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.glob("lease.*")] == ["lease.2.json"], second


@pytest.mark.parametrize("garbage", [b"", b"\xff\x00", b"[]", b'{"pid": 1}', b"null"])
def test_a_lease_that_cannot_be_read_is_waited_out(tmp_path, garbage):
    (tmp_path / "lease.4.json").write_bytes(garbage)
    with Lease(tmp_path, ttl_s=0.3) as lease:
        lease.check()
    assert holder_file(tmp_path).name == "lease.5.json"


def test_a_process_is_named_by_its_start_so_that_a_reused_id_is_not_taken_for_it():
    assert process_start(os.getpid()) == process_start(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody took note yet
    assert process_start(child) is None, "a zombie does not live"
    os.waitpid(child, 0)
    assert process_start(child) is None
