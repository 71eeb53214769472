"""Where the tests' processor seconds go: `pytest --times=FILE` writes a line of JSON per test, as it ends.

Processes that a test starts count, also those that outlive it, where Linux lets each worker have a control group
(cgroup v1, root); elsewhere only the children that have ended. A fixture counts for the test that needed it first.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import typing as t
from collections.abc import Iterator
from pathlib import Path

import pytest

GROUPS = Path("/sys/fs/cgroup/cpuacct")


class Times:
    """Writes {"test", "wall", "cpu"} in seconds to `file`; the line without a test is the start with the collection."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.begun = time.monotonic()
        self.group: Path | None = GROUPS / f"pytest-{os.getpid()}"
        try:
            self.group.mkdir()
            (self.group / "cgroup.procs").write_text(str(os.getpid()))
            self.before_group = _own_seconds()
        except OSError:
            self.group, self.before_group = None, 0.0

    def seconds(self) -> float:
        """Processor seconds of this process and all that it started."""
        if self.group is None:
            return _own_seconds()
        return self.before_group + int((self.group / "cpuacct.usage").read_text()) / 1e9

    def note(self, test: str, wall: float, cpu: float) -> None:
        line = {"test": test, "wall": round(wall, 2), "cpu": round(cpu, 2)}
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self) -> None:
        self.note("", time.monotonic() - self.begun, self.seconds())

    def pytest_sessionfinish(self) -> None:
        """Leave the group, and no group behind, unless a process that a test left still lives in it."""
        if self.group is not None:
            (GROUPS / "cgroup.procs").write_text(str(os.getpid()))
            with contextlib.suppress(OSError):
                self.group.rmdir()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        begun, before = time.monotonic(), self.seconds()
        answer = yield
        self.note(item.nodeid, time.monotonic() - begun, self.seconds() - before)
        return t.cast(None, answer)


def _own_seconds() -> float:
    return sum(os.times()[:4])
