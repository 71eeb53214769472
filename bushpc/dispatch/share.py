"""Cells that share a job on one node: which of its GPUs and cores are whose. Before torch counts them.

A site may have given each task its own already; then there is nothing left to share out.
"""

from __future__ import annotations

import os

from bushpc.cluster.base import job_cores

# Lists of devices that a process may use. ROCm counts those of the first line among those of the second, so only one
# of the two lines may be shortened.
DEVICE_LISTS = (("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), ("ROCR_VISIBLE_DEVICES",))


def take_share(number: int, count: int, gpus: int) -> None:
    """Leave this process the GPUs and cores of one of `count` cells on this node.

    gpus: of the node, as the profile says; they count where no variable names them. Fewer GPUs than cells are used by
    several cells each.
    """
    named = next((some for line in DEVICE_LISTS if (some := [name for name in line if os.environ.get(name)])), [])
    if gpus and not named:
        named, os.environ["CUDA_VISIBLE_DEVICES"] = ["CUDA_VISIBLE_DEVICES"], ",".join(map(str, range(gpus)))
    for name in named:
        os.environ[name] = ",".join(part(os.environ[name].split(","), number, count))
    cores = sorted(os.sched_getaffinity(0))
    # Else they are bound already, or are also other jobs' cores.
    if job_cores() == len(cores) >= count:
        os.sched_setaffinity(0, {int(core) for core in part([str(core) for core in cores], number, count)})


def part(things: list[str], number: int, count: int) -> list[str]:
    """
    >>> [part(["0", "1", "2", "3"], number, 2) for number in range(2)]
    [['0', '1'], ['2', '3']]
    >>> [part(["0", "1"], number, 4) for number in range(4)]
    [['0'], ['0'], ['1'], ['1']]
    """
    first = number * len(things) // count
    return things[first : max(first + 1, (number + 1) * len(things) // count)]
