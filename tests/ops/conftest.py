"""A stand-in for Slurm's commands."""

from __future__ import annotations

import pytest


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """fake_slurm(squeue="echo …", …): only these commands exist, as shell scripts."""

    def make(**scripts: str) -> None:
        folder = tmp_path / "fake bin"
        folder.mkdir()
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return make
