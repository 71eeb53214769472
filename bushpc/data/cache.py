"""Shards → decoded pixels, once per node: all ranks, loader workers and cells of a node share the same memory maps.

    <place>/lock                                   held while caches are created or deleted in this place
    <place>/<dataset>-<size>-<content>_<host>_<boot>/
      images.npy   (N, S, S, C) uint8
      masks.npy    (N, S, S) uint8, bit k is mask class k
      ready.npy    (N,) bool: which rows are decoded
      chunks       byte c is locked by the process that decodes chunk c
      users        locked (shared) by every process that uses the cache, until it ends

All processes of a node decode together: each claims free chunks, writes their pixels and then their flags. The kernel
releases the locks of a process that dies, so the other processes, or the next job, continue from there. An unused cache
is deleted if its decoding is incomplete, if the machine has rebooted since (a disk may then have flags without their
pixels), or if all caches together exceed `loader.cache_gb`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import math
import os
import shutil
import socket
import stat
import time
import typing as t
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bushpc.config import LoaderConfig
from bushpc.data.room import places, room
from bushpc.data.square import decode
from bushpc.errors import DataError
from bushpc.files import is_own_folder, size_text
from bushpc.shards.manifest import Manifest, Record

# Part of a cache's name: increase it when `resize` produces different pixels or the file format changes.
VERSION = 4
# Small enough to react to a stop signal within a fraction of a second, large enough to make locking negligible.
CHUNK_ROWS = 8
POLL_S = 0.05
# Preallocation in memory writes zeros at a few GB/s. It is done in pieces, so that a stop signal interrupts it.
ALLOCATED_AT_ONCE = 1 << 30
GB = 1e9


class DecodingStopped(Exception):
    """`keep_going` returned False before all images were decoded. There is no complete cache; finished parts remain."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Decoded images (N, S, S, C) and masks as bits (N, S, S), uint8 and read-only, and the row of each key."""

    images_NSSC: np.ndarray
    masks_NSS: np.ndarray
    rows: dict[str, int]


# Caches that this process has open, with their locks; they stay in use until the process ends.
_opened: dict[tuple[str, int, str | None], tuple[Cache, t.IO[bytes]]] = {}


def open_cache(
    manifest: Manifest,
    folder: Path,
    image_size: int,
    loader: LoaderConfig,
    *,
    keep_going: Callable[[], bool] = lambda: True,
    log: Callable[[str], None] = print,
) -> Cache:
    """A fully decoded dataset at `image_size`. Later calls in the same process return the same cache.

    folder: of the shards. keep_going: called between chunks, several times a second.
    Raises: DecodingStopped if `keep_going` returns False; DataError if there is no space, or an image cannot be used
    at this size.
    """
    key = (manifest.hash, image_size, loader.cache_dir)
    if key in _opened:
        return _opened[key][0]
    records = manifest.records
    files = _Files.of(manifest, image_size)
    with contextlib.ExitStack() as locks:
        usable, refused = _lock_places(places(loader), locks, keep_going)
        _reclaim(usable, files, loader.cache_gb, log)
        home = _existing(usable, files) or _create(usable, refused, files, keep_going)
        users = (home / "users").open("rb+")
        fcntl.flock(users, fcntl.LOCK_SH)
        os.utime(home / "users")  # records the last use
    try:
        _decode(home, folder, records, image_size, keep_going, log)
    except BaseException:
        users.close()
        raise
    cache = Cache(
        images_NSSC=_map(home / "images.npy"),
        masks_NSS=_map(home / "masks.npy"),
        rows={record.key: row for row, record in enumerate(records)},
    )
    _opened[key] = cache, users
    return cache


# --- decoding together ------------------------------------------------------------------------------------------


