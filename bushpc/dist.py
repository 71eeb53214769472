"""The ranks of a run, and communication between them. Only this module decides who is rank 0.

One rank is one process. Ranks meet through a file in the run folder, so neither address nor port is
fixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import time
import typing as t
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist

from bushpc.errors import BushpcError, TrainingError
from bushpc.files import write_atomically

RENDEZVOUS_TIMEOUT_S = 300
Item = t.TypeVar("Item")


class ClusterStep(t.Protocol):
    """What this module has to know of a parallel step (bushpc.cluster.records.Step)."""

    @property
    def variables(self) -> tuple[str, str, str]: ...

    @property
    def start(self) -> str: ...

    @property
    def node(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class World:
    """rank, size: of all ranks. local_rank: on this node, the index of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, step: ClusterStep | None = None) -> World:
        """The world as described by what launched this process.

        RANK, WORLD_SIZE and LOCAL_RANK, which torchrun, accelerate and deepspeed set; else the cluster's own parallel
        step (bushpc.cluster.base.this_step); else one rank. Raises: TrainingError where the variables make no world.
        """
        if "RANK" in os.environ:
            return cls._read("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls._read(*step.variables) if step else cls()

    @classmethod
    def _read(cls, *names: str) -> World:
        """From three variables: rank, size, local rank."""
        said = {name: os.environ.get(name, "") for name in names}
        if all(value.isdecimal() for value in said.values()):
            rank, size, local_rank = (int(value) for value in said.values())
            if local_rank <= rank < size:
                return cls(rank=rank, size=size, local_rank=local_rank)
        raise TrainingError(
            f"{', '.join(f'{name}={value!r}' for name, value in said.items())} do not name a rank of a world: "
            "unset them to train alone, or start with torchrun, accelerate launch, deepspeed or srun"
        )


def meet(world: World, folder: Path, attempt: str, node_name: str = "") -> None:
    """Set MASTER_ADDR and MASTER_PORT on all ranks: rank 0 picks a free port and publishes it in a file.

    folder: visible to all ranks. attempt: the same on all ranks of this start and never used before (job id and
    restart count), so that no rank reads the address of a dead predecessor. node_name: the scheduler's name for this
    node. Raises: TrainingError if rank 0 does not appear, or its address is unreachable.
    """
    if world.size == 1:
        return
    note = folder / f"rendezvous-{hashlib.sha256(attempt.encode()).hexdigest()[:16]}.json"
    if world.is_main:
        address = reachable_address(node_name)
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        write_atomically(note, json.dumps({"address": address, "port": port, "host": socket.gethostname()}))
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while not note.exists():
        if time.monotonic() > deadline:
            raise TrainingError(
                f"rank {world.rank} waited {RENDEZVOUS_TIMEOUT_S} s for rank 0 at {note}. "
                "Either rank 0 did not start (see its log), or the nodes do not share the runs folder"
            )
        time.sleep(0.05)
    meeting_point = json.loads(note.read_text())
    if meeting_point["address"].startswith("127.") and meeting_point["host"] != socket.gethostname():
        raise TrainingError(
            f"rank 0 on {meeting_point['host']} resolves its own name to {meeting_point['address']}, which other nodes "
            "cannot reach. Give this host a name that resolves to its network address (/etc/hosts or DNS)"
        )
    os.environ.update(MASTER_ADDR=meeting_point["address"], MASTER_PORT=str(meeting_point["port"]))


@contextlib.contextmanager
def meeting(world: World, folder: Path, step: ClusterStep | None = None) -> Iterator[None]:
    """Context manager in which the ranks of a launcher can `join`: it sets the address, if the launcher does not.

    step: of the cluster's own launcher, which sets none, so rank 0 publishes it in a file in `folder`, which all ranks
    must see. Raises: TrainingError.
    """
    if world.size > 1 and "RANK" in os.environ and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise TrainingError(
            "RANK is set, but MASTER_ADDR or MASTER_PORT is not. Set both; or, under srun, unset RANK, and bushpc "
            "finds the address itself"
        )
    if world.size == 1 or "RANK" in os.environ:
        yield
        return
    assert step is not None, "several ranks come from a launcher or from a step"
    place = folder / f".meeting-{step.start}"
    if world.is_main:
        place.mkdir(parents=True, exist_ok=True)
    meet(world, place, step.start, step.node)
    yield
    if world.is_main:  # the group is complete, so every rank has read the file
        shutil.rmtree(place, ignore_errors=True)


def join(world: World, *, cuda: bool, timeout_s: float, alone: bool = False) -> None:
    """Open the process group at MASTER_ADDR and MASTER_PORT. Does nothing if it is open, or for a single rank.

    Tensors on GPUs use NCCL, tensors on CPUs gloo, so that flags never wait for a GPU's queue.
    timeout_s: a collective that takes longer fails; 0 for torch's default. alone: a single rank opens a group of one.
    Raises: TrainingError for more ranks on a node than GPUs.
    """
    if torch_dist.is_initialized() or (world.size == 1 and not alone):
        return
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    if cuda:
        torch.cuda.set_device(gpu_of(world.local_rank, torch.cuda.device_count()))
    in_memory = torch_dist.HashStore  # type: ignore[attr-defined]
    torch_dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=in_memory() if world.size == 1 else None,  # a group of one needs no port
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_s) if timeout_s else None,
    )


