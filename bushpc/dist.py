"""Facts about the ranks of one run, and agreement between them. The only place that asks who is rank 0.

One rank is one process (one srun task). Ranks meet through a file in the run directory, so that neither address
nor port is fixed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist

from bushpc.errors import TrainingError
from bushpc.files import write_atomically

RENDEZVOUS_TIMEOUT_S = 300


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


def meet(world: World, folder: Path, attempt: str, node_name: str = "") -> None:
    """Set MASTER_ADDR and MASTER_PORT on all ranks: rank 0 takes a free port and tells the others by a file.

    folder: visible to all ranks. attempt: the same on all ranks of this start and never used before (job id and
    restart count), so that nobody reads the address of a dead predecessor. node_name: what the scheduler calls
    this node. Raises: TrainingError when rank 0 does not show up, or gives an address that leads nowhere.
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
                f"rank {world.rank} waited {RENDEZVOUS_TIMEOUT_S} s for rank 0 at {note}: "
                "rank 0 did not start, or the runs folder is not shared between the nodes; see rank 0's log"
            )
        time.sleep(0.05)
    told = json.loads(note.read_text())
    if told["address"].startswith("127.") and told["host"] != socket.gethostname():
        raise TrainingError(
            f"rank 0 on {told['host']} knows itself only as {told['address']}, which other nodes cannot reach: "
            f"give {told['host']} a name that resolves to its network address (/etc/hosts or DNS)"
        )
    os.environ.update(MASTER_ADDR=told["address"], MASTER_PORT=str(told["port"]))


def any_rank(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """For each flag: is it true on one rank at least? Every rank must call it, at the same step."""
    if not torch_dist.is_initialized():
        return flags
    votes = torch.tensor([int(flag) for flag in flags], device=device)
    torch_dist.all_reduce(votes, op=torch_dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def share_buffers(model: torch.nn.Module) -> None:
    """Give all ranks rank 0's buffers: BatchNorm's running statistics drift apart, as each rank sees other samples.

    Called before a prediction, so that every rank predicts with what the checkpoint holds.
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


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def leave() -> None:
    """Close the process group, if there is one; a second call does nothing."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def seed_everything(*parts: int | str) -> None:
    """Seed Python, NumPy and torch from all parts together.

    The trainer calls it with (seed, step, rank) at every step: dropout then depends on the step alone, and a
    resumed run continues with the very numbers that an uninterrupted one would have drawn.
    """
    seed = keyed_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keyed_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, stable across processes and Python versions."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def reachable_address(node_name: str = "") -> str:
    """An address of this host that other nodes can use: its names' first that is not loopback.

    Debian's own /etc/hosts gives the host's name as 127.0.1.1, which is why the first answer is not simply taken.
    A machine that knows itself by loopback alone is a single machine, and gets that.
    """
    found = []
    for name in (node_name, socket.gethostname(), socket.getfqdn()):
        try:
            found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)] if name else []
        except OSError:
            continue
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")
