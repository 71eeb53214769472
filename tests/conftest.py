"""Shared fixtures: where the real data is, what may not be skipped, and a small packed phantom dataset."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REQUIRE_REAL = os.environ.get("BUSHPC_REQUIRE_REAL") == "1"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where BUSHPC_REQUIRE_REAL=1 (CI), a skipped test that is marked `real` is a failure."""
    outcome = yield
    report = outcome.get_result()
    if REQUIRE_REAL and report.skipped and item.get_closest_marker("real"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but BUSHPC_REQUIRE_REAL=1: {report.longrepr}"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real datasets; without it the tests that use it are skipped, and say so."""
    folder = os.environ.get("BUSHPC_DATA")
    if not folder:
        pytest.skip("BUSHPC_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 synthetic scans, packed, with folds."""
    from bushpc.cli import main

    folder = tmp_path_factory.mktemp("phantom")
    assert main(["pack", "data=phantom", f"out={folder}", "count=20", "workers=1"]) == 0
    return folder
