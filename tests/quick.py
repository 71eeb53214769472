"""`pytest --quick`: leaves out, as skipped, every test that starts a process or trains. `make quick` runs the rest.

A test is left out when it comes to that point, so no list or mark has to be kept.
"""

from __future__ import annotations

import multiprocessing.process
import subprocess

import pytest

WHY = "quick: {}; `make test` runs it"
ALLOWED = ("git",)  # ends within milliseconds


def leave_out_slow_tests(patch: pytest.MonkeyPatch) -> None:
    """From now on, starting a process or a training skips the test that does it."""
    from bushpc.train.engine import Engine

    popen = subprocess.Popen.__init__

    def start(self: subprocess.Popen, args: object, *more: object, **options: object) -> None:
        first = args[0] if isinstance(args, (list, tuple)) and args else args
        if first not in ALLOWED:
            pytest.skip(WHY.format(f"starts {first}"))
        popen(self, args, *more, **options)

    def fork(self: multiprocessing.process.BaseProcess) -> None:
        pytest.skip(WHY.format("starts a process"))

    def train(self: Engine, *args: object, **options: object) -> None:
        pytest.skip(WHY.format("trains"))

    patch.setattr(subprocess.Popen, "__init__", start)
    patch.setattr(multiprocessing.process.BaseProcess, "start", fork)
    patch.setattr(Engine, "__init__", train)
