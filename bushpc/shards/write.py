"""Packing: raw folder → shards. Parallel, deterministic and resumable; a partial write never passes for complete.

    plan → check against the card → for each shard: load and encode its samples in parallel, write the tar
         → move the tars into place → write the manifest, last

Work in progress is kept in `<out>/.packing/`. A shard is finished when its JSON file exists next to its tar; it is
written after the tar is flushed. A later attempt at the same work keeps finished shards whose SHA-256 still matches.
The bytes of a tar depend only on the samples: headers, order and PNG encoding are fixed. (PNG bytes may differ
between versions of Pillow's zlib, so hashes are equal only in equal environments.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
import typing as t
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bushpc.errors import BushpcError, BushpcWarning, ConfigError, DataError
from bushpc.files import flush_folder, sha256_of, write_atomically
from bushpc.metrics.mask import lesion_length
from bushpc.sample import LABELS, UNLABELLED, Sample
from bushpc.shards import manifest as manifests
from bushpc.shards import pictures, readers, sources, tree
from bushpc.shards.card import FILE_NAME, PROJECT_SHARDS, Card
from bushpc.shards.exchange import cohort
from bushpc.shards.exchange.settings import ImportSettings
from bushpc.shards.manifest import Manifest, Record, ShardInfo
from bushpc.shards.progress import Show, silent
from bushpc.shards.split import FILE_BY_SOURCE, write_folds

PACKER_VERSION = 2  # increase it when the same samples would give different bytes; existing datasets are then repacked

PNG_LEVEL = 3  # zlib level. PNG encoding takes most of the time; higher levels save 3 % in size for twice the time
WORK_FOLDER = ".packing"
CORRECTIONS = "corrections.csv"  # of `bushpc shards import --corrections`
LOCK_FILE = "lock"

# Turns an item into a sample; every source module has one.
Load = t.Callable[[sources.Item], Sample]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as stored in the tar. `record` has no offsets yet: they are known once the tar is written."""

    record: Record
    image_png: bytes
    mask_png: bytes
    json: bytes


def pack(
    name: str,
    src: str | Path | None,
    out: str | Path,
    *,
    excerpt: bool = False,
    workers: int = 1,
    progress: Show | None = None,
    shard_samples: int = 64,
    parameters: dict[str, int | float] | None = None,
    grey_max: float | None = None,
    mask_threshold: int | None = None,
) -> Manifest:
    """Pack dataset `name` from the raw folder `src` into the folder `out`; returns the manifest.

    src: the publisher's folder; None for a generated dataset.
    excerpt: `src` is only a part of the dataset, so its counts are not checked against the card.
    workers: number of processes that decode and encode; it does not affect the result.
    shard_samples: maximum number of samples in a tar.
    parameters: overrides of the card's parameters.
    grey_max: value of white in 16-bit and float pictures; None finds it (`bushpc.shards.pictures`).
    mask_threshold: least level of a lesion in a mask, 1 to 255; None is 128, or 1 if no mask has a level above 1.

    If `out` is already packed from identical sources and its tars are intact, only reports so.
    Raises: ConfigError for an unknown name or parameter or an invalid number; DataError for a folder that does not
    match the card, files that cannot be used, or another process packing into `out`.
    """
    out = Path(out)
    imported = _imported_card(name, out)
    source = t.cast(sources.DatasetSource, cohort) if imported else sources.source(name)
    if workers < 1 or shard_samples < 1:
        raise ConfigError(f"workers={workers} shard_samples={shard_samples}: both must be ≥ 1.")
    card = (imported or Card.find(name, out)).override(parameters or {})
    if imported:
        settings = ImportSettings.of_card(imported.imported, out / FILE_NAME)
        grey_max = settings.grey_max if grey_max is None else grey_max
        mask_threshold = settings.mask_threshold if mask_threshold is None else mask_threshold
    src = _raw_folder(src, card)
    if src is not None:
        _check_belongs(src, card)
        card = max(card.every_layout, key=lambda each: _share_of_layout(src, each))
    if mask_threshold is not None and not 1 <= mask_threshold <= 255:
        raise ConfigError(f"mask_threshold={mask_threshold}: it must be a level from 1 to 255.")
    how = readers.Reading(mask_threshold=mask_threshold)
    with typed_errors(src or out), readers.reading(how):
        plan = source.plan(src, card, excerpt=excerpt)
    if src is not None:
        if not excerpt:
            _check_counts(src, card, plan)
        how = how_to_read(plan.items, source.load, how, grey_max, progress or silent)
        plan = with_reading(plan, card, how)
    return write_shards(
        card,
        out,
        plan,
        source.load,
        excerpt=excerpt,
        workers=workers,
        progress=progress,
        shard_samples=shard_samples,
        how=how,
    )


