"""`pytest --quick`: leaves out, as skipped, every test that starts a process or trains. `make quick` runs the rest.

A test is left out when it comes to that point, so no list or mark has to be kept.
"""

from __future__ import annotations

import multiprocessing.process
import subprocess
import typing as t

import pytest

WHY = "quick: {}; `make test` runs it"
ALLOWED = ("git",)  # ends within milliseconds
# Why the running test is left out. In a thread pytest.skip ends nothing, and the test fails over what the thread lacks.
reasons: list[str] = []


def leave_out(what: str) -> t.NoReturn:
    reasons.append(WHY.format(what))
    pytest.skip(reasons[-1])


def leave_out_slow_tests(patch: pytest.MonkeyPatch) -> None:
    """From now on, starting a process or a training skips the test that does it."""
    from bushpc.train.engine import Engine

    popen = subprocess.Popen.__init__

    def start(self: subprocess.Popen, args: object, *more: object, **options: object) -> None:
        first = args[0] if isinstance(args, (list, tuple)) and args else args
        if first not in ALLOWED:
            leave_out(f"starts {first}")
        popen(self, args, *more, **options)

    def fork(self: multiprocessing.process.BaseProcess) -> None:
        leave_out("starts a process")

    def train(self: Engine, *args: object, **options: object) -> None:
        leave_out("trains")

    patch.setattr(subprocess.Popen, "__init__", start)
    patch.setattr(multiprocessing.process.BaseProcess, "start", fork)
    patch.setattr(Engine, "__init__", train)
