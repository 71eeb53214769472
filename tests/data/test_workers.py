"""Promises of worker processes: what they send arrives as they made it, whatever its size, and in order."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing as t
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset

from bushpc.data.workers import SLOTS, Slot, in_workers, pack, unpack


@dataclasses.dataclass
class Item:
    """As a batch is: tensors of several kinds between other things."""

    name: str
    tensors: dict[str, torch.Tensor]
    array: np.ndarray


def item(i: int) -> Item:
    drawn = torch.randint(
        0, 256, (4, 8 + 40 * (i % 5), 16), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
    )
    return Item(
        name=f"scan {i}",
        tensors={
            "grey in three channels": drawn[:, None].expand(-1, 3, -1, -1),
            "channels last": drawn[..., None].permute(0, 3, 1, 2),
            "a piece of something larger": drawn[1:3, ::2],
            "labels": torch.arange(4) + i,
            "half": torch.full((3,), i, dtype=torch.bfloat16),
            "none": torch.empty(0, 5),
        },
        array=np.full((i % 3, 2), i),
    )


class Made(Dataset[t.Any]):
    def __init__(self, made: Callable[[int], t.Any], length: int) -> None:
        self.made, self.length = made, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> t.Any:
        return self.made(i)


def require_equal(there: Item, here: Item) -> None:
    assert there.name == here.name
    np.testing.assert_array_equal(there.array, here.array)
    assert there.tensors.keys() == here.tensors.keys()
    for name, tensor in here.tensors.items():
        assert there.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(there.tensors[name], tensor), name


def test_items_arrive_as_they_were_made_and_stay_so_while_further_ones_come():
    arrived = list(in_workers(Made(item, 40), workers=2))
    assert len(arrived) == 40
    for i, there in enumerate(arrived):  # none lies in memory that was used again since
        require_equal(there, item(i))
        there.array[...] = 0  # and it belongs to whoever asked for it


def test_a_grey_scan_in_three_channels_travels_as_one():
    (there,) = in_workers(Made(item, 1), workers=1)
    assert there.tensors["grey in three channels"].stride()[1] == 0
    assert there.tensors["a piece of something larger"].untyped_storage().nbytes() == 2 * 4 * 16


def test_an_item_for_which_no_memory_is_free_arrives_all_the_same(monkeypatch):
    monkeypatch.setattr("bushpc.data.workers.get_worker_info", lambda: types.SimpleNamespace(id=0))
    slots = [[Slot() for _ in range(SLOTS)]]
    packed = [pack(slots, item(i)) for i in range(SLOTS + 2)]
    assert [one.slot is None for one in packed] == [False] * SLOTS + [True] * 2
    for i, there in enumerate(map(functools.partial(unpack, slots), packed)):
        require_equal(there, item(i))
    assert pack(slots, item(0)).slot == (0, 0)  # it is free again
