"""Remote shards → batches: streams URLs and commands instead of local tars, for datasets too large to copy.

    manifest ─Lanes→ which samples, in which order ─LaneReader→ their bytes, verified ─Preparation→ batches

Nothing is unpacked or stored: each rank reads the shards of its lanes from start to end once an epoch. The guarantees
are those of bushpc.data.loader: the global batch of a step depends only on seed, lanes and step; every sample is seen
exactly once an epoch; rank r takes positions r, r + ranks, r + 2·ranks … of the batch; and the step is the only
position to save. A sample is delivered only after its whole shard arrived with the SHA-256 in the manifest.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import typing as t
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from bushpc.config import CellConfig
from bushpc.data.loader import FoldData, Preparation, plain_preparation, training_preparation
from bushpc.data.square import fit
from bushpc.data.stream_order import Lanes
from bushpc.data.stream_read import Connection, Encoded, LaneReader, with_retries
from bushpc.data.workers import in_workers
from bushpc.dist import World
from bushpc.errors import DataError
from bushpc.sample import Batch
from bushpc.shards.manifest import Manifest, Record, ShardInfo, decode_image, decode_mask


def training_batches(cell: CellConfig, data: FoldData, world: World, start: int) -> Iterator[Batch]:
    """This rank's share of the global batches from step `start` to the end of training, streamed from `data.stream`.

    Closing the iterator ends worker processes, reading threads and their commands.
    Raises: DataError naming shard, URL and sample, if a shard cannot be read or differs from the manifest.
    """
    steps = _Steps(cell, data, world, start)
    workers = min(cell.loader.workers, len(steps.lanes))
    if workers == 0:
        with contextlib.closing(iter(steps)) as batches:
            yield from map(_unless_failed, batches)
        return
    # Workers are read in turn and deliver one part of each step, so `workers` consecutive parts are one step.
    parts = map(_unless_failed, in_workers(steps, workers))
    order = _order_of_parts(len(steps.lanes), workers, steps.per_lane)
    try:
        for _ in range(start, cell.train.iterations):
            yield _joined(list(itertools.islice(parts, workers)), order)
    finally:
        steps.closing.set()
        # End the workers now. Otherwise a traceback could keep them alive until the garbage collector runs, which
        # closes their queues before telling them to exit: torch then waits five seconds for each.
        del parts


def validation_batches(cell: CellConfig, data: FoldData, world: World, records: Sequence[Record]) -> Iterator[Batch]:
    """This rank's share of `records`, streamed.

    A share is contiguous, because neighbours are in the same shards. Raises: DataError, as `training_batches`.
    """
    mine = records[world.rank * len(records) // world.size : (world.rank + 1) * len(records) // world.size]
    prepare = plain_preparation(data)
    with contextlib.closing(
        LaneReader(_stream_of(cell), ((0, *part) for part in _by_shard(data.manifest, mine)))
    ) as lane:
        for first in range(0, len(mine), cell.evaluate.batch_size):
            size = min(cell.evaluate.batch_size, len(mine) - first)
            yield _batch(prepare, cell, [next(lane) for _ in range(size)])


def require_reachable(stream: str, manifest: Manifest) -> None:
    """Read the first sample of the first shard of `stream`, on the login node; all else is checked during training.

    Raises: DataError if that fails, or the sample differs from the manifest.
    """
    shard = manifest.shards[0]
    first = next(record for record in manifest.records if record.shard == shard.file)
    with_retries(stream, shard, [first], Connection(), lambda reading: (reading.image(first), reading.mask(first)))


# --- batches ----------------------------------------------------------------------------------------------------


class _Steps(IterableDataset[t.Any]):
    """One part of this rank's batch for every step, from the lanes of this worker process.

    closing: when set, workers stop waiting for data.
    An error is yielded, not raised, because the DataLoader would wrap it in a traceback.
    """

    def __init__(self, cell: CellConfig, data: FoldData, world: World, start: int) -> None:
        self.cell, self.data, self.start = cell, data, start
        self.closing = multiprocessing.Event()
        self.prepare = training_preparation(cell, data)
        self.shards = _by_shard(data.manifest, data.train)
        self.lanes = list(range(world.rank, cell.loader.lanes, world.size))
        self.per_lane = cell.train.batch_size // cell.loader.lanes

    def __iter__(self) -> Generator[Batch | DataError, None, None]:
        worker = get_worker_info()
        mine = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        with contextlib.ExitStack() as closing:
            lanes = [closing.enter_context(contextlib.closing(self._lane(lane))) for lane in mine]
            for _ in range(self.start, self.cell.train.iterations):
                try:
                    items = [next(lane) for _ in range(self.per_lane) for lane in lanes]
                    yield _batch(self.prepare, self.cell, items)
                except DataError as error:
                    yield error
                    return

    def _lane(self, number: int) -> LaneReader:
        sizes = tuple(len(records) for _, records in self.shards)
        lanes = Lanes(sizes=sizes, count=self.cell.loader.lanes, seed=self.cell.seed)
        first, stop = self.start * self.per_lane, self.cell.train.iterations * self.per_lane
        pieces = (
            (piece.epoch, self.shards[piece.shard][0], [self.shards[piece.shard][1][pick] for pick in piece.picks])
            for piece in lanes.pieces(number, first, stop)
        )
        return LaneReader(_stream_of(self.cell), pieces, self.closing.is_set)


def _unless_failed(part: Batch | DataError) -> Batch:
    if isinstance(part, DataError):
        raise part
    return part


def _order_of_parts(lanes: int, workers: int, per_lane: int) -> list[int]:
    """The position of each sample of a rank's batch in the concatenation of its workers' parts."""
    widths = [len(range(worker, lanes, workers)) for worker in range(workers)]
    begins = [per_lane * sum(widths[:worker]) for worker in range(workers)]
    return [
        begins[lane % workers] + turn * widths[lane % workers] + lane // workers
        for turn in range(per_lane)
        for lane in range(lanes)
    ]


def _joined(parts: list[Batch], order: list[int]) -> Batch:
    """Concatenate batches, with the samples in `order`."""

    def join(values: list[t.Any]) -> t.Any:
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)[order]
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values]) for name in values[0]}
        items = [item for value in values for item in value]
        return [items[place] for place in order]

    names = [field.name for field in fields(Batch) if getattr(parts[0], field.name) is not None]
    return replace(parts[0], **{name: join([getattr(part, name) for part in parts]) for name in names})


def _batch(prepare: Preparation, cell: CellConfig, items: list[Encoded]) -> Batch:
    """Decode the samples, and prepare them exactly as the indexed loader prepares rows of its cache."""
    fitted = []
    for _, record, image_png, mask_png in items:
        shard = cell.data.folder / record.shard  # for messages: only the manifest is in this folder
        image_HWC, mask_HW = decode_image(image_png, record, shard), decode_mask(mask_png, record, shard)
        fitted.append(fit(record.shard, record, image_HWC, mask_HW, cell.model.image_size))
    image_BSSC, mask_BSS = map(np.stack, zip(*fitted, strict=True))
    epochs = [item.epoch for item in items]  # also the turn, as a stream delivers each sample once an epoch
    return prepare(epochs, epochs, [item.record for item in items], image_BSSC, mask_BSS)


def _stream_of(cell: CellConfig) -> str:
    assert cell.data.stream, "only a cell with data.stream streams"
    return cell.data.stream


def _by_shard(manifest: Manifest, records: Iterable[Record]) -> list[tuple[ShardInfo, list[Record]]]:
    """Records by shard, in the order in which shards and records first appear."""
    shards = {shard.file: shard for shard in manifest.shards}
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(record.shard, []).append(record)
    return [(shards[file], members) for file, members in parts.items()]


# --- bytes ------------------------------------------------------------------------------------------------------
