"""Promises of a generator's chain on Slurm: cells follow each other, and a requeued job makes nothing twice.

The training is done beforehand; its preemption is that of every training (test_requeue).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.dispatch.status import read_status
from tests.conftest import TINY_GENERATOR

ROOT = Path(__file__).resolve().parents[2]
SCANS = 60
pytestmark = pytest.mark.real


def batches(folder: Path) -> dict[str, int]:
    """When each was made. At the end they are cleared away, maybe while they are looked at."""
    made = {}
    for path in (folder / ".generating").glob("batch-*.npz"):
        with contextlib.suppress(FileNotFoundError):
            made[path.name] = path.stat().st_mtime_ns
    return made


def test_generation_quality_and_report_follow_a_training_and_outlive_a_requeue(
    slurm, train_generator, phantom_folder, capsys
):
    more = (f"synthesis.n={SCANS}", "synthesis.batch_size=1", "synthesis.features=none")
    run = train_generator("chain", *more)
    where = (f"data.root={phantom_folder}", f"runs_dir={run.parent}", f"loader.cache_dir={run.parent / 'cache'}")
    site = ("cluster=slurm", "cluster.time_min=30", f"cluster.setup=['export PYTHONPATH={ROOT} OMP_NUM_THREADS=1']")
    command = ["cv", *TINY_GENERATOR, *where, "name=chain", "fold=0", *more, *site]
    assert main(command) == 0
    assert "submitted: fold0-generate, fold0-quality\n" in capsys.readouterr().out

    cells, scans = run / "cells", run / "cells" / "fold0-generate" / "scans"
    generate = json.loads((cells / "fold0-generate" / "job.json").read_text())["job_id"]
    quality = json.loads((cells / "fold0-quality" / "job.json").read_text())["job_id"]
    log = next((run / "jobs").rglob(f"{generate}*_log.out"), run)
    slurm.until(lambda: len(batches(scans)) > 2, what=lambda: log.read_text() if log.is_file() else str(slurm.squeue()))
    slurm.run(["scontrol", "requeue", generate])
    kept, remade = batches(scans), set()
    assert len(kept) < SCANS
    assert slurm.squeue()[quality] == "PENDING"
    assert main(command) == 0
    assert "submitted" not in capsys.readouterr().out

    def ended() -> bool:
        remade.update(name for name, time in batches(scans).items() if kept.get(name, time) != time)
        states = {cell.name: cell.state for cell in read_status(run).cells}
        assert "failed" not in (states["fold0-generate"], states["fold0-quality"]), read_status(run).to_json()
        return states["fold0-quality"] == "done"

    slurm.until(ended, what=lambda: str(slurm.squeue()))
    assert not remade
    counts = json.loads((cells / "fold0-quality" / "quality" / "quality.json").read_text())["counts"]
    assert sum(counts["synthetic"].values()) == SCANS
    slurm.wait(json.loads((run / "jobs" / "report.json").read_text())["job_id"])
    assert "Generated scans against real ones held out" in (run / "report" / "report.md").read_text()
    assert main(command) == 0
    assert "already done: fold0, fold0-generate, fold0-quality" in capsys.readouterr().out
