"""Promises of a job: what comes back, what does not, and that nobody works on a cell that another one holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from bushpc.cluster.base import cluster_for
from bushpc.cluster.records import JobRequest
from bushpc.cluster.slurm_ask import job_facts
from bushpc.cluster.slurm_script import trap_lines
from bushpc.config import compose
from bushpc.dispatch import requeue
from bushpc.dispatch.job import lost_peer
from bushpc.dispatch.requeue import command_at_end, note_attempt, note_outcome
from bushpc.errors import TrainingError
from bushpc.process import process_start
from bushpc.runs.lease import Lease

RUNNING = (
    "JobId=7 JobName=x JobState=RUNNING Reason=None Requeue=1 Restarts=0 TimeLimit=00:02:00 PreemptTime=None "
    "Command=a b\n"
)
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-20T13:46:31").replace("Restarts=0", "Restarts=40")
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING")
TOO_LATE = CANCELLED.replace("Reason=None", "Reason=TimeLimit")
OFTEN = RUNNING.replace("Restarts=0", "Restarts=3")
TERM, KILL, USR2 = 128 + signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGUSR2


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """ended(status, what Slurm says of the job) → whether the batch shell's question requeued it."""
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    calls, answer = tmp_path / "calls", tmp_path / "answer"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ntest "$1" = requeue || cat {answer}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def ended(status: int, says: str = RUNNING) -> bool:
        calls.write_text("")
        answer.write_text(says)
        requeue.main([str(status), str(tmp_path / "run")])
        return "requeue 7\n" in calls.read_text()

    return ended


@pytest.fixture
def cell_dir(tmp_path):
    cell_dir = tmp_path / "run" / "cells" / "fold0"
    (cell_dir / "checkpoints" / "step_00000100").mkdir(parents=True)
    return cell_dir


def test_a_job_that_ended_well_or_failed_by_itself_does_not_come_back(ended):
    assert not any(ended(status) for status in (0, 1, 2, 127))


def test_a_stopped_job_comes_back_and_a_cancelled_one_does_not(ended):
    assert ended(75)
    assert not ended(75, CANCELLED)
    assert ended(75, TOO_LATE), "a time limit that was met ends no run"


def test_a_rank_that_was_signalled_before_it_could_listen_comes_back(ended):
    assert ended(TERM)
    assert ended(USR2)
    assert not ended(TERM, CANCELLED)


def test_a_rank_that_cannot_start_is_not_started_for_ever(ended):
    # srun ends the ranks beside it with TERM, which looks like a stop signal; a preemption Slurm tells.
    assert not ended(TERM, OFTEN)
    assert ended(TERM, PREEMPTED)


@pytest.mark.parametrize("status", [KILL, 76, 128 + signal.SIGSEGV])
def test_a_killed_rank_comes_back_after_progress_and_three_times_without(
    ended, cell_dir, tmp_path, monkeypatch, status
):
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        note_attempt(tmp_path / "run", ["fold0"])
        assert ended(status), f"the save interval may be long, and start {restart} was hit within it"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    note_attempt(tmp_path / "run", ["fold0"])
    assert not ended(status)
    (cell_dir / "checkpoints" / ".step_00000200.77").mkdir()  # not sealed
    (cell_dir / "checkpoints" / "unread_step_00000200").mkdir()
    assert not ended(status)
    (cell_dir / "checkpoints" / "step_00000150").mkdir()
    assert ended(status)
    assert not ended(status, CANCELLED)


def test_progress_of_an_earlier_start_does_not_count(ended, cell_dir, tmp_path, monkeypatch):
    note_attempt(tmp_path / "run", ["fold0"])
    (cell_dir / "checkpoints" / "step_00000150").mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not ended(KILL), "rank 0 of this start never came so far as to begin"


def test_a_failure_with_a_reason_does_not_come_back(ended, cell_dir, tmp_path):
    note_attempt(tmp_path / "run", ["fold0"])
    (cell_dir / "checkpoints" / "step_00000150").mkdir()
    (cell_dir / "FAILED").write_text("the loss is not finite")
    assert not any(ended(status) for status in (1, 76, KILL, TERM, 75))


