"""Promises of slurm/pack.sh: it passes every word on as it is, whatever a folder is called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "pack.sh"


@pytest.fixture
def clone(tmp_path):
    """A clone whose `bushpc` only notes what it was told."""
    clone = tmp_path / "clone"
    (clone / "slurm").mkdir(parents=True)
    (clone / ".venv/bin").mkdir(parents=True)
    shutil.copy(SCRIPT, clone / "slurm" / "pack.sh")
    fake = clone / ".venv/bin/bushpc"
    fake.write_text('#!/bin/sh\npwd > told\nprintf "%s\\n" "$@" >> told\n')
    fake.chmod(0o755)
    subprocess.run(["git", "init", "-q", clone], check=True)
    return clone


def told(clone, words, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    subprocess.run(["bash", clone / "slurm" / "pack.sh", *words], cwd=cwd, env={**clean, **environment}, check=True)
    folder, *rest = (clone / "told").read_text().splitlines()
    assert Path(folder) == clone
    return rest


@pytest.mark.parametrize("name", ["raw", "with blanks and 'quotes'", "$(touch pwned);", "a=b", "-n"])
def test_a_folder_of_any_name_arrives_whole(clone, tmp_path, name):
    (tmp_path / name).mkdir()
    assert told(clone, ["breast", name, "excerpt=true"], tmp_path) == [
        "pack", "data=breast", f"src={tmp_path / name}", "excerpt=true",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("pwned"))


def test_a_synthetic_dataset_needs_no_folder(clone, tmp_path):
    assert told(clone, ["phantom"], tmp_path) == ["pack", "data=phantom"]
    assert told(clone, ["phantom", "count=30"], tmp_path) == ["pack", "data=phantom", "count=30"]


def test_under_slurm_the_clone_is_where_it_was_submitted(clone, tmp_path):
    (clone / "raw").mkdir()
    shutil.copy(clone / "slurm" / "pack.sh", tmp_path / "slurm_script")  # Slurm runs a copy from its spool
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(clone / "slurm")}
    subprocess.run(
        ["bash", tmp_path / "slurm_script", "breast", "../raw"], cwd=clone / "slurm", env=environment, check=True
    )
    assert (clone / "told").read_text().splitlines() == [str(clone), "pack", "data=breast", f"src={clone / 'raw'}"]


def test_without_a_dataset_it_says_how_it_is_used(clone):
    result = subprocess.run(["bash", clone / "slurm" / "pack.sh"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage: sbatch slurm/pack.sh DATASET" in result.stderr
