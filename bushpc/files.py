"""Writing that is whole or absent, and hashing. Used by every room that writes files; knows nothing of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import typing as t
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bushpc.errors import DataError

# What `bushpc export` writes beside the folders of the folds; models ask it, too, and rooms that know no torch.
EXPORT_FILE = "export.json"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part, even after a crash."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:  # a half file would only add to what fills the disk
        aside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`; yields False at once if another process holds it. Freed by the kernel on any death."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:  # some cluster file systems have no locks; then there is nothing to ask
            warnings.warn(
                f"no file locks in {path.parent} ({error}): two processes there would not notice", stacklevel=3
            )
        yield True


def read_json(path: Path) -> dict[str, t.Any] | None:
    """The object in a JSON file, or None where there is no file (yet). Raises: DataError if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Restore it, or move it away if it can be made anew"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__} where an object is needed. Restore it or move it away"
        )
    return content


def share_file(source: Path, target: Path) -> None:
    """Have `source`, which nobody writes to any more, as `target`, too: a hard link, or else a copy on the disk.

    A target that is there already is left alone.
    """
    if target.exists():
        return
    aside = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # another file system, or one without links, or somebody else's file
        try:
            shutil.copyfile(source, aside)
            flush_file(aside)
            aside.rename(target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def flush_file(path: Path) -> None:
    """Force a file that another library wrote to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Force names to the disk: a rename is durable only when the folder that holds it is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_own_folder(path: Path) -> bool:
    """Whether it is a folder of this user, and no link to one: where everybody may write, anybody may lay either."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
