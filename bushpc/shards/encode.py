"""One sample → PNGs, JSON and its record, as a tar holds them; in a worker process where there are several."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import os
import threading
import typing as t
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bushpc.errors import BushpcError, DataError
from bushpc.metrics.mask import lesion_length
from bushpc.sample import Sample
from bushpc.shards import readers, sources
from bushpc.shards.card import Card
from bushpc.shards.manifest import Record
from bushpc.shards.sources import Load

PACKER_VERSION = 2  # increase it when the same samples would give different bytes; existing datasets are then repacked
PNG_LEVEL = 3  # zlib level. PNG encoding takes most of the time; higher levels save 3 % in size for twice the time


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as stored in the tar. `record` has no offsets yet: they are known once the tar is written."""

    record: Record
    image_png: bytes
    mask_png: bytes
    json: bytes


@contextlib.contextmanager
def encoders(
    workers: int, how: readers.Reading
) -> t.Iterator[t.Callable[[Card, Load, list[sources.Item]], t.Iterable[Encoded]]]:
    """A function that encodes items in order: in this process with one worker, else in that many processes."""
    if workers == 1:
        yield lambda card, load, items: (_encode(card, load, how, item) for item in items)
        return
    # Spawn, don't fork: the caller may have threads, locks or a CUDA context, which a fork would break.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent) as pool:
        try:
            yield lambda card, load, items: pool.map(functools.partial(_encode, card, load, how), items)
        except BrokenProcessPool:
            raise DataError(
                f"One of the {workers} packing processes was killed, most likely because memory ran out. "
                "Run the same command again with fewer workers; finished shards are kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # stop at a bad file, without processing the rest
            raise


def _exit_with_parent() -> None:
    """End this worker when the packer is killed; a pool's worker would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode(card: Card, load: Load, how: readers.Reading, item: sources.Item) -> Encoded:
    try:
        with readers.reading(how):
            sample = load(item)
    except BushpcError:
        raise
    except Exception as error:
        raise DataError(f"Sample '{item.key}' cannot be read: {type(error).__name__}: {error}") from error
    check_sample(sample, card)
    height, width = sample.mask_HW.shape
    metadata = {
        "key": sample.key,
        "patient": sample.patient,
        "label": sample.label,
        "attributes": sample.attributes,
        "pixel_mm": sample.pixel_mm,
        "sources": list(sample.sources),
    }
    image_png, mask_png = png(_merge_equal_channels(sample.image_HWC)), png(sample.mask_HW)
    record = Record(
        key=sample.key,
        patient=sample.patient,
        label=sample.label,
        attributes=dict(sorted(sample.attributes.items())),
        pixel_mm=sample.pixel_mm,
        height=height,
        width=width,
        lesion_pixels=int(np.count_nonzero(sample.mask_HW)),
        lesion_length=lesion_length(sample.mask_HW),
        shard="",
        image_offset=0,
        image_bytes=len(image_png),
        mask_offset=0,
        mask_bytes=len(mask_png),
    )
    text = json.dumps(metadata, indent=1, sort_keys=True, ensure_ascii=False)
    return Encoded(record=record, image_png=image_png, mask_png=mask_png, json=text.encode())


def check_sample(sample: Sample, card: Card) -> None:
    """Check that a source keeps the contract of `Sample`. Faults that a raw file can cause are a DataError."""
    image, mask = sample.image_HWC, sample.mask_HW
    assert image.dtype == mask.dtype == np.uint8, sample.key
    assert image.ndim == 3, sample.key
    assert image.shape[2] == len(card.channels), sample.key
    files = f" ({', '.join(sample.sources)})" if sample.sources else ""
    if image.shape[:2] != mask.shape:
        raise DataError(
            f"Image and mask of '{sample.key}' differ in size: "
            f"{image.shape[1]}x{image.shape[0]} and {mask.shape[1]}x{mask.shape[0]} pixels{files}."
        )
    assert mask.max() < 1 << len(card.mask_classes), sample.key
    if mask.any() == (sample.label == "normal"):
        what = "is normal but has lesion pixels" if sample.label == "normal" else "has a lesion but an empty mask"
        raise DataError(f"'{sample.key}' {what}{files}.")


def _merge_equal_channels(image_HWC: np.ndarray) -> np.ndarray:
    """One channel if all three are equal, as in most scans: a third of the work. It is read back as RGB."""
    red, green, blue, *fourth = np.moveaxis(image_HWC, -1, 0)
    grey = not fourth and np.array_equal(red, green) and np.array_equal(red, blue)
    return red if grey else image_HWC


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=PNG_LEVEL)
    return stream.getvalue()
