"""The files that bushpc of commit 71c433b wrote."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import torch

FILES, PLACEHOLDER = Path(__file__).with_name("files.tar.gz"), "@HERE@"
TEXTS = (".yaml", ".json", ".jsonl", ".csv", ".txt", ".md", "")


@pytest.fixture
def old(tmp_path: Path, monkeypatch) -> Path:
    """The folder with the old files, which say that they were written here."""
    with tarfile.open(FILES) as tar:
        tar.extractall(tmp_path, filter="tar")
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix in TEXTS and PLACEHOLDER.encode() in (content := path.read_bytes()):
            dates = path.stat()
            path.write_bytes(content.replace(PLACEHOLDER.encode(), str(tmp_path).encode()))
            os.utime(path, (dates.st_atime, dates.st_mtime))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
