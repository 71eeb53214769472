"""Batches from worker processes: they end with their parent, and what they make travels in memory that is used again.

    batches[i] ─pack, in a worker→ head and slot ─unpack→ the same batch

torch's own way opens shared memory and a socket for every tensor of every batch. For four scans of 352 pixels that took
as long as to augment them, and it needs room in /dev/shm, of which containers often have 64 MB.
"""

from __future__ import annotations

import functools
import io
import itertools
import mmap
import os
import pickle
import signal
import threading
import typing as t
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bushpc.process import STOP_SIGNALS, end_with_parent

# torch asks a worker for two batches ahead; a third is being copied out meanwhile.
SLOTS = 3


def in_workers(batches: Dataset[t.Any], workers: int, sampler: t.Iterable[t.Any] | None = None) -> Iterator[t.Any]:
    """Yield the items of `batches`, made by `workers` processes, which end with this process even if it is killed.

    Slurm sends its stop signals to every process of a step. Workers ignore them, as the training process saves first
    and needs its batches until then; torch's own handler would end them, and the training process with them.
    """
    slots = [[Slot() for _ in range(SLOTS)] for _ in range(workers)]
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=functools.partial(pack, slots),
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # workers are born with them blocked
    try:
        packed = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return map(functools.partial(unpack, slots), packed)


class Slot:
    """Memory of one item on its way, shared with the worker that fills it. It grows with the largest item."""

    def __init__(self) -> None:
        self.file = os.memfd_create("bushpc")  # of memory: it has no name, and ends with the processes that have it
        weakref.finalize(self, os.close, self.file)
        self.taken = mmap.mmap(-1, 1)  # a byte that both processes see: 1 from filling to emptying
        self._there: mmap.mmap | None = None

    def fill(self, parts: Sequence[memoryview]) -> None:
        there = self._mapped(sum(part.nbytes for part in parts), grow=True)
        end = 0
        for part in parts:
            there[end : end + part.nbytes] = part
            end += part.nbytes
        self.taken[0] = 1

    def empty(self, sizes: Sequence[int]) -> list[bytearray]:
        there = memoryview(self._mapped(sum(sizes)))
        ends = list(itertools.accumulate(sizes, initial=0))
        parts = [bytearray(there[start:end]) for start, end in itertools.pairwise(ends)]
        self.taken[0] = 0
        return parts

    def _mapped(self, size: int, grow: bool = False) -> mmap.mmap:
        if self._there is None or len(self._there) < size:
            if grow:
                os.ftruncate(self.file, size)
            self._there = mmap.mmap(self.file, size)
        return self._there


class Packed(t.NamedTuple):
    """An item. slot: worker and place of its large parts; None where they are in the head. sizes: theirs, in bytes."""

    head: bytes
    slot: tuple[int, int] | None
    sizes: list[int]


def pack(slots: Sequence[Sequence[Slot]], item: t.Any) -> Packed:
    """In a worker. Without large parts, or with every slot taken, the item travels by the pipe, as a whole."""
    head, parts = dumped(item)
    sizes = [part.nbytes for part in parts]
    worker = t.cast(t.Any, get_worker_info()).id
    for place, slot in enumerate(slots[worker]):
        if any(sizes) and not slot.taken[0]:
            slot.fill(parts)
            return Packed(head, (worker, place), sizes)
    return Packed(pickle.dumps((head, [bytearray(part) for part in parts])), None, [])


def unpack(slots: Sequence[Sequence[Slot]], packed: Packed) -> t.Any:
    """In the process that asked for the item."""
    if packed.slot is None:
        head, parts = pickle.loads(packed.head)
    else:
        worker, place = packed.slot
        head, parts = packed.head, slots[worker][place].empty(packed.sizes)
    return pickle.loads(head, buffers=parts)


def dumped(item: t.Any) -> tuple[bytes, list[memoryview]]:
    """A pickle, and the memory of arrays and tensors outside of it."""
    parts: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=parts.append).dump(item)
    return head.getvalue(), [part.raw() for part in parts]


class _Pickler(pickle.Pickler):
    """Tensors as arrays of their memory, so that a channel that is shown three times is sent once."""

    def reducer_override(self, value: t.Any) -> t.Any:
        if not isinstance(value, torch.Tensor) or value.dtype is torch.bfloat16:
            return NotImplemented
        elements = value.untyped_storage().nbytes() // value.element_size()
        if elements > value.numel():  # a piece of something larger
            value, elements = value.clone(memory_format=torch.contiguous_format), value.numel()
        memory = value.as_strided((elements,), (1,), 0).numpy()
        return _strided, (memory, value.size(), value.stride(), value.storage_offset())


def _strided(memory: t.Any, size: t.Any, stride: t.Any, offset: int) -> torch.Tensor:
    return torch.from_numpy(memory).as_strided(size, stride, offset)


def _start_worker(parent: int, worker: int) -> None:
    end_with_parent(parent=parent)
    threading.Thread(target=_leave_at_parents_word, args=(parent,), daemon=True).start()


def _leave_at_parents_word(parent: int) -> None:
    """End this worker when its parent sends TERM; only sigwaitinfo tells who sent a signal."""
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
