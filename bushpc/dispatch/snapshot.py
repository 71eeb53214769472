"""The code that a run's jobs execute: a copy of the package in the run folder, its commit and its versions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bushpc
from bushpc import environment
from bushpc.config import places
from bushpc.files import sha256_of
from bushpc.runs.layout import RunDir


def take_snapshot(run_dir: Path) -> Path:
    """Copy package and configs into the run, once per content, so that editing never changes a queued job."""
    files, target = _to_copy(run_dir)
    if not target.exists():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        for path, above in files:  # without their modes: a site's clone may be read-only, and this folder is not
            copy = aside / path.relative_to(above)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        aside.rename(target)
    return target


def snapshot_path(run_dir: Path) -> Path:
    """Where `take_snapshot` would copy it to."""
    return _to_copy(run_dir)[1]


def _to_copy(run_dir: Path) -> tuple[list[tuple[Path, Path]], Path]:
    """The files of package and configs, each with the folder above, and the run's folder named after their content."""
    package = Path(bushpc.__file__).parent
    # An installed package holds its configs itself.
    configs = places.shipped_configs()
    folders = (package,) if configs.is_relative_to(package) else (package, configs)
    files = sorted((path, folder.parent) for folder in folders for path in folder.rglob("*") if path.is_file())
    kept = [(path, above) for path, above in files if "__pycache__" not in path.parts]
    listing = "".join(f"{path.relative_to(above)} {sha256_of(path)}\n" for path, above in kept)
    return kept, RunDir(run_dir).snapshot(hashlib.sha256(listing.encode()).hexdigest()[:12])


def commit() -> str | None:
    """The checkout's commit, with +changes when the tree differs from it, or the wheel's; None if unknown."""
    if not places.IS_CLONE:  # the repository that an installed package may lie in is not ours
        noted = Path(places.__file__).parents[1] / "packaged" / "COMMIT"
        return noted.read_text(encoding="utf-8").strip() if noted.is_file() else None
    git, env = ["git", "-C", str(places.CLONE)], environment.for_process(environment.WORKER)
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], env=env, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    if head.returncode:
        return None
    changes = subprocess.run([*git, "status", "--porcelain"], env=env, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("bushpc", "torch", "accelerate", "deepspeed", "timm", "open_clip_torch", "submitit", "nnunetv2"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