def _decode(
    home: Path,
    folder: Path,
    records: list[Record],
    size: int,
    keep_going: Callable[[], bool],
    log: Callable[[str], None],
) -> None:
    """Decode missing rows together with the node's other processes; returns when all rows are decoded."""
    ready = _map(home / "ready.npy", "r+")
    if ready.all():
        return
    cpus = len(os.sched_getaffinity(0))
    log(f"decoding {int((~ready).sum())} of {len(ready)} images for all processes of this node: {cpus} threads, {home}")
    images, masks = _map(home / "images.npy", "r+"), _map(home / "masks.npy", "r+")
    # POSIX locks are released when the process closes any descriptor of the file, so it is opened only here.
    with (home / "chunks").open("rb+") as claims, _threads(cpus) as pool:

        def decode_chunk(first: int) -> bool:
            try:
                fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, first)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):  # another process has it
                    return False
                raise
            try:
                for row in range(first, min(first + CHUNK_ROWS, len(records))):
                    if not ready[row]:
                        images[row], masks[row] = decode(folder, records[row], size)
                        ready[row] = True
            finally:
                fcntl.lockf(claims, fcntl.LOCK_UN, 1, first)
            return True

        while missing := sorted({int(row) // CHUNK_ROWS * CHUNK_ROWS for row in np.flatnonzero(~ready)}):
            chunks = [pool.submit(decode_chunk, first) for first in missing]
            try:
                claimed = False
                for chunk in as_completed(chunks):
                    claimed |= chunk.result()
                    if not keep_going():
                        raise DecodingStopped(f"{int(ready.sum())} of {len(ready)} images are decoded")
            finally:
                for chunk in chunks:
                    chunk.cancel()
            if not claimed:  # other processes have the rest: wait for their flags, or for their locks if they die
                time.sleep(POLL_S)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, as Pillow and torch release the GIL. Each uses one core, so torch's own threads are off."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "decode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


# --- where caches are stored, and which are deleted -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The name of a cache's folder, and its arrays."""

    name: str
    arrays: dict[str, tuple[type, tuple[int, ...]]]

    @classmethod
    def of(cls, manifest: Manifest, size: int) -> _Files:
        content = hashlib.sha256(f"{VERSION}|{manifest.hash}|{size}".encode()).hexdigest()[:16]
        count = len(manifest.records)
        return cls(
            name=f"{manifest.dataset}-{size}-{content}_{socket.gethostname()}_{boot()}",
            arrays={
                "images.npy": (np.uint8, (count, size, size, len(manifest.channels))),
                "masks.npy": (np.uint8, (count, size, size)),
                "ready.npy": (np.bool_, (count,)),
            },
        )

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) for _, shape in self.arrays.values())


def boot() -> str:
    """Eight hex digits that the running kernel drew when it started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _lock_places(
    wanted: list[Path], locks: contextlib.ExitStack, keep_going: Callable[[], bool]
) -> tuple[list[Path], list[str]]:
    """The usable places, locked until `locks` closes, and a message for each unusable one.

    Every process locks all of them in the same order before it decides, so all processes of a node choose the same.
    """
    usable, refused = [], []
    for place in wanted:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if place.parent.stat().st_mode & stat.S_IWOTH and not _is_ours_alone(place):
                refused.append(f"{place} is a link, or other users can write to it")
                continue
            lock = locks.enter_context((place / "lock").open("ab"))
            while not try_lock(lock):
                if not keep_going():
                    raise DecodingStopped(f"another process is creating or deleting a cache in {place}")
                time.sleep(POLL_S)
        except OSError as error:  # not writable, or a network file system without locks
            refused.append(f"{place} cannot be used: {error}")
        else:
            usable.append(place)
    return usable, refused


def _is_ours_alone(place: Path) -> bool:
    """Whether the folder belongs to this user and nobody else can write to it."""
    return is_own_folder(place) and not place.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def try_lock(file: t.IO[bytes]) -> bool:
    """Lock a file, unless another process has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _existing(usable: list[Path], files: _Files) -> Path | None:
    """The existing cache, complete or not, if a place has it."""
    for place in usable:
        home = place / files.name
        if all(_fits(home / name, *array) for name, array in files.arrays.items()) and (home / "users").exists():
            return home
        # Cleaners of temporary folders may have deleted some of its files. Processes keep the files they have open.
        shutil.rmtree(home, ignore_errors=True)
    return None


