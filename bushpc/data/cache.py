"""Shards → decoded pixels, once per node: every rank, loader worker and cell of a node reads the same memory maps.

    <place>/lock                                   held while caches are made or deleted in this place
    <place>/<dataset>-<size>-<content>_<host>_<boot>/
      images.npy   (N, S, S, C) uint8
      masks.npy    (N, S, S) uint8, bit k set inside of mask class k
      ready.npy    (N,) bool: the rows whose pixels are there
      chunks       byte c is locked by the process that decodes chunk c
      users        locked (shared) by every process that uses the cache, for as long as it lives

All processes of the node decode together: each claims chunks that nobody holds, writes their pixels and only then
their flags. The kernel frees the locks of a process that dies, so that the others, or the next job, go on where it
stood. A cache that nobody uses is deleted when its decode was left half-way, when the machine was restarted since
(a disk may then hold flags without their pixels), or when all caches together take more than `loader.cache_gb`.
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
import tempfile
import time
import typing as t
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bushpc.config import LoaderConfig
from bushpc.errors import DataError
from bushpc.files import is_own_folder
from bushpc.shards.manifest import Manifest, Record, read_image, read_mask

# Part of a cache's name: raise it when `resize` makes other pixels, or the files mean something else.
VERSION = 4
SHARED_MEMORY = Path("/dev/shm")
# Small enough that a stop signal waits for a fraction of a second, large enough that locks cost nothing.
CHUNK_ROWS = 8
POLL_S = 0.05
# Preallocation in memory writes zeros, some GB a second: in pieces, a stop signal need not wait for all of them.
ALLOCATED_AT_ONCE = 1 << 30
GB = 1e9


class DecodingStopped(Exception):
    """`keep_going` said no before every image was decoded. There is no cache to train from; what is done is kept."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Decoded images (N, S, S, C) and masks (N, S, S) in bits, uint8 and read-only, and the row of each key."""

    images_NSSC: np.ndarray
    masks_NSS: np.ndarray
    rows: dict[str, int]


# What this process has open, with the lock that says so: it is in use until the process ends, in whatever room.
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
    """A whole dataset at `image_size`, decoded by now. A second call in a process returns the first's.

    folder: of the shards. keep_going: asked between chunks, several times a second.
    Raises: DecodingStopped when `keep_going` says no; DataError where there is no room, and for an image that cannot
    be used at this size.
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
        os.utime(home / "users")  # the time of its last use
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


def places(loader: LoaderConfig) -> list[Path]:
    """The folders in which a cache may lie, first choice first; one per user, who alone may write there."""
    if loader.cache_dir:
        return [Path(loader.cache_dir)]
    parents = [SHARED_MEMORY] if SHARED_MEMORY.is_dir() else []
    return [parent / f"bushpc-cache-{os.getuid()}" for parent in (*parents, Path(tempfile.gettempdir()))]


def room(place: Path) -> int:
    """Bytes that a new cache may take in an existing folder.

    Nine tenths of what is free there. In memory also no more than half of what this job may still take: the pages
    count as its own, and the model wants some too.
    """
    free = shutil.disk_usage(place).free * 9 // 10
    return min(free, memory_left() // 2) if _in_memory(place) else free


def memory_left(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still take: what the machine has, and what its control groups allow.

    root: below which `proc` and `sys` lie. What a group holds as file cache can be had, so it counts as free.
    """
    with (root / "proc/meminfo").open() as lines:
        left = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, used, droppable = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            droppable = "total_inactive_file"
        else:
            continue
        group = root / "sys/fs/cgroup" / top / path.lstrip("/")
        for level in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # the root has no limit, and "max" is no number
                facts = dict(fact.split() for fact in (level / "memory.stat").read_text().splitlines())
                room_there = int((level / limit).read_text()) - int((level / used).read_text())
                left.append(room_there + int(facts[droppable]))
    return max(0, min(left))


