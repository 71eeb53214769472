"""Raw folders as they lie on a disk: files by pattern, without litter, through folders that an archive doubled.

    raw folder ─glob→ paths, sorted      wrong folder ─find→ the right one nearby

A folder that cannot be listed is an error, never an empty folder: scans would be missing without a word.
"""

from __future__ import annotations

import fnmatch
import os
import typing as t
from collections.abc import Callable
from pathlib import Path

from bushpc.errors import DataError
from bushpc.files import is_litter

DEEPEST, MOST_FOLDERS = 5, 2000  # of a search for the right folder
PARENTS = 3


def listed(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without litter; [] if there is no such folder. Raises: DataError if unreadable."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if not is_litter(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): change its permissions.") from error


def glob(folder: Path, pattern: str) -> list[Path]:
    """The paths below `folder` that match a pattern like `*/images/*.png`, sorted, without litter; `**` is any
    number of folders.

    Archives and re-uploads nest folders: one that holds a single folder and not what the pattern asks for next is
    entered, so `images/*.png` also finds images/images/a.png.
    """
    paths = [folder]
    parts = pattern.split("/")
    for number, part in enumerate(parts):
        places = [_inner(path, part) if number else path for path in paths]
        if part == "**":
            paths = [below for place in places for below in _with_folders(place)]
        else:
            paths = [child for place in places for child in listed(place) if fnmatch.fnmatchcase(child.name, part)]
    return sorted(set(paths))


def _with_folders(folder: Path) -> list[Path]:
    """The folder and all folders below it."""
    return [folder, *(below for child in listed(folder) if child.is_dir() for below in _with_folders(child))]


def part(folder: Path, name: str) -> str:
    """The folder `name` relative to `folder`; name/name if it is doubled."""
    inner = _inner(folder / name, "*.*")
    return inner.relative_to(folder).as_posix()


def descend(folder: Path, patterns: t.Iterable[str]) -> Path:
    """`folder`, or the single folder inside of it, at any depth, that has the first part of one of the patterns."""
    firsts = [pattern.split("/")[0] for pattern in patterns]
    while not any(fnmatch.fnmatchcase(child.name, first) for child in listed(folder) for first in firsts):
        children = listed(folder)
        if len(children) != 1 or not children[0].is_dir():
            break
        folder = children[0]
    return folder


def find(folder: Path, fits: Callable[[Path], bool]) -> Path | None:
    """The nearest folder that fits: below `folder`, nearest first, else one of those above it."""
    level, seen = [folder], 0
    for _ in range(DEEPEST + 1):
        for place in level:
            if fits(place):
                return place
        seen += len(level)
        if seen > MOST_FOLDERS:
            break
        level = [child for place in level for child in _readable(place) if child.is_dir()]
    above = list(folder.absolute().parents)[:PARENTS]
    return next((place for place in above if fits(place)), None)


def _readable(folder: Path) -> list[Path]:
    try:
        return listed(folder)
    except DataError:
        return []


def _inner(folder: Path, wanted: str) -> Path:
    """The folder, or the one inside of it that holds what is wanted."""
    children = listed(folder)
    while len(children) == 1 and children[0].is_dir() and not fnmatch.fnmatchcase(children[0].name, wanted):
        folder = children[0]
        children = listed(folder)
    return folder
