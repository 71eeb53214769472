"""Features from a model's frozen part, computed once per sample and shared by all epochs, folds and cells.

    decoded pixels ─Preparation→ images ─Model.features→ files ─FeatureStore→ Batch.features

    <features_dir>/<dataset>-<content>/
      plain/00000.safetensors …            groups of samples without augmentation
      augment-<content>/03-00000.safetensors …   the samples that the fourth of augment.variants changes

A folder's name contains a hash of everything its files depend on: data, image size, frozen weights, feature settings
and precision; for variants also augmentation and seed. Files are written atomically, and every tensor's checksum is
verified when a process first reads it. All processes that need the same features (ranks or cells, on any node) compute
them together: each takes groups that no other process has locked. The kernel releases the locks of a process that dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from bushpc.config import CellConfig, target_of
from bushpc.data import feature_files
from bushpc.data.cache import DecodingStopped, open_cache
from bushpc.data.feature_files import FeatureStore, checksum, is_whole
from bushpc.data.loader import FoldData, Preparation, plain_preparation, training_preparation
from bushpc.data.staging import Stage, stage_features
from bushpc.errors import DataError
from bushpc.files import exclusive, size_text, write_atomically
from bushpc.models.base import Model
from bushpc.sample import Batch
from bushpc.shards.manifest import Record

# Part of a folder's name: increase it when the file format changes.
VERSION = 1
POLL_S = 0.5
PROGRESS_S = 30.0


def compute_features(
    cell: CellConfig,
    model: Model,
    data: FoldData,
    device: torch.device,
    autocast: Callable[[], t.ContextManager[t.Any]],
    *,
    keep_going: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = print,
    stage: Stage | None = None,
) -> FeatureStore:
    """The features of every sample of a fold and of every variant of its training samples; computes missing ones.

    The frozen part is moved to `device` only if something is missing, and back to the CPU afterwards. keep_going:
    called between batches. stage: the node's disk, from which complete files are then read. Raises: DecodingStopped if
    it returns False (finished groups are kept); DataError if there is no space.
    """
    features = _place(cell, model, data)
    plain = plain_preparation(data)
    changing = training_preparation(cell, data)
    parts = [data.train, data.holdout, data.validation]
    groups = sorted({features.rows[record.key] // feature_files.GROUP for part in parts for record in part})
    trained = sorted({features.rows[record.key] // feature_files.GROUP for record in data.train})
    files: dict[Path, tuple[int, int | None]] = {features.file(group, None): (group, None) for group in groups}
    if changing.augment:
        variants = range(changing.augment.variants)
        files |= {features.file(group, v): (group, v) for v in variants for group in trained}
    missing = [path for path in files if not is_whole(path)]
    if not missing:
        return stage_features(features, list(files), stage)
    say(
        f"computing features of the frozen part of {type(model).__name__} for {len(groups)} groups of "
        f"{feature_files.GROUP} samples"
        + (f" and {changing.augment.variants} variants of them" if changing.augment else "")
        + f": {len(missing)} of {len(files)} files are missing in {features.plain.parent}"
    )
    cache = open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader, keep_going=keep_going, log=say)

    def pixels(prepare: Preparation, records: list[Record], turn: int) -> Batch:
        rows = [features.rows[record.key] for record in records]
        turns = [turn] * len(records)
        return prepare(turns, turns, records, cache.images_NSSC[rows], cache.masks_NSS[rows])

    def make(group: int, variant: int | None) -> bytes:
        tensors: dict[str, torch.Tensor] = {}
        checksums: dict[str, dict[str, int]] = {}
        records = data.manifest.records[group * feature_files.GROUP : (group + 1) * feature_files.GROUP]
        for first in range(0, len(records), cell.evaluate.batch_size):
            if not keep_going():
                raise DecodingStopped(f"{len(files) - len(missing)} of {len(files)} feature files are finished")
            some = records[first : first + cell.evaluate.batch_size]
            batch = pixels(plain, some, 0)
            if variant is not None:
                there, batch = batch.image_BCHW, pixels(changing, some, variant)
                picks = [i for i, image_CHW in enumerate(batch.image_BCHW) if not torch.equal(image_CHW, there[i])]
                some, image_BCHW = [some[i] for i in picks], batch.image_BCHW[picks]
                batch = dataclasses.replace(batch, image_BCHW=image_BCHW)
            if some:
                with torch.no_grad(), autocast():
                    made = model.features(batch.to(device).image_BCHW)
                made = {name: value.cpu() for name, value in made.items()}
                for i, record in enumerate(some):
                    sample = {name: value[i].contiguous() for name, value in made.items()}
                    tensors |= {f"{record.key}/{name}": value for name, value in sample.items()}
                    checksums[record.key] = {name: checksum(value) for name, value in sample.items()}
        return save(tensors, {"crc32": json.dumps(checksums)})

    reported = 0.0
    while missing:
        claimed = False
        for path in missing:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with exclusive(path.with_suffix(".lock")) as ours:
                    if not ours or is_whole(path):
                        continue
                    for leftover in path.parent.glob(f".{path.name}.*"):  # from a killed process, as we hold the lock
                        leftover.unlink()
                    write_atomically(path, make(*files[path]))
            except FileNotFoundError:  # without working locks, another process can delete ours as a leftover
                continue
            except OSError as error:
                raise DataError(
                    f"{path} cannot be written ({error}). Free some space, or set loader.features_dir to another "
                    "folder that all nodes share (finished files are kept), or set loader.features=false"
                ) from error
            claimed = True
            if time.monotonic() - reported > PROGRESS_S:
                reported, existing = time.monotonic(), [size for file in files if (size := _size(file))]
                expected = sum(existing) / len(existing) * len(files)
                sizes = f"{size_text(sum(existing))} of about {size_text(expected)}"
                say(f"{len(existing)} of {len(files)} feature files, {sizes}")
        missing = [path for path in missing if not is_whole(path)]
        # Other processes have the rest: wait for their files, or for their locks if they die.
        if missing and not claimed:
            if not keep_going():
                raise DecodingStopped("other processes are computing the last feature files")
            time.sleep(POLL_S)
    for module in model.outside_state().values():
        module.cpu()
    say(f"features: {len(files)} files, {size_text(sum(map(_size, files)))} in {features.plain.parent}")
    return stage_features(features, list(files), stage)


def _place(cell: CellConfig, model: Model, data: FoldData) -> FeatureStore:
    """Locate the features of this cell."""
    content = {
        "version": VERSION,
        "model": target_of(type(model)),
        "settings": cell.model.feature_settings,
        "weights": _hash_of(model),
        "image_size": cell.model.image_size,
        "data": data.manifest.hash,
        "computed": [cell.engine.device, cell.engine.precision],
    }
    augment = {"augment": dataclasses.asdict(cell.augment), "seed": cell.seed}
    parent = Path(cell.loader.features_dir) if cell.loader.features_dir else data.folder / "features"
    home = parent / f"{data.manifest.dataset}-{_short(content)}"
    return FeatureStore(
        plain=home / "plain",
        changed=home / f"augment-{_short(augment)}",
        rows={record.key: row for row, record in enumerate(data.manifest.records)},
    )


def _hash_of(model: Model) -> str:
    """SHA-256 of the frozen part's tensors."""
    digest = hashlib.sha256()
    for part, module in model.outside_state().items():
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}/{name}/{tensor.dtype}/{list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _short(content: dict[str, t.Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