def resize(image_HWC: np.ndarray, mask_HW: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (antialiased bilinear) and mask (nearest) at image_size x image_size, aspect not kept (paper 2.2).

    The nearest pixel brings all of its bits with it, so mask classes do not mix.
    """
    # uint8 all the way: torch's kernels for it round as float32 and `round` would, to one grey level, 4 times as fast.
    image = _resized(torch.from_numpy(image_HWC).permute(2, 0, 1)[None], image_size, "bilinear")
    mask = _resized(torch.from_numpy(mask_HW)[None, None], image_size, "nearest-exact")
    return image[0].permute(1, 2, 0).numpy(), mask[0, 0].numpy()


def decode(folder: Path, record: Record, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """One sample from its shard: image (S, S, C) and mask (S, S) in bits, uint8.

    Raises: DataError when image and mask differ in size, or the lesion vanishes at this one.
    """
    return fit(folder / record.shard, record, read_image(folder, record), read_mask(folder, record), image_size)


def fit(
    shard: Path | str, record: Record, image_HWC: np.ndarray, mask_HW: np.ndarray, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """`resize` of the sample `record`, whose lesion must survive it. Raises: DataError naming `shard` and sample."""
    if image_HWC.shape[:2] != mask_HW.shape:
        raise DataError(f"{shard}: {record.key} has an image and a mask of different size; pack again")
    image_SSC, mask_SS = resize(image_HWC, mask_HW, image_size)
    if record.lesion_pixels and not mask_SS.any():
        raise DataError(
            f"the lesion of {record.key} ({record.lesion_pixels} of {record.height} x {record.width} pixels) "
            f"vanishes at model.image_size={image_size}: no overlap can be measured there; raise model.image_size"
        )
    return image_SSC, mask_SS


# --- decoding together ------------------------------------------------------------------------------------------


def _decode(
    home: Path,
    folder: Path,
    records: list[Record],
    size: int,
    keep_going: Callable[[], bool],
    log: Callable[[str], None],
) -> None:
    """Decode what is missing together with all other processes that do so; returns when nothing is."""
    ready = _map(home / "ready.npy", "r+")
    if ready.all():
        return
    cpus = len(os.sched_getaffinity(0))
    log(f"decoding {int((~ready).sum())} of {len(ready)} images for all processes of this node: {cpus} threads, {home}")
    images, masks = _map(home / "images.npy", "r+"), _map(home / "masks.npy", "r+")
    # POSIX locks go when the process closes any descriptor of the file: it is opened here and nowhere else.
    with (home / "chunks").open("rb+") as claims, _threads(cpus) as pool:

        def decode_chunk(first: int) -> bool:
            try:
                fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, first)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):  # another process is at it
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
            if not claimed:  # others hold all that is left: wait for their flags, or for their locks if they die
                time.sleep(POLL_S)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads, not processes: Pillow and torch release the interpreter. Each resizes alone, all cores are taken."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "decode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _resized(pixels_BCHW: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    antialias = mode == "bilinear"
    return torch.nn.functional.interpolate(pixels_BCHW, (size, size), mode=mode, antialias=antialias)


# --- where a cache lies, and which ones go ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Name of a cache's folder, and the arrays in it."""

    name: str
    arrays: dict[str, tuple[type, tuple[int, ...]]]

    @classmethod
    def of(cls, manifest: Manifest, size: int) -> _Files:
        content = hashlib.sha256(f"{VERSION}|{manifest.hash}|{size}".encode()).hexdigest()[:16]
        count = len(manifest.records)
        return cls(
            name=f"{manifest.dataset}-{size}-{content}_{socket.gethostname()}_{_boot()}",
            arrays={
                "images.npy": (np.uint8, (count, size, size, len(manifest.channels))),
                "masks.npy": (np.uint8, (count, size, size)),
                "ready.npy": (np.bool_, (count,)),
            },
        )

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) for _, shape in self.arrays.values())


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _lock_places(
    wanted: list[Path], locks: contextlib.ExitStack, keep_going: Callable[[], bool]
) -> tuple[list[Path], list[str]]:
    """Those places that can be used, locked until `locks` closes, and a line on each that cannot.

    Every process locks them in the same order, all before it decides: so all processes of a node choose the same.
    """
    usable, refused = [], []
    for place in wanted:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if place.parent.stat().st_mode & stat.S_IWOTH and not _is_ours_alone(place):
                refused.append(f"{place} is a link, or someone else may write in it")
                continue
            lock = locks.enter_context((place / "lock").open("ab"))
            while not _try_lock(lock):
                if not keep_going():
                    raise DecodingStopped(f"another process makes or deletes a cache in {place}")
                time.sleep(POLL_S)
        except OSError as error:  # not ours to write in, or a network file system without locks
            refused.append(f"{place} cannot be used: {error}")
        else:
            usable.append(place)
    return usable, refused


