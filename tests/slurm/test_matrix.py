"""Promises of training on a real Slurm, real in every part: whatever ends a run, it ends as if nothing had been.

A case or two of every kind; `tools/preemption_matrix` runs them all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preemption_matrix.py"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def matrix():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("preemption_matrix", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["preemption_matrix"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["preemption_matrix"]


def test_runs_survive_preemption_signals_limits_kills_and_dead_nodes(slurm, matrix, tmp_path):
    # `slurm` skips this where Slurm cannot be had; the tool starts clusters of its own, whose nodes it kills.
    command = [sys.executable, str(TOOL), "--size", "ci", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["name"]: result for result in json.loads((tmp_path / "preemption_matrix.json").read_text())}
    assert {name for name in results if not name.startswith("undisturbed")} == set(matrix.CI)
    assert all(result["faults"] == [] for result in results.values())
    assert len(results["in-a-row-3"]["back_s"]) == 3
    assert all(result["lost"] == 0 for name, result in results.items() if "kill" not in name and "node" not in name)


def test_the_small_size_has_every_action_phase_and_size(matrix):
    cases = [case for case in matrix.all_cases() if case.name in matrix.CI]
    assert {case.action for case in cases} == set(matrix.ACTIONS)
    assert {case.phase for case in cases} == set(matrix.PHASES)
    assert {(case.ranks, case.cells) for case in cases} >= {(1, 1), (1, 2), (2, 1)}
    assert {case.engine for case in cases} == {"ddp", "zero3"}


def test_the_whole_matrix_has_every_combination_once(matrix):
    cases = matrix.all_cases()
    assert len({case.name for case in cases}) == len(cases)
    combined = {
        (case.action, case.phase, case.ranks, case.cells)
        for case in cases
        if case.name.split("-")[0] in ("plain", "array")
    }
    assert len(combined) == 7 * 3 * 2 * 2
    assert {(case.engine, case.ranks, case.ranks_after) for case in cases if case.action == matrix.CANCEL} == {
        (engine, *change) for engine in ("ddp", "zero1", "zero2", "zero3") for change in ((2, 1), (1, 2))
    }


@pytest.fixture
def child():
    """A Python that listens at a port, says so, and waits."""
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    process = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_a_port_is_held_until_its_process_ends(matrix, child):
    port = int(child.stdout.readline())
    [(inode, held)] = matrix.listening({child.pid}).items()
    assert held == port
    with socket.create_server(("127.0.0.1", 0)):
        assert set(matrix.listening({child.pid})) == {inode}, "another's port is not its own"
    child.kill()
    child.wait()
    assert inode not in matrix.listening_inodes()


def test_a_signal_to_a_frozen_process_is_seen_before_it_is_heard(matrix, child):
    child.stdout.readline()
    os.kill(child.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not matrix.stopped(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not matrix.told_to_stop(child.pid)
    os.kill(child.pid, signal.SIGTERM)
    assert matrix.told_to_stop(child.pid)
    assert child.poll() is None
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait(60) == -signal.SIGTERM
    assert matrix.told_to_stop(child.pid)