def with_reading(plan: sources.Plan, card: Card, how: readers.Reading) -> sources.Plan:
    """The plan with an entry for how its files are read, if that is not the usual way: other ways give other pixels."""
    stated = how.stated()
    if not stated:
        return plan
    text = json.dumps({"dataset": card.name, **stated}, sort_keys=True)
    return plan._replace(sources={**plan.sources, "reading": hashlib.sha256(text.encode()).hexdigest()})


def write_shards(
    card: Card,
    out: Path,
    plan: sources.Plan,
    load: Load,
    *,
    excerpt: bool = False,
    workers: int = 1,
    progress: Show | None = None,
    shard_samples: int = 64,
    how: readers.Reading | None = None,
) -> Manifest:
    """Write the plan's items, turned into samples by `load`, as shards to `out`; otherwise like `pack`.

    load: with several workers it must be a module-level function, so that it can be pickled. how: the raw files are
    read; by default 8-bit pictures and masks of 0 and 255.
    """
    report = progress or silent
    shards = _divide(plan.items, shard_samples)

    with typed_errors(out), locked_work_folder(out) as work:
        if packed := _already_packed(card, out, plan, excerpt, shards):
            report(len(plan.items), len(plan.items), f"{out} is already packed from identical sources; nothing to do")
            _write_published(out, packed, plan)
            return packed
        _refuse_corrected(out)
        _discard_other_work(work, card, plan, excerpt, shards)
        finished: dict[str, tuple[ShardInfo, list[Record]]] = {}
        done = 0
        with _pool(workers, how or readers.Reading()) as encode:
            for file, items in shards.items():
                if kept := _finished_shard(work, out, file):
                    finished[file] = kept
                    done += len(items)
                    report(done, len(plan.items), f"{file} kept from an earlier attempt")
                    continue
                encoded = []
                for sample in encode(card, load, items):
                    encoded.append(sample)
                    done += 1
                    report(done, len(plan.items))
                finished[file] = _write_shard(work, file, encoded)
        manifest = Manifest(
            dataset=card.name,
            packer_version=PACKER_VERSION,
            excerpt=excerpt,
            synthetic=card.synthetic,
            mask_classes=card.mask_classes,
            channels=card.channels,
            shards=[info for info, _ in finished.values()],
            sources=dict(sorted(plan.sources.items())),
            records=[record for _, records in finished.values() for record in records],
        )
        _publish(work, out, manifest)
        _write_published(out, manifest, plan)
    return manifest


# --- checks before any work: does the raw folder match the card? ------------------------------------------------


def _imported_card(name: str, out: Path) -> Card | None:
    """The card in `out` if it is that of an imported cohort of this name."""
    if name in sources.names() or not (out / FILE_NAME).exists():
        return None
    card = Card.find(name, out)
    return card if card.imported else None


def _raw_folder(src: str | Path | None, card: Card) -> Path | None:
    if card.made_here:
        return None if src is None else Path(src)  # the source itself rejects a src
    if src is None:
        raise ConfigError(
            f"data={card.name} needs src=FOLDER: {card.title} as downloaded from {card.where} ({card.licence}). "
            f"shards/{card.name}/card.yaml describes the folder's content."
        )
    if not Path(src).is_dir():
        raise DataError(f"src={src} is not a folder. {card.title} is available from {card.where}.")
    return Path(src)


