"""Shards → batches. Which samples make up step s depends on seed and s alone, never on ranks or workers.

The epochs' permutations are laid end to end, and step s takes the s-th stretch of `batch_size` samples. So every
global batch is full, each sample is seen exactly once an epoch, nothing is dropped or repeated at its end, and
the position of a run is one number: its step.
"""

from __future__ import annotations

import functools
import typing as t
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from bushpc.conditions import Condition, Draw
from bushpc.config import CellConfig
from bushpc.data.augment import Augment, mask_planes
from bushpc.data.augment.change import Change
from bushpc.data.cache import Cache, open_cache
from bushpc.data.feature_files import FeatureStore
from bushpc.data.members import fold_members
from bushpc.data.mixture import open_synthetic
from bushpc.data.workers import in_workers
from bushpc.dist import World, keyed_seed
from bushpc.sample import Batch, label_index
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.split import load_folds, refuse_synthetic

Arrays = np.ndarray | Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FoldData:
    """The parts of one fold, with normal scans if data.normals asks, and the model's conditions, fitted to this fold.

    manifest: of the dataset, including the synthetic scans that train, where data.synthetic names some.
    repeats: how often an epoch draws each of `train`. holdout: of the training part, held out for the schedule.
    features: what was computed of them before (bushpc.data.features), where `loader.features` asks for it.
    """

    manifest: Manifest
    folder: Path
    train: list[Record]
    repeats: list[int]
    holdout: list[Record]
    validation: list[Record]
    conditions: tuple[Condition, ...] = ()
    features: FeatureStore | None = None

    @classmethod
    def open(cls, cell: CellConfig, fold: int, folds_file: Path) -> FoldData:
        """Read manifest and folds. Raises: DataError, ConfigError for a fold that does not exist."""
        folder = cell.data.folder
        manifest = Manifest.load(folder)
        refuse_synthetic(manifest, folder)
        folds = load_folds(folds_file, manifest.records, manifest.excerpt, normals=cell.data.normals)
        real, synthetic = manifest.records, []
        if cell.data.mixed:
            added = open_synthetic(t.cast(str, cell.data.synthetic), fold, cell.data.synthetic_sha256)
            synthetic, manifest = added.records(cell.data.normals), added.added_to(manifest)
        members = fold_members(real, folds, fold, cell, synthetic)
        return cls(
            manifest=manifest,
            folder=folder,
            train=members.train,
            repeats=members.repeats,
            holdout=members.holdout,
            validation=members.validation,
            conditions=tuple(kind.fitted(members.train, cell.prompting) for kind in cell.model.conditions),
        )


class Place(t.NamedTuple):
    """One sample of a batch. place: its index in the training part. turn: how often it was drawn before."""

    epoch: int
    place: int
    turn: int


class StepSampler(Sampler[list[Place]]):
    """Batches for one rank, from step `start` to `stop`. repeats: how often an epoch draws each sample."""

    def __init__(self, repeats: Sequence[int], batch_size: int, seed: int, world: World, start: int, stop: int) -> None:
        self.repeats, self.batch_size, self.seed = repeats, batch_size, seed
        self.world, self.start, self.stop = world, start, stop
        self.samples = [(index, copy) for index, times in enumerate(repeats) for copy in range(times)]

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(self.start, self.stop):
            yield self.global_batch(step)[self.world.rank :: self.world.size]

    def global_batch(self, step: int) -> list[Place]:
        """What all ranks together draw at this step, in order."""
        draws = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.samples))
            index, copy = self.samples[_order(len(self.samples), self.seed, epoch)[place]]
            draws.append(Place(epoch, index, epoch * self.repeats[index] + copy))
        return draws


