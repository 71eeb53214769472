"""Promises of all scripts in slurm/: they find the clone without git, and say what to do where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "slurm").glob("*.sh"))
WORDS = {"pack.sh": ["phantom"], "resume.sh": ["runs/a"]}
DIRECT = [script for script in SCRIPTS if "\nexec .venv/bin/bushpc" in script.read_text()]


def call(script: Path, spool: Path, submit_dir: Path) -> subprocess.CompletedProcess[str]:
    """As slurmd does: a copy in the spool folder, which knows only where sbatch was called; no git in PATH."""
    spool.mkdir()
    shutil.copy(script, spool / "slurm_script")
    tools = spool / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "realpath", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        ["bash", spool / "slurm_script", *WORDS.get(script.name, [])],
        cwd=submit_dir,
        env={**clean, "SLURM_SUBMIT_DIR": str(submit_dir), "SLURM_JOB_ID": "1", "PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", DIRECT, ids=lambda script: script.stem)
def test_the_clone_is_found_without_git_from_any_folder_in_it(script, tmp_path):
    clone = tmp_path / "clone"
    for folder in ("slurm", ".venv/bin", "docs/how-to"):
        (clone / folder).mkdir(parents=True)
    shutil.copy(script, clone / "slurm")
    (clone / ".venv/bin/bushpc").write_text("#!/bin/sh\npwd > told\n")
    (clone / ".venv/bin/bushpc").chmod(0o755)
    result = call(script, tmp_path / "spool", clone / "docs/how-to")
    assert result.returncode == 0, result.stderr
    assert (clone / "told").read_text().strip() == str(clone)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_called_from_elsewhere_it_says_to_go_to_the_clone(script, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = call(script, tmp_path / "spool", elsewhere)
    assert result.returncode == 2
    assert "not called from a clone of bushpc" in result.stderr
    assert "No such file" not in result.stderr


def test_a_clone_without_its_environment_is_named(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(SCRIPTS[0].parent, clone / "slurm")
    result = call(DIRECT[0], tmp_path / "spool", clone)
    assert result.returncode == 2
    assert f"{clone} has no .venv/bin/bushpc" in result.stderr