def _check_belongs(src: Path, card: Card) -> None:
    """Raises: DataError if the folder has none of the card's files, or matches another dataset's card completely.

    The message says which dataset the folder looks like, and where the right folder may be: a common mistake is to
    give its parent or a subfolder.
    """
    share = _share_of_files(src, card, deep=True)
    if share == 1 or not card.files:
        return
    cards = [Card.load(path.parent) for path in sorted(PROJECT_SHARDS.glob("*/card.yaml"))]
    others = [other.name for other in cards if other.name != card.name and _share_of_files(src, other) == 1]
    if not share or others:
        place = _right_folder(src, card)
        elsewhere = None if place else _other_dataset(src, cards)
        raise DataError(
            f"{src} is not the folder of {card.name}: "
            + (f"it looks like data={others[0]}." if others else f"it has no file {' or '.join(card.files)}.")
            + (f" src={place} looks like {card.name}." if place else "")
            + (f" {elsewhere[0]} looks like data={elsewhere[1]}." if elsewhere and not others else "")
            + f" shards/{card.name}/card.yaml describes the folder's content."
        )


def _right_folder(src: Path, card: Card) -> Path | None:
    """The folder near `src` that has all of the card's files, else one that has most kinds of them."""
    whole = tree.find(src, lambda place: _share_of_files(place, card) == 1)
    return whole or tree.find(src, lambda place: _share_of_files(place, card) > 1 / 2)


def _other_dataset(src: Path, cards: list[Card]) -> tuple[Path, str] | None:
    """A folder near `src` that is another dataset's, and its name."""
    for card in cards:
        if card.files and (place := tree.find(src, functools.partial(_is_whole, card))):
            return place, card.name
    return None


def _is_whole(card: Card, folder: Path) -> bool:
    return _share_of_files(folder, card) == 1


def _share_of_files(folder: Path, card: Card, *, deep: bool = False) -> float:
    """Share of the card's file patterns that match a file in the folder, in the layout that fits best.

    0 for a card without patterns. deep: also try layouts that are searched for in the whole tree. Looking for the right
    folder does without: such a layout fits every folder above its files, and each look would walk the tree again.
    """
    layouts = [each for each in card.every_layout if deep or not any(file.startswith("**") for file in each.files)]
    return max(_share_of_layout(folder, each) for each in layouts)


def _share_of_layout(folder: Path, card: Card) -> float:
    return sum(bool(tree.glob(folder, pattern)) for pattern in card.files) / max(len(card.files), 1)


def _check_counts(src: Path, card: Card, plan: sources.Plan) -> None:
    found = {pattern: len(tree.glob(src, pattern)) for pattern in card.files}
    off = [
        f"{found[pattern]} files match {pattern}, {count} expected"
        for pattern, count in card.files.items()
        if found[pattern] != count
    ]
    labels = [item.label for item in plan.items]
    off += [
        f"{labels.count(label)} samples are {label}, {count} expected"
        for label, count in card.counts.items()
        if labels.count(label) != count
    ]
    if off:
        raise DataError(
            f"{src} does not match the card of {card.name}:\n  "
            + "\n  ".join(off)
            + "\nDownload it again; or, if the folder is deliberately a part of the dataset, add excerpt=true."
        )


def how_to_read(
    items: list[sources.Item], load: Load, how: readers.Reading, grey_max: float | None, report: Show
) -> readers.Reading:
    """Find the range of deep pictures, and whether the masks' lesions are 1 instead of 255; reports either."""
    images = [image for item in items if (image := sources.image_of(item))]
    ranges, warnings = pictures.survey(images, grey_max)
    for kind, range_ in ranges.items():
        report(0, len(items), f"{kind} pictures of more than 8 bits: {range_} become black to white")
    for warning in warnings:
        report(0, len(items), f"warning: {warning}; grey_max=N sets another white")
    if grey_max is not None and not ranges:
        report(0, len(items), "grey_max= has no effect: all pictures have 8 bits")
    how = dataclasses.replace(how, ranges=ranges)
    if how.mask_threshold is None and (faint := _faint_mask(items, load, how)):
        loose = dataclasses.replace(how, mask_threshold=1, levels={})
        with readers.reading(loose):
            for item in items:
                with contextlib.suppress(Exception):  # whatever is wrong with an item, packing reports it
                    load(item)
        if max(loose.levels.values()) > 1:
            raise faint
        report(0, len(items), "no mask has a level above 1, so lesion is 1 (mask_threshold=1)")
        how = dataclasses.replace(how, mask_threshold=1)
    return how