def gpu_of(local_rank: int, visible: int) -> int:
    """Which of the `visible` GPUs a rank drives. A site that binds tasks to GPUs shows each task its own alone, as 0.

    Raises: TrainingError for more ranks on a node than GPUs.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise TrainingError(
            f"rank {local_rank} of this node sees {visible} GPUs: set cluster.ranks_per_node to the GPUs of a node, "
            "and look at what srun's --gpu-bind or --gpus-per-task leaves each task"
        )
    return local_rank


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is true on at least one rank. Collective."""
    if not torch_dist.is_initialized():
        return flags
    votes = torch.tensor([int(flag) for flag in flags])  # on the CPU, so that it does not wait for a GPU
    torch_dist.all_reduce(votes, op=torch_dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def share_buffers(model: torch.nn.Module) -> None:
    """Copy rank 0's buffers to all ranks: BatchNorm's running statistics differ, as each rank sees other samples.

    Called before predictions, so that every rank uses the buffers in the checkpoint.
    """
    if torch_dist.is_initialized():
        for buffer in model.buffers():
            torch_dist.broadcast(buffer, src=0)


def gather(items: list[t.Any]) -> list[t.Any]:
    """The items of all ranks, in rank order, on every rank."""
    if not torch_dist.is_initialized():
        return items
    parts: list[t.Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_main(item: Item) -> Item:
    """Rank 0's item, on every rank."""
    if not torch_dist.is_initialized():
        return item
    items = [item]
    torch_dist.broadcast_object_list(items, src=0)
    return items[0]


def from_main_or_raise(make: t.Callable[[], Item]) -> Item:
    """The result of `make` on rank 0, on every rank; if it raises a BushpcError, every rank raises it."""
    made: tuple[Item | None, BushpcError | None] = (None, None)
    if not torch_dist.is_initialized() or torch_dist.get_rank() == 0:
        try:
            made = (make(), None)
        except BushpcError as error:
            made = (None, error)
    item, raised = from_main(made)
    if raised is not None:
        raise raised
    return t.cast(Item, item)


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def leave() -> None:
    """Close the process group, if it is open."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def seed_everything(*parts: int | str) -> None:
    """Seed Python, NumPy and torch from all parts together.

    The trainer calls it with (seed, step, rank) at every step, so dropout depends only on the step, and a resumed run
    draws the same numbers as an uninterrupted one.
    """
    seed = keyed_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keyed_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, stable across processes and Python versions."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def reachable_address(node_name: str = "") -> str:
    """An address of this host that other nodes can reach: the first one of its names that is not loopback.

    Debian's default /etc/hosts maps the host name to 127.0.1.1, so the first answer may be loopback. A machine that has
    only loopback addresses is assumed to be a single machine and gets 127.0.0.1.
    """
    found = []
    for name in (node_name, socket.gethostname(), socket.getfqdn()):
        try:
            found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)] if name else []
        except OSError:
            continue
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")
