"""Promises of the lines by which doctor's probe makes a batch shell note its signals: none is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bushpc.cluster.slurm_site import traced_batch_lines

SHELLS = 10


def until(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def noted(log: Path) -> set[str]:
    return {json.loads(line)["name"] for line in log.read_text().splitlines()} if log.exists() else set()


def test_a_batch_shell_notes_every_signal_also_those_that_come_together(tmp_path: Path) -> None:
    """As Slurm ends a job: CONT, and TERM at once. A `srun` that waits stands for the job's step."""
    step = tmp_path / "srun"
    step.write_text('#!/bin/bash\ntouch "$1"\nexec sleep 300\n')
    step.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shells = []
    for number in range(SHELLS):
        lines = traced_batch_lines(f"{tmp_path}/{number}-", ".jsonl", ["CONT", "TERM"])
        script = "\n".join([*lines, f"srun {tmp_path}/{number}.started"])
        shells.append(subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True))
    try:
        until(lambda: len(list(tmp_path.glob("*.started"))) == SHELLS)
        for shell in shells:
            shell.send_signal(signal.SIGCONT)
            shell.send_signal(signal.SIGTERM)
        for number in range(SHELLS):
            until(lambda log=tmp_path / f"{number}-0.jsonl": noted(log) == {"CONT", "TERM"})
    finally:
        for shell in shells:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
