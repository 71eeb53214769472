"""Promises at a site's limits, on a real Slurm: a run ends with its report however few jobs the site takes at a time.

Jobs, limits, batch shells, signals and files are real; trainings are tests/stand_in's, which start in no time.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from bushpc.cli import main
from bushpc.dispatch.status import read_status
from bushpc.runs.goodput import read_attempts
from bushpc.runs.layout import RunDir
from tests.slurm.conftest import Sandbox
from tests.slurm.sites import shares

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real


@pytest.fixture
def like(make_sandbox, monkeypatch) -> Callable[..., Sandbox]:
    """like("submit-limit=4", …) → a sandbox set up like these kinds of site, which SLURM_CONF points at."""

    def make(*kinds: str, nodes: int = 1) -> Sandbox:
        sandbox = make_sandbox("--nodes", str(nodes), *(word for kind in kinds for word in ("--like", kind)))
        monkeypatch.setenv("SLURM_CONF", sandbox.env["SLURM_CONF"])
        return sandbox

    return make


@pytest.fixture
def words(tmp_path, phantom_folder) -> Callable[..., list[str]]:
    """words("cv", …) → a command's words, for a run called `run` unless they say otherwise."""

    def make(command: str, *more: str) -> list[str]:
        settings = ["data=phantom", "cluster=slurm", "cluster.time_min=30", "name=run", "train.save_every=5"]
        settings += [f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "model=xbusnet_small"]
        settings += [f"cluster.setup=['export PYTHONPATH={ROOT}/tests/stand_in']", "train.iterations=20"]
        return [command, *settings, *more]

    return make


def until_still(sandbox: Sandbox, run_dir: Path) -> int:
    """Wait until nothing works on the run any more. Returns the most jobs that were in the queue at the same time."""
    most = 0
    deadline = time.monotonic() + 600
    while True:
        queued = sandbox.run(["squeue", "--noheader", "--array", "--format=%i"]).split()
        most = max(most, len(queued))
        status = read_status(run_dir)
        if not any(cell.live for cell in status.cells) and not status.report_live:
            return most
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


def summary(run_dir: Path) -> dict:
    return dict(json.loads((run_dir / "report" / "summary.json").read_text()))


def weights(run_dir: Path) -> dict[str, bytes]:
    """The last weights of every cell."""
    cells = {cell.name: cell for cell in RunDir(run_dir).cell_dirs()}
    newest = {name: cell.checkpoint(cell.newest_step()) for name, cell in cells.items()}
    return {name: load_file(path / "model.safetensors")["weight"].tobytes() for name, path in newest.items()}


@pytest.mark.parametrize("limit", [4, 2])
def test_five_folds_and_a_grid_of_twenty_end_with_their_reports(like, words, tmp_path, capsys, limit):
    sandbox = like(f"submit-limit={limit}", nodes=2)
    assert main(words("cv", "name=five")) == 0
    said = capsys.readouterr().out
    assert f"5 cells in {limit} jobs: the site allows {limit} in the queue (MaxSubmitJobs of account root), 0" in said
    assert until_still(sandbox, tmp_path / "five") <= limit
    assert summary(tmp_path / "five")["complete"] is True

    # Nothing starts while we look at what waits.
    sandbox.run(["scontrol", "update", "PartitionName=low", "State=DOWN"])
    assert main(words("grid", "grid=xbusnet_components", "name=grid", "train.iterations=2")) == 0
    waiting = next(cell for cell in reversed(read_status(tmp_path / "grid").cells) if cell.behind)
    assert waiting.state == "queued"
    assert main(["status", str(tmp_path / "grid")]) == 0
    assert f"behind {waiting.behind}" in capsys.readouterr().out
    sandbox.run(["scontrol", "update", "PartitionName=low", "State=UP"])
    assert until_still(sandbox, tmp_path / "grid") <= limit
    assert {cell.state for cell in read_status(tmp_path / "grid").cells} == {"done"}
    assert summary(tmp_path / "grid")["complete"] is True


