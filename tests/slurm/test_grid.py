"""Promises of grids on a real Slurm: whatever dies, the same command runs exactly what is missing.

Jobs, arrays, nodes and signals are real; trainings are tests/stand_in's, which start in no time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.cluster.records import Limits
from bushpc.cluster.slurm import SlurmCluster
from bushpc.dispatch.status import read_status
from bushpc.runs.goodput import read_attempts

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real


@pytest.fixture
def words(tmp_path, phantom_folder) -> Callable[..., list[str]]:
    """words("grid=…", …) → a grid's words, for a run called `run`."""

    def make(grid: str, *more: str) -> list[str]:
        settings = ["data=phantom", "cluster=slurm", "cluster.time_min=30", "name=run", "train.save_every=5"]
        settings += [f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "model=xbusnet_small"]
        settings += [f"cluster.setup=['export PYTHONPATH={ROOT}/tests/stand_in']", "train.iterations=20"]
        return ["grid", grid, *settings, *more]

    return make


def states(run_dir: Path) -> dict[str, str]:
    return {cell.name: cell.state for cell in read_status(run_dir).cells}


def until_still(slurm, run_dir: Path) -> dict[str, str]:
    slurm.until(lambda: not any(cell.live for cell in read_status(run_dir).cells), what=lambda: str(slurm.squeue()))
    return states(run_dir)


def test_table_4_survives_its_submitter_two_of_its_cells_and_a_node(slurm, words, tmp_path, capsys):
    run_dir = tmp_path / "run"
    command = words("grid=xbusnet_components")

    # The submitting command dies when Slurm has taken the array, before it could note whose job is whose.
    slurm.run(["scontrol", "update", "PartitionName=low", "State=DOWN"])
    submitting = subprocess.Popen([sys.executable, "-m", "bushpc.cli", *command], env=slurm.env, cwd=ROOT)
    while not list(run_dir.glob("jobs/submitting-*.json")) or not list(run_dir.glob("jobs/*_19/*.pkl")):
        assert submitting.poll() is None, "it was too quick to be killed"
        time.sleep(0.001)
    submitting.send_signal(signal.SIGKILL)
    submitting.wait()

    assert main(command) == 0
    slurm.run(["scontrol", "update", "PartitionName=low", "State=UP"])
    said = capsys.readouterr().out
    noted = [json.loads(path.read_text())["job_id"] for path in run_dir.glob("cells/*/job.json")]
    assert len(set(noted)) == len(noted) == 20
    assert len({job.partition("_")[0] for job in noted}) == 1, said
    assert "submitted" not in said

    # Two cells are cancelled behind bushpc's back, and a node dies with what runs on it.
    running = slurm.until(lambda: [cell for cell in read_status(run_dir).cells if cell.phase == "training"][:1])
    waiting = next(cell for cell in reversed(read_status(run_dir).cells) if cell.state == "queued")
    for cell in (*running, waiting):
        slurm.run(["scancel", cell.job_id])
    assert slurm.tool("kill-node", "n2").returncode == 0
    slurm.run(["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=killed"])
    assert slurm.tool("start-node", "n2").returncode == 0
    before = until_still(slurm, run_dir)
    lost = [name for name, state in before.items() if state != "done"]
    assert {running[0].name, waiting.name} <= set(lost)
    ended = {path: path.stat().st_mtime_ns for path in run_dir.glob("cells/*/DONE")}

    assert main(command) == 0
    assert f"submitted: {', '.join(lost)}\n" in capsys.readouterr().out
    assert set(until_still(slurm, run_dir).values()) == {"done"}
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in ended.items())
    for cell in run_dir.glob("cells/*"):
        assert [attempt.end for attempt in read_attempts(cell)].count("done") == 1

    # The table is complete, and nothing is left to do.
    slurm.wait(json.loads((run_dir / "jobs" / "report.json").read_text())["job_id"])
    assert json.loads((run_dir / "report" / "summary.json").read_text())["complete"] is True
    assert main(command) == 0
    assert "already done: full-fold0" in capsys.readouterr().out


def test_a_grid_is_split_by_resources_and_by_what_an_array_may_hold(slurm, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SlurmCluster, "limits", lambda self, profile: Limits(jobs_at_once=2))
    path = tmp_path / "trial.yaml"
    path.write_text("rows: {one: {}, two: {set: {train.lr: 0.5, cluster.ranks_per_node: 2, cluster.parallel: 0}}}")
    assert main(words(f"grid={path}", "cluster.parallel=1", "train.iterations=3")) == 0
    jobs = {cell.name: cell.job_id.partition("_")[0] for cell in read_status(tmp_path / "run").cells}
    arrays = {row: [jobs[f"{row}-fold{k}"] for k in range(5)] for row in ("one", "two")}
    for ids in arrays.values():
        assert ids[0] == ids[1] != ids[2] == ids[3] != ids[4]
    asked = slurm.run(["squeue", "--noheader", "--format=%A %F %E"])
    after = {line.split()[1]: line.split()[-1] for line in asked.splitlines()}
    first, _, second, _, third = arrays["one"]
    assert first in after[second], "cluster.parallel holds for all arrays together"
    assert second in after[third]
    assert "(null)" in after[arrays["two"][2]]
    assert set(until_still(slurm, tmp_path / "run").values()) == {"done"}
    log = Path(next(cell for cell in read_status(tmp_path / "run").cells if cell.name == "two-fold0").log)
    assert log.with_name(log.name.replace("_0_log", "_1_log")).exists(), "a second rank"