def test_ranks_that_are_killed_while_leaving_do_not_hide_that_rank_0_stopped(ended, cell_dir, tmp_path):
    note_attempt(tmp_path / "run", ["fold0"])
    note_outcome(tmp_path / "run", "stopped")
    assert ended(KILL)


def test_a_job_that_found_its_cell_taken_does_not_come_back(ended, cell_dir, tmp_path):
    note_attempt(tmp_path / "run", ["fold0"])
    note_outcome(tmp_path / "run", "refused")
    (cell_dir / "checkpoints" / "step_00000150").mkdir()  # the other one's
    assert not any(ended(status) for status in (1, TERM, KILL))


def test_the_last_task_of_an_array_requeues_itself_and_not_the_array(ended, tmp_path):
    # Its SLURM_JOB_ID is the array's; asked for that, Slurm tells of every task.
    beside = CANCELLED.replace("JobId=7", "JobId=8 ArrayJobId=7 ArrayTaskId=3")
    ended(75, beside + RUNNING.replace("JobId=7", "JobId=7 ArrayJobId=7 ArrayTaskId=4"))
    assert (tmp_path / "calls").read_text().splitlines() == ["--oneliner show job 7", "requeue 7_4"]


def test_what_a_task_of_an_array_submitted_requeues_itself_and_not_that_task(ended, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")  # inherited
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert ended(75)


BUSY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for Slurm, which take no time."""
    waited: list[float] = []
    clock = types.SimpleNamespace(sleep=waited.append, monotonic=lambda: sum(waited))
    monkeypatch.setattr(requeue, "time", clock)
    return waited


@pytest.mark.parametrize("busy_with", ["show", "requeue"])
def test_a_busy_controller_is_asked_until_it_answers(ended, tmp_path, waits, busy_with):
    scontrol, count = tmp_path / "bin" / "scontrol", tmp_path / "count"
    shebang, rest = scontrol.read_text().split("\n", 1)
    busy = f"echo >> {count}; test $(wc -l < {count}) -gt 3 || {{ echo '{BUSY}' >&2; exit 1; }}"
    scontrol.write_text(f'{shebang}\ncase "$*" in *{busy_with}*) {busy};; esac\n{rest}')
    assert ended(USR2)
    assert waits == [1, 2, 4]


def test_a_controller_that_never_answers_is_left_after_minutes_and_the_log_says_what_to_do(
    ended, tmp_path, waits, capsys
):
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho '{BUSY}' >&2\nexit 1\n")
    assert not ended(USR2)
    assert 500 < sum(waits) <= requeue.ASK_FOR_S
    assert (
        f"could not be requeued (`scontrol --oneliner show job 7` failed: {BUSY}); submit again"
        in capsys.readouterr().out
    )


def test_a_refusal_is_an_answer(ended, tmp_path, waits, capsys):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho Access/permission denied >&2\nexit 1\n")
    assert not ended(75)
    assert waits == []
    assert (
        "could not be requeued (`scontrol --oneliner show job 7` failed: Access/permission denied"
        in capsys.readouterr().out
    )


def test_one_that_saved_stays_until_slurm_ends_it_where_nobody_can_be_asked(
    ended, cell_dir, tmp_path, waits, monkeypatch
):
    (tmp_path / "bin" / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    note_attempt(tmp_path / "run", ["fold0"])
    note_outcome(tmp_path / "run", "stopped", "SIGTERM")
    ended(75)
    assert sum(waits) > requeue.STAY_FOR_S - requeue.LONGEST_WAIT_S
    waits.clear()
    note_outcome(tmp_path / "run", "stopped", "the time limit")  # what ends it then is not requeued
    ended(75)
    ended(USR2)
    assert waits == []


@pytest.mark.parametrize("signal_name", ["the time limit", "SIGUSR2"])
def test_a_time_limit_that_never_lets_it_save_ends_the_loop(ended, cell_dir, tmp_path, monkeypatch, signal_name):
    def stopped(restart: int, says: str = RUNNING, name: str = signal_name) -> bool:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        note_attempt(tmp_path / "run", ["fold0"])
        note_outcome(tmp_path / "run", "stopped", name)
        return ended(75, says.replace("Restarts=0", f"Restarts={restart}"))

    (cell_dir / "checkpoints" / "step_00000150").mkdir()
    assert all(stopped(restart) for restart in (40, 41, 42)), "earlier starts got further"
    assert stopped(43, name="SIGTERM")
    if signal_name == "SIGUSR2":
        assert stopped(43, PREEMPTED), "some sites say so with this signal"
    assert not (cell_dir / "FAILED").exists()
    assert not stopped(43)
    assert (cell_dir / "FAILED").read_text() == (
        "the time limit of 2 min is over before the first save; raise cluster.time_min\n"
    )


def test_a_start_up_that_outlasts_the_time_limit_is_not_repeated_for_ever(ended):
    assert not ended(USR2, OFTEN)
    assert ended(USR2, PREEMPTED)


def test_an_earlier_start_that_still_lives_does_not_speak_for_the_present_one(ended, cell_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    note_attempt(tmp_path / "run", ["fold0"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    note_outcome(tmp_path / "run", "refused")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert ended(75)


@pytest.mark.parametrize("damaged", ["", "[]", '{"cells": ["fo'])
def test_a_damaged_note_keeps_no_job_from_coming_back(ended, cell_dir, tmp_path, damaged):
    (tmp_path / "run" / "jobs" / "attempt-7.json").write_text(damaged)
    note_outcome(tmp_path / "run", "stopped")
    assert ended(75)


def test_what_slurm_says_of_a_job_is_understood():
    facts = job_facts(PREEMPTED, "7")
    assert (facts.ours_to_requeue, facts.preempted, facts.restarts) == (True, True, 40)
    assert (facts.limit_min, facts.requeue_as) == (2, "7")
    assert not job_facts(RUNNING, "7").preempted
    assert job_facts(RUNNING.replace("00:02:00", "1-02:00:30"), "7").limit_min == 26 * 60 + 1
    assert job_facts(RUNNING.replace("00:02:00", "UNLIMITED"), "7").limit_min is None


def test_a_batch_shell_that_is_told_to_end_waits_for_its_ranks_and_then_asks(tmp_path, monkeypatch):
    python = tmp_path / "my python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    run_dir = tmp_path / "my 'run"  # a quote and a space: the path reaches a shell twice
    script = "\n".join([*trap_lines(command_at_end(run_dir)), f"sh -c 'touch {tmp_path}/begun; sleep 2; exit 75'"])
    shell = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert shell.poll() is None
        time.sleep(0.05)
    shell.send_signal(signal.SIGTERM)
    out, _ = shell.communicate(timeout=300)
    assert shell.returncode == 75
    assert out.splitlines() == ["-m", "bushpc.dispatch.requeue", "75", str(run_dir)]


def test_a_job_ends_with_its_own_words_and_status_and_no_report_of_leaks():
    code = (
        "import atexit, sys\n"
        "from bushpc.dispatch.job import end_quickly\n"
        "atexit.register(end_quickly)\n"
        "import torchvision\n"  # brings triton, whose objects nanobind would report
        "print('why it stopped', file=sys.stderr)\n"
        "raise SystemExit(75)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr) == (75, "why it stopped\n")


def gloo_error() -> RuntimeError:
    return RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:21344")


def test_a_lost_peer_is_told_from_a_failure_of_ones_own():
    from torch.distributed import DistBackendError, DistNetworkError

    assert lost_peer(gloo_error())
    assert lost_peer(DistBackendError("NCCL error: remote process exited or there was a network error"))
    assert lost_peer(DistNetworkError("The client socket has timed out"))
    assert not lost_peer(RuntimeError("shape mismatch"))
    assert not lost_peer(TrainingError("the loss is not finite"))
    assert not lost_peer(SystemExit(75))
    closing = gloo_error()
    closing.__context__ = TrainingError("the loss is not finite")  # as `finally: leave()` would raise it
    assert not lost_peer(closing)


# A job as submitit starts it, but its cell, which takes seconds to import, is a stand-in that ends as it is told.
JOB = """
import os, signal, sys, types
import bushpc.dispatch.job as job
from bushpc.runs.lease import Lease

def run_work(cell_dir, run, world, stop):
    from pathlib import Path
    cell_dir = Path(cell_dir)
    with Lease(cell_dir):
        if sys.argv[2] == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
            return stop
        exec(sys.argv[2])

job.FAILED_IS_WRITTEN_S = 0.2
work, dist = types.ModuleType("bushpc.dispatch.work"), types.ModuleType("bushpc.dist")
work.run_work, dist.meet = run_work, lambda *args: None
dist.World = lambda rank, size, local_rank: types.SimpleNamespace(is_main=rank == 0)
sys.modules.update({"bushpc.dispatch.work": work, "bushpc.dist": dist})
job.CellJob(run_dir=sys.argv[1], packs=(("fold0",),), packed=False, submission="a")()
"""


def run_job(run_dir: Path, cell: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1"}
    command = [sys.executable, "-c", JOB, str(run_dir), cell]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_each_end_of_a_rank_has_its_exit_status(tmp_path):
    failed = tmp_path / "cells" / "fold0" / "FAILED"
    failed.parent.mkdir(parents=True)
    stopped = run_job(tmp_path, "stop")
    assert stopped.returncode == 75, stopped.stderr
    assert not failed.exists()
    assert run_job(tmp_path, "raise RuntimeError('Connection closed by peer [::1]:1')").returncode == 76
    assert not failed.exists(), "who lost its peer does not know the reason"
    assert run_job(tmp_path, "raise ValueError('wrong shape')").returncode == 1
    assert failed.read_text().startswith("ValueError: wrong shape\n")
    assert run_job(tmp_path, "pass").returncode == 0


def test_two_processes_never_work_on_one_cell(tmp_path):
    cell_dir = tmp_path / "cells" / "fold0"
    cell_dir.mkdir(parents=True)
    with Lease(cell_dir, renew_s=0.1) as lease:
        refused = run_job(tmp_path, "(cell_dir / 'touched').touch()")
        lease.check()
    assert refused.returncode == 1
    assert f"another process works on {cell_dir}: process {os.getpid()} on " in refused.stderr
    assert not (cell_dir / "FAILED").exists()
    assert not (cell_dir / "touched").exists()


class Sleeper:
    """Both ranks sleep; rank 0 fails when it is told to."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> None:
        from bushpc.cluster.local import controller
        from bushpc.dispatch.job import end_other_local_ranks
        from bushpc.process import end_with_parent

        assert controller()
        end_with_parent()
        rank = os.environ["SUBMITIT_LOCAL_GLOBALID"]
        (Path(self.folder) / f"rank{rank}").write_text(str(os.getpid()))
        while rank != "0" or not (Path(self.folder) / "fail").exists():
            time.sleep(0.05)
        end_other_local_ranks()
        raise SystemExit(1)


@pytest.mark.parametrize("end", ["one rank fails", "the controller is killed"])
def test_local_ranks_end_together(tmp_path, end):
    profile = compose(["model=unet_small", "data=phantom", "cluster=local", "cluster.ranks_per_node=2"]).cluster
    tests = str(Path(__file__).parent)  # the job unpickles its work from here
    request = JobRequest(
        name="sleepers",
        work=[Sleeper(str(tmp_path))],
        folder=tmp_path / "jobs",
        profile=profile,
        setup=[f"export PYTHONPATH={tests}:{os.environ.get('PYTHONPATH', '')}"],
        takes_place=False,
    )
    [job] = cluster_for("local").submit(request)
    notes = [tmp_path / "rank0", tmp_path / "rank1"]
    deadline = time.monotonic() + 120
    while not all(note.exists() and note.read_text() for note in notes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(note.read_text()) for note in notes]
    if end == "one rank fails":
        (tmp_path / "fail").touch()
    else:
        os.kill(int(job.id), signal.SIGKILL)
    while any(process_start(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