def _faint_mask(items: list[sources.Item], load: Load, how: readers.Reading) -> readers.FaintMask | None:
    """What is wrong with the first lesion's mask, if it is faint. One in a set of bright masks fails in packing."""
    first = next((item for item in items if item.label != "normal"), None)
    try:
        with readers.reading(how):
            load(first) if first else None
    except readers.FaintMask as error:
        return error
    except Exception:  # packing reports it
        return None
    return None


def _divide(items: list[sources.Item], shard_samples: int) -> dict[str, list[sources.Item]]:
    """Items by tar, in the manifest's order: lesions and normal scans separately, sorted by key."""
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise DataError(f"Two samples have the key '{item.key}': keys must be unique in a dataset.")
        if not item.key or set(item.key) & set("./\\ \n\t") or len(item.key.encode()) > 80:
            raise DataError(f"'{item.key}' is not a valid key: use 1 to 80 bytes without dots, slashes and spaces.")
        if item.label not in (*LABELS, UNLABELLED):
            allowed = ", ".join((*LABELS, UNLABELLED))
            raise DataError(f"Sample '{item.key}' has label '{item.label}'; allowed: {allowed}.")
        seen.add(item.key)
    if not items:
        raise DataError("The raw folder contains no samples.")
    shards = {}
    for group in ("lesion", "normal"):
        members = sorted((item for item in items if (item.label == "normal") == (group == "normal")), key=_key)
        for number, start in enumerate(range(0, len(members), shard_samples)):
            shards[f"{group}-{number:06d}.tar"] = members[start : start + shard_samples]
    return shards


def _key(item: sources.Item) -> str:
    return item.key


