"""Atomic writes, locks and hashes for all modules that write files."""

from __future__ import annotations

import codecs
import fcntl
import functools
import grp
import hashlib
import json
import os
import pwd
import shutil
import socket
import stat
import typing as t
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bushpc.errors import BushpcWarning, DataError

# Written by `bushpc export` next to the folders of the folds. It is defined here for models and for modules without
# torch.
EXPORT_FILE = "export.json"

# Files that are written at the same time.
WRITERS = 16


# What operating systems and Excel leave in folders, in lower case.
LITTER = ("thumbs.db", "desktop.ini", "__macosx")


def is_litter(name: str) -> bool:
    """Whether a file or folder is none of the user's: `.DS_Store`, `._scan.png`, `~$table.xlsx`, `desktop.ini` …"""
    return name.startswith((".", "~$")) or name.lower() in LITTER


def decoded(content: bytes) -> str:
    """The text of a table, as spreadsheet programs save it: UTF-8 or UTF-16, with or without a byte-order mark.

    Raises: UnicodeDecodeError for another encoding.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")


def delimiter_of(text: str, usual: str = ",") -> str:
    """What separates a table's columns: `usual`, unless its first line has none but semicolons or tabs."""
    first = text.partition("\n")[0]
    others = [each for each in (",", ";", "\t") if each in first]
    return usual if usual in first or not others else max(others, key=first.count)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see either the old or the new content, never a part, even after a crash."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:  # a partial file would only take space on a full disk
        aside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_all(contents: Mapping[Path, str]) -> None:
    """Write many files as `write_atomically` does, several at a time: most of it is waiting for the disk."""
    with ThreadPoolExecutor(WRITERS) as pool:
        for _ in pool.map(write_atomically, contents.keys(), contents.values()):
            pass


def read_quickly(path: Path) -> bytes:
    """The content of a small file. Path.read_bytes takes twice as long, which matters for fifty thousand of them."""
    with open(path, "rb", buffering=0) as file:
        return file.readall()


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Lock the file `path`; yields False if another process has it locked. The kernel unlocks it on any death."""
    with _open_to_lock(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:  # some cluster file systems have no locks
            warnings.warn(
                f"no file locks in {path.parent} ({error}): two processes there would not notice each other",
                BushpcWarning,
                stacklevel=3,
            )
        yield True


def _open_to_lock(path: Path) -> t.TextIO:
    """Reading is enough to lock a file that another member of a group made."""
    try:
        return path.open("a")
    except PermissionError:
        if not path.exists():
            raise
        return path.open()


def why_not_writable(folder: Path) -> str:
    """Why no file can be made in `folder`, or in the nearest one above it that exists; "" where it can."""
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is no folder"
    if os.access(nearest, os.W_OK | os.X_OK):
        return ""
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        return f"{nearest} is on a read-only file system"
    return f"you ({_user(os.getuid())}) may not write to {nearest}, which belongs to {whose(nearest)}"


def whose(path: Path) -> str:
    """Owner, group and mode of a file or folder, for a message."""
    status = path.stat()
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f"{_user(status.st_uid)}, group {group}, mode {stat.S_IMODE(status.st_mode):o}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # some containers know no names
        return str(uid)


def read_json(path: Path) -> dict[str, t.Any] | None:
    """The object in a JSON file, or None if there is no file. Raises: DataError if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Restore it, or move it away if it can be created again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} must contain a JSON object, not a {type(content).__name__}. Restore it, or move it away"
        )
    return content


def is_inside(name: t.Any) -> bool:
    """Whether a file's name, as somebody else's file states it, stays in the folder that it is relative to."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not os.path.isabs(name)
        and os.path.normpath(name).split("/", 1)[0] not in ("..", ".", "")
    )


def share_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or else a copy. `source` must not change any more.

    An existing target is left unchanged.
    """
    if target.exists():
        return
    aside = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # a different file system, one without links, or another user's file
        try:
            shutil.copyfile(source, aside)
            flush_file(aside)
            aside.rename(target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def flush_file(path: Path) -> None:
    """fsync a file that another library wrote."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """fsync a folder: a rename is durable only after its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_own_folder(path: Path) -> bool:
    """Whether `path` is a folder of this user and not a link: in a world-writable place, others could create either."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def size_text(count: float) -> str:
    """A number of bytes in the unit that shows it best.

    >>> size_text(0), size_text(56_600), size_text(3_400_000), size_text(1_250_000_000)
    ('0 bytes', '57 kB', '3.4 MB', '1.25 GB')
    """
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_unchanged(path: Path) -> str:
    """As `sha256_of`, computed once of a file that keeps its time and size, however many rows of a grid ask."""
    status = path.stat()
    return _known_sha256(path, status.st_mtime_ns, status.st_size, status.st_ino)


@functools.lru_cache(maxsize=256)
def _known_sha256(path: Path, *_: int) -> str:
    return sha256_of(path)
