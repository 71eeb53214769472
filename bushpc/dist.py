"""Facts about the ranks of one run, and agreement between them. The only place that asks who is rank 0.

One rank is one process (one srun task). `join` reads rank and world size from submitit's job environment or from
RANK/WORLD_SIZE, and finds the rendezvous through the run directory, so that neither address nor port is fixed.
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


def world_from_environment(environ: t.Mapping[str, str] = os.environ) -> World:
    """Who this process is, from the launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK); alone without them."""
    return World(
        rank=int(environ.get("RANK", 0)),
        size=int(environ.get("WORLD_SIZE", 1)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
    )


def meet(world: World, folder: Path, attempt: str) -> None:
    """Set MASTER_ADDR and MASTER_PORT on all ranks: rank 0 takes a free port and tells the others by a file.

    folder: visible to all ranks. attempt: the same on all ranks of this start and never used before (job id and
    restart count), so that nobody reads the address of a dead predecessor.
    Raises: TrainingError when rank 0 does not show up.
    """
    if world.size == 1:
        return
    note = folder / f"rendezvous-{hashlib.sha256(attempt.encode()).hexdigest()[:16]}.json"
    if world.is_main:
        address = _reachable_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        write_atomically(note, json.dumps({"address": address, "port": port}))
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while not note.exists():
        if time.monotonic() > deadline:
            raise TrainingError(
                f"rank {world.rank} waited {RENDEZVOUS_TIMEOUT_S} s for rank 0 at {note}: "
                "rank 0 did not start, or the runs folder is not shared between the nodes; see rank 0's log"
            )
        time.sleep(0.05)
    told = json.loads(note.read_text())
    os.environ.update(MASTER_ADDR=told["address"], MASTER_PORT=str(told["port"]))


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks if `flag` is true on one. Every rank must call it, at the same step."""
    if not torch_dist.is_initialized():
        return flag
    votes = torch.tensor([int(flag)], device=device)
    torch_dist.all_reduce(votes, op=torch_dist.ReduceOp.MAX)
    return bool(votes.item())


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


def _reachable_address() -> str:
    """This host's address: as its name resolves, or loopback where the name is unknown (a single machine)."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