@contextlib.contextmanager
def typed_errors(out: Path) -> t.Iterator[None]:
    """Raises: DataError for a file or folder that may not be read or written."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or out
        raise DataError(
            f"{place} cannot be read or written ({error.strerror or error}). Change its permissions or make room, or "
            "choose another folder with out=FOLDER."
        ) from error


@contextlib.contextmanager
def locked_work_folder(out: Path) -> t.Iterator[Path]:
    """Lock the work folder for this process; the kernel releases the lock however the process ends."""
    work = out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"Another bushpc pack is writing to {out}. Wait until it ends, or choose another folder."
            ) from None
        except OSError as error:  # a file system mounted without locks
            warnings.warn(
                f"{out} cannot be locked ({error}). Do not start a second pack into it.", BushpcWarning, stacklevel=3
            )
        yield work


def _already_packed(
    card: Card, out: Path, plan: sources.Plan, excerpt: bool, shards: dict[str, list[sources.Item]]
) -> Manifest | None:
    try:
        manifest = Manifest.load(out)
        manifests.verify(out, manifest, deep=True)
    except DataError:
        return None  # not packed, or damaged: pack in either case
    same = (
        manifest.dataset == card.name
        and manifest.packer_version == PACKER_VERSION
        and (manifest.excerpt, manifest.synthetic) == (excerpt, card.synthetic)
        and (manifest.mask_classes, manifest.channels) == (card.mask_classes, card.channels)
        and manifest.sources == plan.sources
        and [(shard.file, shard.samples) for shard in manifest.shards]
        == [(file, len(items)) for file, items in shards.items()]
    )
    return manifest if same else None


def _refuse_corrected(out: Path) -> None:
    """Raises: DataError where packing again would lose corrected masks."""
    if (out / CORRECTIONS).exists():
        raise DataError(
            f"{out} holds corrected masks ({CORRECTIONS}), which packing the raw data again would lose. Pack into "
            f"another folder (out=) and correct the masks there, or move {CORRECTIONS} away to give the corrections up."
        )


# --- work that survives a kill ----------------------------------------------------------------------------------


def _discard_other_work(
    work: Path, card: Card, plan: sources.Plan, excerpt: bool, shards: dict[str, list[sources.Item]]
) -> None:
    """Keep what an earlier attempt at exactly this task finished; delete the work of any other task."""
    task = {
        "dataset": card.name,
        "packer_version": PACKER_VERSION,
        "excerpt": excerpt,
        "mask_classes": card.mask_classes,
        "channels": card.channels,
        "sources": dict(sorted(plan.sources.items())),
        "shards": {file: [item.key for item in items] for file, items in shards.items()},
    }
    text = json.dumps(task, indent=1)
    try:
        if (work / "task.json").read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass  # no earlier attempt, or it was killed before it began
    _clear(work)
    write_atomically(work / "task.json", text)


def _clear(work: Path) -> None:
    """Empty the work folder except for the lock file, which this process holds."""
    for path in work.iterdir():
        if path.name != LOCK_FILE:
            path.unlink()


def _finished_shard(work: Path, out: Path, file: str) -> tuple[ShardInfo, list[Record]] | None:
    """A shard that an earlier attempt finished: its JSON file exists, and its tar has the hash stated there."""
    try:
        finished = json.loads((work / f"{file}.json").read_text(encoding="utf-8"))
        info = ShardInfo(**finished["info"])
        records = [Record(**record) for record in finished["records"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for folder in (work, out):  # it is already in `out` if the attempt was killed while moving the tars into place
        if (folder / file).exists() and sha256_of(folder / file) == info.sha256:
            return info, records
    return None


def _write_shard(work: Path, file: str, samples: list[Encoded]) -> tuple[ShardInfo, list[Record]]:
    path = work / file
    records = write_tar(path, samples)
    info = ShardInfo(file=file, sha256=sha256_of(path), bytes=path.stat().st_size, samples=len(samples))
    content = json.dumps({"info": asdict(info), "records": [asdict(record) for record in records]})
    write_atomically(work / f"{file}.json", content)
    return info, records


def write_tar(path: Path, samples: list[Encoded]) -> list[Record]:
    """Write the samples' tar and flush it; returns their records with its name and the offsets in it."""
    records = []
    with path.open("wb") as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                key = sample.record.key
                image_offset = _add(tar, stream, f"{key}.image.png", sample.image_png)
                mask_offset = _add(tar, stream, f"{key}.mask.png", sample.mask_png)
                _add(tar, stream, f"{key}.json", sample.json)
                fields = {**asdict(sample.record), "shard": path.name}
                records.append(Record(**{**fields, "image_offset": image_offset, "mask_offset": mask_offset}))
        stream.flush()
        os.fsync(stream.fileno())
    return records


def _add(tar: tarfile.TarFile, stream: t.BinaryIO, name: str, data: bytes) -> int:
    """Append a member whose header depends only on its name and length; returns the offset of its data."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    header.mode = 0o644
    header.mtime = 0
    tar.addfile(header, io.BytesIO(data))
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return stream.tell() - blocks * tarfile.BLOCKSIZE


def _publish(work: Path, out: Path, manifest: Manifest) -> None:
    """Replace the old shards. The manifest is deleted first and written last, so a partial set never has one."""
    (out / manifests.FILE_NAME).unlink(missing_ok=True)
    files = {shard.file for shard in manifest.shards}
    for stale in [*out.glob("lesion-*.tar"), *out.glob("normal-*.tar")]:
        if stale.name not in files:
            stale.unlink()
    for file in sorted(files):
        if (work / file).exists():
            (work / file).replace(out / file)
    flush_folder(out)
    manifest.save(out)
    _clear(work)


def _write_published(out: Path, manifest: Manifest, plan: sources.Plan) -> None:
    """Write folds that the publisher ships with the dataset next to the shards, for `folds=published`."""
    if plan.published is not None:
        write_folds(out / FILE_BY_SOURCE["published"], manifest.records, plan.published)


# --- one sample, in a worker process ----------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(
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
