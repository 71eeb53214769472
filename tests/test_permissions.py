"""Promises on a site's file systems: a read-only clone, another member's run and a shared group folder work or say why.

Root may write everywhere, so commands run without root's power over others' files: a clone that is read-only is then
read-only for root, too, and so is what belongs to another user.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IS_ROOT = os.getuid() == 0
POWERS = "-dac_override,-dac_read_search,-fowner,-chown"
ORDINARY = ("setpriv", f"--bounding-set={POWERS}", f"--inh-caps={POWERS}") if IS_ROOT else ()
SOMEBODY, THEIR_GROUP = 65534, 12345


def bushpc(*words: str | Path, site: Path = ROOT, umask: int = 0o022, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of the bushpc that lies in `site`, as an ordinary user."""
    return subprocess.run(
        [*ORDINARY, sys.executable, "-m", "bushpc.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=cwd,
        umask=umask,
        capture_output=True,
        encoding="utf-8",
    )


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mode for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Path]:
    """A clone that nobody may write to."""
    site = tmp_path_factory.mktemp("site") / "bushpc"
    for name in ("bushpc", "configs", "shards"):
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__", "*.tar"))
    folders = [site, *(path for path in site.rglob("*") if path.is_dir())]
    for path in (*site.rglob("*"), site):
        path.chmod(path.stat().st_mode & ~0o222)
    yield site
    for path in folders:
        path.chmod(0o755)


@pytest.fixture(scope="module")
def words(phantom_folder, tmp_path_factory) -> tuple[str, ...]:
    return (
        *("model=unet_small", "model.image_size=32", "train.iterations=4", "data=phantom", "cluster=local", "name=run"),
        *(f"data.root={phantom_folder}", f"loader.cache_dir={tmp_path_factory.mktemp('cache')}"),
    )


@pytest.fixture(scope="module")
def shared(site, words, tmp_path_factory) -> Path:
    """A run that was made from the read-only clone in the folder of a group, by a member with umask 002."""
    group = tmp_path_factory.mktemp("group")
    if IS_ROOT:
        os.chown(group, -1, THEIR_GROUP)
    group.chmod(0o2775)
    done = bushpc("cv", *words, f"runs_dir={group}", "fold=0", "--wait", site=site, umask=0o002, cwd=group)
    assert done.returncode == 0, done.stderr
    return group / "run"


def test_a_read_only_clone_names_what_to_choose_and_nothing_is_left(site, words, tmp_path):
    before = listing(site)
    for command, then in (
        (("cv", *words), "runs_dir=FOLDER"),
        (("train", *words, "fold=0"), "runs_dir=FOLDER"),
        (("pack", "data=phantom", "count=4", "workers=1"), "out="),
        (("shards", "show", *(word for word in words if word.startswith("data=")), f"out={site}/page"), "out="),
    ):
        refused = bushpc(*command, site=site, cwd=tmp_path)
        assert refused.returncode == 2, (command, refused.stderr)
        assert then in refused.stderr
        assert str(site) in refused.stderr
        assert "Traceback" not in refused.stderr
    assert listing(site) == before
    assert list(tmp_path.iterdir()) == []


def test_a_shared_folder_gets_the_modes_of_umask_and_setgid(shared):
    wrong = []
    for path in (shared, *shared.rglob("*")):
        if path.is_symlink():
            continue
        status = path.stat()
        wanted = 0o2775 if path.is_dir() else 0o664
        if stat.S_IMODE(status.st_mode) != wanted or (IS_ROOT and status.st_gid != THEIR_GROUP):
            wrong.append(f"{path.relative_to(shared)}: {stat.S_IMODE(status.st_mode):o}, group {status.st_gid}")
    assert wrong == []


@pytest.mark.skipif(not IS_ROOT, reason="only root can make a file that belongs to another user")
def test_another_members_run_can_be_read_and_is_not_changed(shared, words, tmp_path):
    theirs, mine = tmp_path / "theirs" / "run", tmp_path / "mine"
    mine.mkdir()
    shutil.copytree(shared, theirs, symlinks=True)
    for path in (theirs.parent, theirs, *theirs.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.chown(path, SOMEBODY, SOMEBODY)
    (theirs / "cells" / "fold0" / "DONE").unlink()
    before = listing(theirs)
    seen = bushpc("status", theirs, cwd=mine)
    assert seen.returncode == 1
    assert "fold0" in seen.stdout
    for command, then in (
        (("resume", theirs), "runs_dir=FOLDER"),
        (("retry", theirs, "fold0"), "runs_dir=FOLDER"),
        (("cancel", theirs), "runs_dir=FOLDER"),
        (("cv", *words, f"runs_dir={theirs.parent}"), "runs_dir=FOLDER"),
        (("train", *words, f"runs_dir={theirs.parent}", "fold=0"), "runs_dir=FOLDER"),
        (("report", theirs), "--out FOLDER"),
        (("compare", theirs, shared), "--out FOLDER"),
    ):
        refused = bushpc(*command, cwd=mine)
        assert refused.returncode == 2, (command, refused.stdout, refused.stderr)
        assert then in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
        assert "mode 755" in refused.stderr
    assert listing(theirs) == before
    written = bushpc("report", theirs, "--out", mine / "report", cwd=mine)
    assert written.returncode == 0, written.stderr
    assert [path.name for path in mine.iterdir()] == ["report"]


@pytest.mark.skipif(not IS_ROOT, reason="only root can make a file that belongs to another user")
def test_a_report_that_another_member_wrote_is_not_half_replaced(shared, tmp_path):
    """In a group's folder one may rename another member's report, but not remove its files."""
    run = tmp_path / "run"
    shutil.copytree(shared, run, symlinks=True)
    (run / "report").chmod(0o755)
    os.chown(run / "report", SOMEBODY, SOMEBODY)
    refused = bushpc("report", run, cwd=tmp_path)
    assert (refused.returncode, "--out FOLDER" in refused.stderr) == (2, True), refused.stderr
    assert [path.name for path in run.glob("report*")] == ["report"]
