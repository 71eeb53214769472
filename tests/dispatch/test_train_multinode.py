"""Promises of slurm/train_multinode.sh that need no Slurm; what comes back is in test_job.py."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train_multinode.sh"


@pytest.mark.parametrize("made_before", ["nothing", "our folder", "a link", "a file"])
def test_compiled_code_is_kept_only_in_a_folder_of_our_own(tmp_path, made_before):
    cache = tmp_path / f"bushpc-compiled-{os.getuid()}"
    if made_before == "our folder":
        cache.mkdir()
    elif made_before == "a link":
        (tmp_path / "theirs").mkdir()
        cache.symlink_to(tmp_path / "theirs")
    elif made_before == "a file":
        cache.touch()
    found = re.search(r"^private_caches='(.*?)'$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    out = subprocess.run(
        ["bash", "-c", found[1], "bash", "sh", "-c", "echo $TRITON_CACHE_DIR; echo $TORCHINDUCTOR_CACHE_DIR"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    [folder] = {Path(line).parent for line in out}
    assert (folder == cache) is (made_before in ("nothing", "our folder"))
    assert folder.parent == tmp_path
    assert folder.is_dir()
    assert not folder.is_symlink()
    assert made_before == "our folder" or folder.stat().st_mode & 0o777 == 0o700
