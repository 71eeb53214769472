"""Promise of the package: a wheel, installed in an empty folder, packs, trains, follows and reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("bushpc", "configs", "shards", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        path, target = ROOT / name, source / name
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__", "*.tar", "raw", "features"))
        else:
            shutil.copy(path, target)
    command = ["pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    subprocess.run([sys.executable, "-m", *command], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def bushpc(wheel, tmp_path_factory):
    """bushpc("cv", "data=phantom", …) → what it prints, in an empty folder that has nothing but the wheel."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    install = ["pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True)

    def run(*words: str, codes: tuple[int, ...] = (0,)) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        environment.pop("BUSHPC_CONFIGS", None)
        done = subprocess.run(
            [sys.executable, "-m", "bushpc.cli", *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode in codes, f"{words}: {done.stdout[-2000:]} {done.stderr[-4000:]}"
        return done.stdout

    run.folder, run.site = folder, site
    return run


def test_a_wheel_holds_configs_cards_and_templates_and_no_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("packaged/configs/config.yaml", "packaged/configs/cluster/slurm.yaml", "packaged/configs/grid"):
        assert any(each.startswith(f"bushpc/{name}") for each in names), name
    assert {path.parent.name for path in (ROOT / "shards").glob("*/card.yaml")} == {
        each.split("/")[3] for each in names if each.startswith("bushpc/packaged/shards/") and "card.yaml" in each
    }
    assert any(each.startswith("bushpc/report/templates/") for each in names)
    assert not [each for each in names if each.endswith((".tar", ".safetensors", ".png"))]
    assert wheel.stat().st_size < 3_000_000


def test_a_wheel_in_an_empty_folder_packs_trains_follows_and_reports(bushpc):
    """The smallest run there is, by the jobs that a user's run has: code snapshot, local executor, report."""
    bushpc("pack", "data=phantom", "count=20", "workers=1")
    assert (bushpc.folder / "shards" / "phantom" / "manifest.json").exists()
    words = ["model=unet_small", "data=phantom", "cluster=local", "model.image_size=64", "train.iterations=2"]
    words += ["train.batch_size=2", "train.track=[]", "evaluate.explain=0", "fold=0", "name=first"]
    words += [f"loader.cache_dir={bushpc.folder / 'cache'}"]
    bushpc("cv", *words, "--wait")
    run = bushpc.folder / "runs" / "first"
    assert (run / "cells" / "fold0" / "DONE").exists()
    [code] = [path for path in (run / "code").iterdir() if not path.name.startswith(".")]
    assert (code / "bushpc" / "packaged" / "configs" / "config.yaml").exists()
    # One fold of five: status and report say that others are missing.
    assert "1 done" in bushpc("status", str(run), codes=(1,))
    bushpc("report", str(run), codes=(0, 1))
    assert list((run / "report").glob("*.html"))
