"""Promises of commands as jobs without a GPU: they go where the profile says such jobs go, and run where they were
typed."""

from __future__ import annotations

import time
from pathlib import Path

from bushpc.cli.app import main

SETTINGS = ["model=unet_small", "data=phantom"]


def test_a_command_goes_where_jobs_without_a_gpu_go(tmp_path, capsys):
    profile = ["cluster=jean_zay", "cluster.account=abc@a100", "cluster.cpu_jobs.account=abc@cpu"]
    command = ["job", "--dry-run", "--cores", "4", "--minutes", "90", "--run", "pack data=phantom"]
    assert main([*command, *SETTINGS, *profile, f"runs_dir={tmp_path / 'runs'}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#SBATCH")]
    expected = {"account=abc@cpu", "cpus-per-task=4", "time=90", "job-name=bushpc-pack", "hint=nomultithread"}
    assert {f"#SBATCH --{option}" for option in expected} <= set(lines)
    assert not [line for line in lines if "gres" in line or "constraint" in line or "array" in line]
    assert not (tmp_path / "runs").exists()


def test_a_command_runs_outside_the_container_of_the_ranks(tmp_path, capsys):
    """In the image there may be no sbatch for `resume`, and the folders that a command names are mounted nowhere."""
    image = tmp_path / "bushpc.sif"
    image.touch()
    words = [*SETTINGS, "cluster=slurm", f"runs_dir={tmp_path}", f"cluster.container.image={image}"]
    assert main(["job", "--dry-run", "--run", "resume runs/x", *words]) == 0
    assert "apptainer" not in capsys.readouterr().out


def test_a_command_runs_in_the_folder_where_it_was_typed(tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    where = ["cluster=local", f"runs_dir={tmp_path / 'runs'}"]
    assert main(["job", "--run", "pack data=phantom out=packed", *SETTINGS, *where]) == 0
    log = Path(capsys.readouterr().out.splitlines()[1].removeprefix("log: "))
    deadline = time.monotonic() + 300
    while not (done := tmp_path / "here" / "packed" / "manifest.json").exists():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)
    assert done.stat().st_size


def test_a_job_without_a_command_is_refused_with_an_example(capsys):
    assert main(["job", *SETTINGS, "cluster=local"]) == 2
    assert 'for example --run "pack data=breast"' in capsys.readouterr().err