def test_a_run_in_lanes_that_is_preempted_twice_and_loses_a_rank_ends_with_the_same_weights(like, words, tmp_path):
    sandbox = like("submit-limit=4", nodes=2)
    assert main(words("cv", "name=calm", "train.iterations=60")) == 0
    until_still(sandbox, tmp_path / "calm")

    run_dir = tmp_path / "rough"
    assert main(words("cv", "name=rough", "train.iterations=60", "cluster.submit_window=3")) == 0
    for number in range(2):
        sandbox.until(lambda: any(cell.phase == "training" and cell.step > 2 for cell in read_status(run_dir).cells))
        urgent = sandbox.sbatch("sleep 1", "--partition=high", "--nodes=2", "--exclusive")
        sandbox.wait(urgent)
        sandbox.until(lambda number=number: sum(cell.restarts > number for cell in read_status(run_dir).cells) > 0)
    victim = sandbox.until(
        lambda: next((cell for cell in read_status(run_dir).cells if cell.phase == "training" and cell.step < 50), None)
    )
    os.kill(json.loads((RunDir(run_dir).cell(victim.name).heartbeat).read_text())["pid"], signal.SIGKILL)
    assert until_still(sandbox, run_dir) <= 4
    assert {cell.state for cell in read_status(run_dir).cells} == {"done"}
    assert weights(run_dir) == weights(tmp_path / "calm")
    assert summary(run_dir)["complete"] is True


def test_one_cell_of_a_lane_is_cancelled_and_another_fails_and_the_rest_goes_on(like, words, tmp_path, capsys):
    sandbox = like("submit-limit=1")
    run_dir = tmp_path / "run"
    # Fold 0 fails, fold 1 is cancelled while it trains and fold 3 before.
    sandbox.run(["scontrol", "update", "PartitionName=low", "State=DOWN"])
    assert main(words("cv", "train.iterations=200")) == 0
    (run_dir / "cells" / "fold0" / "fails").touch()
    assert main(["cancel", str(run_dir), "fold3"]) == 0
    sandbox.run(["scontrol", "update", "PartitionName=low", "State=UP"])
    sandbox.until(lambda: read_status(run_dir).cells[1].phase == "training")
    assert main(["cancel", str(run_dir), "fold1"]) == 0
    until_still(sandbox, run_dir)
    states = {cell.name: cell.state for cell in read_status(run_dir).cells}
    assert states == {"fold0": "failed", "fold1": "stopped", "fold2": "done", "fold3": "stopped", "fold4": "done"}
    saved = RunDir(run_dir).cell("fold1").newest_step()
    assert 0 < saved < 200
    assert summary(run_dir)["complete"] is False

    (run_dir / "cells" / "fold0" / "fails").unlink()
    sandbox.until(lambda: not sandbox.run(["squeue", "--noheader"]))  # the job that wrote the report is still one
    assert main(words("cv", "train.iterations=200")) == 0
    assert "submitted: fold0, fold1, fold3" in capsys.readouterr().out
    until_still(sandbox, run_dir)
    assert summary(run_dir)["complete"] is True


def test_a_lane_whose_time_is_over_goes_back_into_the_queue_between_two_cells(like, words, tmp_path):
    sandbox = like("submit-limit=1")
    assert main(words("cv", "cluster.time_min=1", "train.iterations=150")) == 0
    until_still(sandbox, tmp_path / "run")
    cells = read_status(tmp_path / "run").cells
    assert {cell.state for cell in cells} == {"done"}
    log = Path(cells[0].log).read_text()
    assert "its time is over, and cells are left" in log or "goes back into the queue: it was told to stop" in log
    assert summary(tmp_path / "run")["complete"] is True


def test_a_queue_that_is_full_is_said_and_nothing_is_submitted(like, words, tmp_path, capsys):
    sandbox = like("qos-submit-limit=2")
    for _ in range(2):
        sandbox.sbatch("sleep 600")
    assert main(words("cv")) == 2
    said = capsys.readouterr().err
    assert "the site allows 2 in the queue (MaxSubmitJobsPerUser of QOS limited), 2 of them taken" in said
    assert len(sandbox.run(["squeue", "--noheader"]).splitlines()) == 2


def test_jobs_that_wait_until_ones_own_others_end_need_nobody(like, words, tmp_path, capsys):
    sandbox = like("job-limit=1")
    assert main(words("cv")) == 0
    assert "at most 1 of them run at a time (MaxJobs of account root)" in capsys.readouterr().out
    reasons = ["squeue", "--noheader", "--array", "--format=%r"]
    sandbox.until(lambda: "AssocMaxJobsLimit" in sandbox.run(reasons))
    assert {cell.reason for cell in read_status(tmp_path / "run").cells} == {""}
    until_still(sandbox, tmp_path / "run")
    assert {cell.state for cell in read_status(tmp_path / "run").cells} == {"done"}


def test_a_limit_that_nobody_told_is_found_by_trying(like, words, tmp_path, capsys, monkeypatch):
    """As where accounting keeps its limits private."""
    sandbox = like("submit-limit=2")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sacctmgr").write_text("#!/bin/sh\necho 'not for you' >&2; exit 1\n")
    (tmp_path / "bin" / "sacctmgr").chmod(0o755)
    assert main(words("cv")) == 0
    assert "Slurm took no 5 jobs: 5 cells in 2 jobs" in capsys.readouterr().out
    until_still(sandbox, tmp_path / "run")
    assert summary(tmp_path / "run")["complete"] is True


