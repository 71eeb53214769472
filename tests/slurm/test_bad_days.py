"""Promises on a real Slurm when daemons, disks and people fail; `tools/bad_days` has all rows, and this a few."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tools.baddays.main import CI, choose
from tools.baddays.rows import SIGNALS, TARGETS, all_rows

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bad_days"
pytestmark = pytest.mark.real


def test_every_bad_day_is_a_row_once():
    rows = all_rows()
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    assert {row.part for row in rows} >= {"slurmctld", "slurmdbd", "disk", "jobs", "people", "watchdog", "signals"}
    assert {f"disk-{what}-{when}" for what in ("full", "read-only") for when in ("save", "requeue", "status")} < {
        *names
    }
    assert sum(row.part == "signals" for row in rows) == len(SIGNALS) * len(TARGETS)


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a disk")
def test_runs_survive_a_controller_that_is_away_and_a_full_disk(slurm, tmp_path):
    # `slurm` skips this where Slurm cannot be had; the tool starts a cluster of its own, whose controller it stops.
    done = subprocess.run(
        [str(TOOL), "--size", "ci", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(row["name"] for row in rows) == sorted(CI)
    assert all(row["ended"].startswith("exact") for row in rows)
    assert [row.name for row in choose("ci", ())] == [row["name"] for row in rows]
