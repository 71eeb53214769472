"""Promises of the stop flag: signals and a near time limit raise it, and nothing of it needs torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bushpc.cluster.base import time_limit
from bushpc.process import process_start
from bushpc.train.preempt import StopFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_signal_raises_the_flag_and_names_itself(number):
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)]
    with StopFlag():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)] == before


def test_the_flag_rises_by_the_trainers_lead_before_the_time_limit(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with StopFlag() as stop:
        stop.deadline, stop.lead_s = 1600.0, 90.0
        clock[0] = 1509.0
        assert not stop
        clock[0] = 1510.0
        assert stop
        assert stop.signal_name == "the time limit"


def test_a_lead_longer_than_the_job_leaves_it_half_of_its_time(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with StopFlag() as stop:
        stop.deadline, stop.lead_s = 1060.0, 600.0
        clock[0] = 1029.0
        assert not stop
        clock[0] = 1030.0
        assert stop


def fake_squeue(folder: Path, monkeypatch, script: str) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


def test_the_time_limit_is_slurms_own_where_it_tells_it(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert time_limit() == 1700000000.0


def test_the_time_limit_is_asked_for_where_the_environment_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_TIME_FORMAT", "%j")
    neighbour = "echo 4 2000-01-01T00:00:00"
    answer = f'{neighbour}; test "$SLURM_TIME_FORMAT" = standard && date -d @1700000000 "+5 %Y-%m-%dT%H:%M:%S"'
    fake_squeue(tmp_path, monkeypatch, answer)
    assert time_limit() == 1700000000.0


@pytest.mark.parametrize("script", ["echo 5 NONE", "echo 4 2000-01-01T00:00:00", "echo", "exit 1"])
def test_a_time_limit_that_nobody_knows_is_none_and_said(tmp_path, monkeypatch, capsys, script):
    fake_squeue(tmp_path, monkeypatch, script)
    assert time_limit() is None
    assert "time limit of job 5 is not known here" in capsys.readouterr().out


def test_outside_a_job_there_is_no_time_limit(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert time_limit() is None


def test_a_rank_does_not_outlive_a_parent_that_is_killed(tmp_path):
    rank = "from bushpc.process import end_with_parent; import time; end_with_parent(); print(1); time.sleep(60)"
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-uc', {rank!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert process_start(pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while process_start(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "module", ["train.preempt", "train.watchdog", "runs.lease", "dispatch.requeue", "dispatch.job"]
)
def test_what_start_up_and_batch_shell_need_imports_no_torch(module):
    code = f"import sys, bushpc.{module}; assert not {{'torch', 'numpy', 'pandas'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
