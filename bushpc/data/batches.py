"""Where the batches of a fold come from: the node's cache of decoded shards, or a stream.

FoldData ─loader.py (cache) | stream.py→ batches ─conditions of an evaluation variant→ train, evaluate
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

from bushpc.conditions import Shown
from bushpc.config import CellConfig
from bushpc.data.loader import FoldData, cached_training_batches, cached_validation_batches, draw_from, united
from bushpc.dist import World
from bushpc.sample import Batch
from bushpc.shards.manifest import Record


def training_batches(cell: CellConfig, data: FoldData, world: World, start: int) -> Generator[Batch, None, None]:
    """This rank's share of the global batches from step `start` to the end of training. Closing it ends its workers."""
    if cell.data.stream:
        from bushpc.data import stream  # here: webdataset takes a second to import

        yield from stream.training_batches(cell, data, world, start)
    else:
        yield from cached_training_batches(cell, data, world, start)


def validation_batches(
    cell: CellConfig, data: FoldData, variant: str | None, world: World, records: list[Record] | None = None
) -> Iterator[Batch]:
    """This rank's share of the validation part (or of `records`), with the conditions of an evaluation variant.

    variant: its name; None for the conditions that training would give, none left out.
    """
    part = data.validation if records is None else records
    shown: dict[str, Shown]
    if variant is None:
        shown = {kind.name: kind.of for kind in data.conditions}
    else:
        draw = draw_from(cell.seed)
        shown = {kind.name: kind.shown(variant, data.validation, draw) for kind in data.conditions}
    if cell.data.stream:
        from bushpc.data import stream  # here: webdataset takes a second to import

        batches = stream.validation_batches(cell, data, world, part)
    else:
        batches = cached_validation_batches(cell, data, world, part)
    for batch in batches:
        if not shown:
            yield batch
            continue
        samples = list(zip(map(data.manifest.record, batch.keys), united(batch.mask_BKHW), strict=True))
        yield replace(batch, conditions={name: [value(*sample) for sample in samples] for name, value in shown.items()})
