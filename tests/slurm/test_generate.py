"""Promises of slurm/generate.sh on a real Slurm: one task per rank on two nodes, and on from what is done."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bushpc.cli import main

ROOT = Path(__file__).resolve().parents[2]
CPU_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30")
WORDS = ("n=120", "batch_size=1")
pytestmark = pytest.mark.real


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_job_that_went_back_into_the_queue_makes_the_same_samples_as_one_process(slurm, tmp_path, generator_run):
    clone, alone, out, log = (tmp_path / name for name in ("clone", "alone", "out", "generate.out"))
    clone.mkdir()
    (clone / ".venv").symlink_to(Path(sys.executable).parents[1])
    (clone / "slurm").symlink_to(ROOT / "slurm")
    subprocess.run(["git", "init", "--quiet", clone], check=True)
    command = ["sbatch", "--parsable", f"--output={log}", *CPU_NODES, "slurm/generate.sh"]
    job_id = slurm.run([*command, str(generator_run), f"out={out}", *WORDS], cwd=clone).strip()

    def batches() -> dict[Path, int]:
        """When each was made. At the end they are cleared away, maybe while they are looked at."""
        made = {}
        for path in (out / ".generating").glob("batch-*.npz"):
            with contextlib.suppress(FileNotFoundError):
                made[path] = path.stat().st_mtime_ns
        return made

    slurm.until(lambda: batches() or "bushpc: " in read(log), what=lambda: read(log))
    slurm.run(["scontrol", "requeue", job_id])
    kept, remade = batches(), set()
    assert 0 < len(kept) < 120, read(log)

    def completed() -> bool:
        remade.update(path for path, time in batches().items() if kept.get(path, time) != time)
        return slurm.squeue()[job_id] == "COMPLETED"

    slurm.until(completed, what=lambda: read(log))
    assert not remade
    assert "120 scans" in log.read_text()
    assert not list(tmp_path.glob(".meeting*")), "ranks met, and cleared up"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a task has there: their number shows in the last digits
    try:
        assert main(["generate", str(generator_run), f"out={alone}", *WORDS]) == 0
    finally:
        torch.set_num_threads(threads)
    assert contents(out) == contents(alone)
