"""Where decoded images may lie on this node, and how much room is left there and in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from bushpc.config import LoaderConfig

SHARED_MEMORY = Path("/dev/shm")


def places(loader: LoaderConfig) -> list[Path]:
    """The folders that may hold a cache, in order of preference; only this user can write to them.

    loader.cache_dir may name several, as in a PATH.
    """
    if loader.cache_dir:
        return [Path(folder) for folder in loader.cache_dir.split(os.pathsep)]
    parents = [SHARED_MEMORY] if SHARED_MEMORY.is_dir() else []
    return [parent / f"bushpc-cache-{os.getuid()}" for parent in (*parents, Path(tempfile.gettempdir()))]


def room(place: Path) -> int:
    """Bytes that a new cache may use in an existing folder: nine tenths of the free space.

    In memory, also at most half of what this job may still allocate: the pages count against the job, and the model
    needs memory too.
    """
    free = shutil.disk_usage(place).free * 9 // 10
    return min(free, memory_left() // 2) if in_memory(place) else free


def memory_left(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still allocate, limited by the machine and by its control groups.

    root: the folder that contains `proc` and `sys`. A group's inactive file cache can be reclaimed, so it counts as
    free.
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
            with contextlib.suppress(OSError, ValueError, KeyError):  # the root has no limit; a limit may be "max"
                statistics = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
                unused = int((level / limit).read_text()) - int((level / used).read_text())
                left.append(unused + int(statistics[droppable]))
    return max(0, min(left))


def in_memory(place: Path) -> bool:
    """Whether the folder's file system is in memory, as /dev/shm is and a temporary folder may be."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(point, kind) for point, kind in mounts if place.resolve().is_relative_to(point)]
    nearest = max(reversed(above), key=lambda mount: len(mount[0]))  # of several mounts at one point, the last counts
    return nearest[1] in ("tmpfs", "ramfs")