@functools.lru_cache(maxsize=8)  # a batch larger than the training part spans several epochs
def _order(samples: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng(keyed_seed(seed, "order", epoch)).permutation(samples).tolist()
    return order


def draw_from(seed: int) -> Draw:
    """Random generators, each seeded by the run's seed and the given words."""
    return lambda *words: np.random.default_rng(keyed_seed(seed, *words))


class Preparation:
    """Decoded pixels → Batch. Augmentation and conditions depend only on (seed, sample, turn).

    conditions: fitted kinds whose training values the batch gets. mask_classes: planes that a mask's bits are laid out
    in. augment: None leaves the pixels as they are.
    """

    def __init__(
        self,
        conditions: Sequence[Condition] = (),
        *,
        mask_classes: int = 1,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.conditions, self.mask_classes, self.augment, self.seed = conditions, mask_classes, augment, seed
        # Values that augmentation does not change, by kind and sample: computed once for all epochs.
        self._values: dict[tuple[str, str], t.Any] = {}

    def __call__(
        self,
        epochs: list[int],
        turns: list[int],
        records: Sequence[Record],
        image_BSSC: Arrays,
        mask_BSS: Arrays,
    ) -> Batch:
        """image_BSSC, mask_BSS: uint8, as the cache has them; the batch keeps them if nothing changes them."""
        if self.augment:
            drawn = self.augment.batch(image_BSSC, mask_BSS, records, self.seed, turns, self.mask_classes)
            image_BCHW, mask_BKHW, changes = drawn
        else:
            image_BCHW = torch.from_numpy(np.asarray(image_BSSC)).permute(0, 3, 1, 2)
            mask_BKHW, changes = mask_planes(torch.from_numpy(np.asarray(mask_BSS)), self.mask_classes), None
        masks_BHW = self._shown_masks(mask_BKHW, mask_BSS, changes)
        samples = list(zip(turns, records, masks_BHW, strict=True))
        return Batch(
            keys=[record.key for record in records],
            epochs=epochs,
            image_BCHW=image_BCHW,
            mask_BKHW=mask_BKHW,
            label_B=torch.tensor([label_index(record.label) for record in records]),
            conditions={kind.name: [self._value(kind, *sample) for sample in samples] for kind in self.conditions},
            changes=changes,
        )

    def _shown_masks(self, mask_BKHW: torch.Tensor, mask_BSS: Arrays, changes: list[Change] | None) -> np.ndarray:
        """B x H x W masks for the conditions that read them, moved even where the device is to move the batch's."""
        if not any(kind.from_mask for kind in self.conditions):
            return mask_BKHW[:, 0].numpy()
        if changes is None:
            return united(mask_BKHW)
        from bushpc.data.augment.pixels import mask_moved

        return np.stack([mask_moved(*of) for of in zip(changes, mask_BSS, strict=True)]) > 0

    def _value(self, kind: Condition, turn: int, record: Record, mask_HW: np.ndarray) -> t.Any:
        if kind.left_out(draw_from(self.seed), turn, record.key):
            return kind.absent
        if self.augment and kind.from_mask:  # the lesion is where it is now
            return kind.of(record, mask_HW)
        name = kind.name, record.key
        if name not in self._values:
            self._values[name] = kind.of(record, mask_HW)
        return self._values[name]


def united(mask_BKHW: torch.Tensor) -> np.ndarray:
    """Pixels of any mask class: B x H x W booleans."""
    return mask_BKHW.amax(dim=1).numpy() > 0


class Samples(Dataset[Batch]):
    """A dataset of batches from the cache, indexed by lists of draws."""

    def __init__(
        self, records: list[Record], cache: Cache, prepare: Preparation, features: FeatureStore | None = None
    ) -> None:
        self.records, self.cache, self.prepare, self.features = records, cache, prepare, features
        self.rows = np.array([cache.rows[record.key] for record in records], dtype=np.intp)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draws: list[Place]) -> Batch:
        rows = self.rows[[draw.place for draw in draws]]
        images, masks = self.cache.images_NSSC, self.cache.masks_NSS
        # What is changed is copied then; until then the cache's pages do.
        whole = self.prepare.augment is None
        batch = self.prepare(
            [draw.epoch for draw in draws],
            [draw.turn for draw in draws],
            [self.records[draw.place] for draw in draws],
            images[rows] if whole else [images[row] for row in rows],
            masks[rows] if whole else [masks[row] for row in rows],
        )
        for kind in self.prepare.conditions:
            if kind.from_pixels:
                batch.conditions[kind.name] = [self._pictured(kind, draw) for draw in draws]
        if self.features is None:
            return batch
        augment = self.prepare.augment
        variants = [augment.variant(draw.turn) if augment else None for draw in draws]
        return replace(batch, features=self.features(batch.keys, variants))

    def _pictured(self, kind: Condition, draw: Place) -> t.Any:
        partner = kind.partner(draw_from(self.prepare.seed), draw.turn, self.records[draw.place].key)
        if partner is None:
            return kind.absent
        row = self.cache.rows[partner]
        return kind.pictured(self.cache.images_NSSC[row], self.cache.masks_NSS[row])


def cached_training_batches(cell: CellConfig, data: FoldData, world: World, start: int) -> Generator[Batch, None, None]:
    """`batches.training_batches` from the node's cache."""
    prepare = training_preparation(cell, data)
    cache = open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader)
    samples = Samples(data.train, cache, prepare, data.features)
    sampler = StepSampler(data.repeats, cell.train.batch_size, cell.seed, world, start, cell.train.iterations)
    if prepare.augment and cell.loader.workers:
        yield from in_workers(samples, cell.loader.workers, sampler)
    else:
        yield from map(samples.__getitem__, sampler)  # copying is faster than sharing the memory


def training_preparation(cell: CellConfig, data: FoldData) -> Preparation:
    """The preparation that training uses: augmentation and the training values of all conditions."""
    return Preparation(
        data.conditions,
        mask_classes=len(data.manifest.mask_classes),
        augment=Augment(cell.augment) if cell.augment.changes else None,
        seed=cell.seed,
    )


def plain_preparation(data: FoldData) -> Preparation:
    """Pixels as they are, without conditions: `batches.validation_batches` adds those of a variant."""
    return Preparation(mask_classes=len(data.manifest.mask_classes))


def cached_validation_batches(cell: CellConfig, data: FoldData, world: World, part: list[Record]) -> Iterator[Batch]:
    cache = open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader)
    prepare = plain_preparation(data)
    samples = Samples(part, cache, prepare, data.features)
    mine = list(range(len(part)))[world.rank :: world.size]
    for first in range(0, len(mine), cell.evaluate.batch_size):
        yield samples[[Place(0, index, 0) for index in mine[first : first + cell.evaluate.batch_size]]]
