"""What is tried with changed files: a valid one, and the door that reads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing as t
from collections.abc import Callable
from pathlib import Path


def as_it_is(_: Path, content: bytes) -> bytes:
    return content


def nothing(_: Path) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """write: makes valid files in a folder, from packed shards where it needs some, and returns the one to change.

    read: the door. covered: the content, with what elsewhere states its hash. clean: removes what reading made.
    slow: how many times fewer inputs it gets, as each takes so long.
    """

    write: Callable[[Path, Path], Path]
    read: Callable[[Path], t.Any]
    covered: Callable[[Path, bytes], bytes] = as_it_is
    clean: Callable[[Path], None] = nothing
    slow: int = 1


def file(name: str, content: bytes | str) -> Callable[[Path, Path], Path]:
    """Writes that file."""

    def write(folder: Path, _: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def without(*names: str) -> Callable[[Path], None]:
    """Removes these folders."""

    def clean(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)

    return clean


def lines(*entries: t.Any) -> str:
    """As .jsonl."""
    return "".join(json.dumps(each) + "\n" for each in entries)
