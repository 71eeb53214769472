"""Packing: raw folder → shards. Parallel, deterministic and resumable; a partial write never passes for complete.

    plan → check against the card → for each shard: load and encode its samples in parallel, write the tar
         → move the tars into place → write the manifest, last

raw_folder.py: does the folder match the card. encode.py: one sample. work_folder.py: what a killed attempt leaves.

Work in progress is kept in `<out>/.packing/`. A shard is finished when its JSON file exists next to its tar; it is
written after the tar is flushed. A later attempt at the same work keeps finished shards whose SHA-256 still matches.
The bytes of a tar depend only on the samples: headers, order and PNG encoding are fixed. (PNG bytes may differ
between versions of Pillow's zlib, so hashes are equal only in equal environments.)
"""

from __future__ import annotations

import hashlib
import json
import typing as t
from pathlib import Path

from bushpc.errors import ConfigError, DataError
from bushpc.sample import LABELS, UNLABELLED
from bushpc.shards import manifest as manifests
from bushpc.shards import readers, sources
from bushpc.shards.card import FILE_NAME, Card
from bushpc.shards.encode import PACKER_VERSION, encoders
from bushpc.shards.exchange import cohort
from bushpc.shards.exchange.settings import ImportSettings
from bushpc.shards.manifest import Manifest, Record, ShardInfo
from bushpc.shards.progress import Show, silent
from bushpc.shards.raw_folder import check_belongs, check_counts, how_to_read, require_folder, share_of_layout
from bushpc.shards.split import FILE_BY_SOURCE, write_folds
from bushpc.shards.work_folder import (
    discard_other_work,
    finished_shard,
    locked_work_folder,
    publish,
    typed_errors,
    write_shard,
)

CORRECTIONS = "corrections.csv"  # of `bushpc shards import --corrections`


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
    src = require_folder(src, card)
    if src is not None:
        check_belongs(src, card)
        card = max(card.every_layout, key=lambda each: share_of_layout(src, each))
    if mask_threshold is not None and not 1 <= mask_threshold <= 255:
        raise ConfigError(f"mask_threshold={mask_threshold}: it must be a level from 1 to 255.")
    how = readers.Reading(mask_threshold=mask_threshold)
    with typed_errors(src or out), readers.reading(how):
        plan = source.plan(src, card, excerpt=excerpt)
    if src is not None:
        if not excerpt:
            check_counts(src, card, plan)
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
    load: sources.Load,
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
        discard_other_work(work, card, plan, excerpt, shards)
        finished: dict[str, tuple[ShardInfo, list[Record]]] = {}
        done = 0
        with encoders(workers, how or readers.Reading()) as encode:
            for file, items in shards.items():
                if kept := finished_shard(work, out, file):
                    finished[file] = kept
                    done += len(items)
                    report(done, len(plan.items), f"{file} kept from an earlier attempt")
                    continue
                encoded = []
                for sample in encode(card, load, items):
                    encoded.append(sample)
                    done += 1
                    report(done, len(plan.items))
                finished[file] = write_shard(work, file, encoded)
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
        publish(work, out, manifest)
        _write_published(out, manifest, plan)
    return manifest


def _imported_card(name: str, out: Path) -> Card | None:
    """The card in `out` if it is that of an imported cohort of this name."""
    if name in sources.names() or not (out / FILE_NAME).exists():
        return None
    card = Card.find(name, out)
    return card if card.imported else None


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


def _write_published(out: Path, manifest: Manifest, plan: sources.Plan) -> None:
    """Write folds that the publisher ships with the dataset next to the shards, for `folds=published`."""
    if plan.published is not None:
        write_folds(out / FILE_BY_SOURCE["published"], manifest.records, plan.published)


# --- one sample, in a worker process ----------------------------------------------------------------------------