def _fits(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return bool(array.dtype == dtype and array.shape == shape)


def _create(usable: list[Path], refused: list[str], files: _Files, keep_going: Callable[[], bool]) -> Path:
    """Preallocate an empty cache in the first place with enough space. Raises: DataError if there is none."""
    for place in usable:
        available = room(place)
        if available < files.bytes:
            refused.append(f"{place} has space for {size_text(available)}")
            continue
        aside = place / f".{files.name}"
        try:
            aside.mkdir()
            for name, (dtype, shape) in files.arrays.items():
                _allocate(aside / name, dtype, shape, keep_going)
            for name in ("chunks", "users"):
                (aside / name).touch()
            aside.rename(place / files.name)
        except OSError as error:
            refused.append(f"{place}: {error}")
        else:
            return place / files.name
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise DataError(
        f"there is no space for the decoded images ({size_text(files.bytes)}): {'; '.join(refused)}. "
        "Set loader.cache_dir to a folder on a disk of the node, request more memory (cluster.mem_gb) to use "
        "/dev/shm, or lower loader.cache_gb so that unused caches are deleted"
    )


def _allocate(path: Path, dtype: type, shape: tuple[int, ...], keep_going: Callable[[], bool]) -> None:
    """Create an array file of zeros with all blocks allocated: a full disk is an error now, not a bus error later."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    with path.open("wb") as file:
        file.write(header.getvalue())
        file.flush()
        end = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
        for at in range(0, end, ALLOCATED_AT_ONCE):
            if not keep_going():
                raise DecodingStopped(f"{path} is not yet allocated")
            os.posix_fallocate(file.fileno(), at, min(ALLOCATED_AT_ONCE, end - at))


def _reclaim(usable: list[Path], wanted: _Files, limit_gb: float, log: Callable[[str], None]) -> None:
    """Delete unused caches of this host: stale ones, and, above the size limit, the least recently used ones."""
    kept, gone = wanted.bytes, []
    idle: list[tuple[float, Path]] = []
    for place in usable:
        for aside in place.glob(
            f".*_{socket.gethostname()}_*"
        ):  # its creator died: creating one needs the place's lock
            shutil.rmtree(aside, ignore_errors=True)
        for home in place.glob(f"[!.]*_{socket.gethostname()}_*"):
            if home.name == wanted.name:
                continue
            if not is_idle(home):
                kept += _size(home)
            elif home.name.endswith(f"_{boot()}") and _is_whole(home):
                kept += _size(home)
                idle.append(((home / "users").stat().st_mtime, home))
            else:
                gone.append(home)
    for _, home in sorted(idle):
        if kept > limit_gb * GB:
            kept -= _size(home)
            gone.append(home)
    freed = sum(map(_size, gone))
    for home in gone:
        shutil.rmtree(home, ignore_errors=True)
    if gone:
        names = ", ".join(home.name for home in gone)
        log(f"reclaimed {size_text(freed)} of unused decoded images: {names}")


def is_idle(home: Path) -> bool:
    """Whether no process uses what lies in the folder. None can start to while the place is locked."""
    try:
        with (home / "users").open("rb+") as users:
            return try_lock(users)
    except FileNotFoundError:
        return True


def _is_whole(home: Path) -> bool:
    try:
        return bool(np.load(home / "ready.npy", allow_pickle=False).all())
    except (OSError, ValueError, EOFError):
        return False


def _size(home: Path) -> int:
    return sum(file.stat().st_size for file in home.iterdir())


def _map(path: Path, mode: t.Literal["r", "r+"] = "r") -> np.ndarray:
    """Map an array file as a plain ndarray, because indexing np.memmap is slower."""
    return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