def _is_ours_alone(place: Path) -> bool:
    """Whether the folder is this user's, and nobody else may put or exchange files in it."""
    return is_own_folder(place) and not place.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _try_lock(file: t.IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _existing(usable: list[Path], files: _Files) -> Path | None:
    """The cache, whole or half decoded, where a place has it."""
    for place in usable:
        home = place / files.name
        if all(_fits(home / name, *array) for name, array in files.arrays.items()) and (home / "users").exists():
            return home
        # Cleaners of temporary folders take single files. Who still has the others open keeps them.
        shutil.rmtree(home, ignore_errors=True)
    return None


def _fits(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return bool(array.dtype == dtype and array.shape == shape)


def _create(usable: list[Path], refused: list[str], files: _Files, keep_going: Callable[[], bool]) -> Path:
    """Preallocate an empty cache in the first place with room. Raises: DataError when there is none."""
    for place in usable:
        there = room(place)
        if there < files.bytes:
            refused.append(f"{place} has room for {there / GB:.2f} GB")
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
        f"the decoded images take {files.bytes / GB:.2f} GB, and there is no place for them: {'; '.join(refused)}. "
        "Set loader.cache_dir to a folder on a disk of the node, ask for more memory (cluster.mem_gb) if it is to "
        "be /dev/shm, or lower loader.cache_gb so that caches that nobody uses make way"
    )


def _allocate(path: Path, dtype: type, shape: tuple[int, ...], keep_going: Callable[[], bool]) -> None:
    """An array file of zeros whose every block is there: a full disk is an error now, not a bus error later."""
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
    """Delete caches of this host that nobody uses: stale ones, and beyond the limit those unused for longest."""
    kept, gone = wanted.bytes, []
    idle: list[tuple[float, Path]] = []
    for place in usable:
        for aside in place.glob(f".*_{socket.gethostname()}_*"):  # its maker died: making one needs the place's lock
            shutil.rmtree(aside, ignore_errors=True)
        for home in place.glob(f"[!.]*_{socket.gethostname()}_*"):
            if home.name == wanted.name:
                continue
            if not _is_idle(home):
                kept += _size(home)
            elif home.name.endswith(f"_{_boot()}") and _is_whole(home):
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
        log(f"reclaimed {freed / GB:.2f} GB of decoded images that nobody uses: {names}")


def _is_idle(home: Path) -> bool:
    """Whether no process uses it. Nobody begins to while the place is locked."""
    try:
        with (home / "users").open("rb+") as users:
            return _try_lock(users)
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
    """A mapped array as a plain one: memmap's own class makes every indexing slower."""
    return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))


def _in_memory(place: Path) -> bool:
    """Whether the folder's file system lives in memory, as /dev/shm does and a temporary folder may."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(point, kind) for point, kind in mounts if place.resolve().is_relative_to(point)]
    nearest = max(reversed(above), key=lambda mount: len(mount[0]))  # of several at one point the last is seen
    return nearest[1] in ("tmpfs", "ramfs")