def test_a_whole_node_of_four_gpus_runs_four_cells_each_on_its_own(like, words, tmp_path):
    sandbox = like("gpus", "whole-nodes")
    run_dir = tmp_path / "run"
    whole = ("cluster.gpus=4", "cluster.cells_per_job=4", "cluster.exclusive=true", "train.iterations=200")
    assert main(words("cv", *whole)) == 0
    sandbox.until(lambda: sum(cell.phase == "training" for cell in read_status(run_dir).cells) >= 4)
    had = {name: share for name, share in shares(run_dir).items() if name != "fold4"}
    assert {name: share["gpus"] for name, share in had.items()} == {f"fold{k}": str(k) for k in range(4)}
    assert len({share["job"] for share in had.values()}) == 1

    # The job is preempted: all four come back where they were, each to a GPU of its own.
    at = {cell.name: cell.step for cell in read_status(run_dir).cells if cell.name in had}
    sandbox.wait(sandbox.sbatch("sleep 1", "--partition=high", "--exclusive"))
    sandbox.until(lambda: all(cell.restarts == 1 for cell in read_status(run_dir).cells if cell.name in had))
    again = {name: share for name, share in shares(run_dir).items() if name in had}
    assert again == had, "the same job, GPUs and cores"
    starts = {name: read_attempts(run_dir / "cells" / name)[-1].from_step for name in had}
    assert all(starts[name] >= max(1, at[name]) for name in had), (starts, at)

    # One of the four is cancelled; the others go on.
    assert main(["cancel", str(run_dir), "fold1"]) == 0
    sandbox.until(lambda: read_status(run_dir).cells[1].state == "stopped")
    assert sum(cell.state == "running" for cell in read_status(run_dir).cells) >= 3
    until_still(sandbox, run_dir)
    states = {cell.name: cell.state for cell in read_status(run_dir).cells}
    assert states == {"fold1": "stopped"} | dict.fromkeys(("fold0", "fold2", "fold3", "fold4"), "done")
    assert main(["retry", str(run_dir), "fold1"]) == 0
    until_still(sandbox, run_dir)
    assert summary(run_dir)["complete"] is True


def test_a_site_without_gpu_options_and_with_small_arrays_takes_all_folds(like, words, tmp_path, capsys):
    sandbox = like("gpus", "refuses-gpu-options", "array-limit=2")  # so three tasks, numbered 0 to 2
    assert main(words("cv", "cluster.gpus=1")) == 2
    assert "choose a GPU queue" in capsys.readouterr().err
    assert main(words("cv", "cluster.gpus=1", "cluster.gpus_by=none")) == 0
    arrays = [cell.job_id.partition("_")[0] for cell in read_status(tmp_path / "run").cells]
    assert sorted(map(arrays.count, set(arrays))) == [2, 3]
    until_still(sandbox, tmp_path / "run")
    assert summary(tmp_path / "run")["complete"] is True


def test_jobs_that_would_never_start_or_wait_for_long_are_said_at_submission(like, words, tmp_path, capsys):
    sandbox = like("time-limit=20")
    assert main(words("cv", "cluster.partition=low")) == 2
    assert "low allow at most 20 minutes, so jobs would never start" in capsys.readouterr().err
    assert not sandbox.run(["squeue", "--noheader"])

    sandbox.run(["scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=maintenance"])
    assert main(words("cv", "name=waits")) == 0
    said = capsys.readouterr().err
    assert "warning: low allows jobs of 20 minutes, cluster.time_min=30" in said
    assert "warning: low allows jobs of 20 minutes, cluster.report_time_min=60" in said
    assert "1 more are down or drained; jobs wait until the site brings them back" in said
    assert main(["cancel", str(tmp_path / "waits")]) == 0


def test_a_limit_below_what_one_cell_needs_is_refused_with_the_sites_numbers(like, words, capsys):
    sandbox = like("submit-limit=4")
    sandbox.run(["sacctmgr", "--immediate", "modify", "user", "root", "set", "MaxTRES=cpu=1", "MaxWall=20"])
    assert main(words("cv", "cluster.cpus_per_rank=2")) == 2
    said = capsys.readouterr().err
    assert "a job asks for 2 cores, and account root allows 1 (maxtres cpu=1)" in said
    assert "cluster.time_min=30, and account root allows 20 minutes (maxwall)" in said
    assert not sandbox.run(["squeue", "--noheader"])
