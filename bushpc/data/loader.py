"""Shards → batches. Which samples make up step s depends on seed and s alone, never on ranks or workers.

The epochs' permutations are laid end to end, and step s takes the s-th stretch of `batch_size` samples. So every
global batch is full, each sample is seen exactly once an epoch, nothing is dropped or repeated at its end, and
the position of a run is one number: its step.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import typing as t
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bushpc.config import AugmentConfig, CellConfig, LoaderConfig
from bushpc.data.augment import Augment
from bushpc.data.prompts import NO_PROMPT, FirstPass, SizeBins, attribute_prompt, spatial_prompt
from bushpc.dist import World, keyed_seed
from bushpc.errors import DataError
from bushpc.sample import LABELS, Batch, Reprompter
from bushpc.shards.manifest import Manifest, Record, read_image, read_mask
from bushpc.shards.split import load_folds

# Part of the cache's name: raise it when `resize` or `_decode` makes other pixels.
DECODE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FoldData:
    """The two parts of one fold, and the size bins that its training part fixes."""

    manifest: Manifest
    folder: Path
    train: list[Record]
    validation: list[Record]
    bins: SizeBins

    @classmethod
    def open(cls, cell: CellConfig, fold: int, folds_file: Path) -> FoldData:
        """Read manifest and folds. Raises: DataError, ConfigError for a fold that does not exist."""
        folder = cell.data.folder
        manifest = Manifest.load(folder)
        folds = load_folds(folds_file, manifest.lesions, manifest.excerpt)
        train = [manifest.record(key) for key in folds.train(fold)]
        validation = [manifest.record(key) for key in folds.validation(fold)]
        shares = [record.lesion_pixels / (record.height * record.width) for record in train]
        bins = SizeBins.from_training(shares, cell.prompting.size_quantiles)
        return cls(manifest=manifest, folder=folder, train=train, validation=validation, bins=bins)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample index) for one rank, from step `start` to `stop`."""

    def __init__(self, samples: int, batch_size: int, seed: int, world: World, start: int, stop: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.world, self.start, self.stop = world, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            yield self.global_batch(step)[self.world.rank :: self.world.size]

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, sample index) pairs of all ranks at this step, in order."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [(p // self.samples, int(self._order(p // self.samples)[p % self.samples])) for p in positions]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(keyed_seed(self.seed, "order", epoch)).permutation(self.samples)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Decoded images (N, S, S, 3) and masks (N, S, S), uint8, and the row of each key."""

    images_NHWC: np.ndarray
    masks_NHW: np.ndarray
    rows: dict[str, int]


class Samples(Dataset[dict[str, t.Any]]):
    """Samples of some records from the cache; items are asked for as (epoch, index)."""

    def __init__(
        self,
        records: list[Record],
        cache: Cache,
        bins: SizeBins,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        spatial_dropout: float = 0.0,
    ) -> None:
        self.records, self.cache, self.bins = records, cache, bins
        self.augment, self.seed, self.spatial_dropout = augment, seed, spatial_dropout

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, t.Any]:
        epoch, index = position
        record = self.records[index]
        row = self.cache.rows[record.key]
        image_CHW = torch.from_numpy(self.cache.images_NHWC[row].transpose(2, 0, 1).copy())
        mask_1HW = torch.from_numpy(self.cache.masks_NHW[row][None].copy())
        if self.augment:
            image_CHW, mask_1HW = self.augment(image_CHW, mask_1HW, (self.seed, "augment", epoch, record.key))
        # The lesion is where it is after the augmentation: a flip moves it to another quadrant.
        spatial = spatial_prompt(mask_1HW[0].numpy() > 0, self.bins)
        if self.spatial_dropout:
            draw = np.random.default_rng(keyed_seed(self.seed, "spatial_dropout", epoch, record.key)).random()
            spatial = NO_PROMPT if draw < self.spatial_dropout else spatial
        return {
            "key": record.key,
            "image_CHW": image_CHW,
            "mask_1HW": mask_1HW,
            "label": LABELS.index(record.label),
            "spatial_prompt": spatial,
            "attribute_prompt": attribute_prompt(record.attributes),
        }


def collate(items: list[dict[str, t.Any]]) -> Batch:
    """Stack items into a Batch; uint8 becomes float here, so that workers hand over a quarter of the bytes."""
    return Batch(
        keys=[item["key"] for item in items],
        image_BCHW=torch.stack([item["image_CHW"] for item in items]).float() / 255,
        mask_BKHW=torch.stack([item["mask_1HW"] for item in items]).float(),
        label_B=torch.tensor([item["label"] for item in items]),
        spatial_prompts=[item["spatial_prompt"] for item in items],
        attribute_prompts=[item["attribute_prompt"] for item in items],
    )


def training_batches(cell: CellConfig, data: FoldData, world: World, start: int) -> Iterator[Batch]:
    """This rank's share of the global batches from step `start` to the end of training."""
    samples = Samples(
        data.train,
        open_cache(data, cell.model.image_size, cell.loader),
        data.bins,
        augment=_augment(cell.augment),
        seed=cell.seed,
        spatial_dropout=cell.prompting.spatial_dropout,
    )
    sampler = StepSampler(len(samples), cell.train.batch_size, cell.seed, world, start, cell.train.iterations)
    return iter(DataLoader(samples, batch_sampler=sampler, num_workers=cell.loader.workers, collate_fn=collate))


def validation_batches(
    cell: CellConfig, data: FoldData, prompts: str, world: World, records: list[Record] | None = None
) -> Iterator[Batch]:
    """This rank's share of the validation part (or of `records`), with spatial prompts from source `prompts`.

    Only `oracle` looks at the mask for its prompt; `first_pass` hands the model a reprompter instead.
    """
    part = data.validation if records is None else records
    samples = Samples(part, open_cache(data, cell.model.image_size, cell.loader), data.bins)
    reprompt: Reprompter | None = None
    if prompts == "first_pass":
        reprompt = FirstPass(bins=data.bins, tau=cell.prompting.tau)
    mine = list(range(len(part)))[world.rank :: world.size]
    for first in range(0, len(mine), cell.evaluate.batch_size):
        items = [samples[0, index] for index in mine[first : first + cell.evaluate.batch_size]]
        if prompts != "oracle":
            items = [item | {"spatial_prompt": NO_PROMPT} for item in items]
        batch = collate(items)
        yield Batch(**{**vars(batch), "reprompt": reprompt})


def open_cache(data: FoldData, image_size: int, loader: LoaderConfig) -> Cache:
    """Every lesion of the dataset, decoded and resized once per node and memory-mapped.

    All ranks, workers and cells of a node share the pages. The first one decodes under a lock while the others
    wait; the folder is renamed into place when it is whole. Its name holds the content's hash, so a repacked
    dataset never meets an old cache.
    """
    records = data.manifest.lesions
    name = hashlib.sha256(f"{DECODE_VERSION}|{data.manifest.hash}|{image_size}".encode()).hexdigest()[:24]
    loader.cache.mkdir(parents=True, exist_ok=True)
    target = loader.cache / name
    with (loader.cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Not by the folder's name alone: cleaners of temporary files take the files and leave the folder.
        if not all((target / file).exists() for file in ("images.npy", "masks.npy")):
            aside = loader.cache / f".{name}"
            for leftover in (aside, target):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir()
            _decode(data.folder, records, image_size, aside)
            aside.rename(target)
    return Cache(
        images_NHWC=np.load(target / "images.npy", mmap_mode="r"),
        masks_NHW=np.load(target / "masks.npy", mmap_mode="r"),
        rows={record.key: row for row, record in enumerate(records)},
    )


def resize(image_HWC: np.ndarray, mask_HW: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (antialiased bilinear) and mask (nearest) at image_size x image_size, aspect not kept (paper 2.2)."""
    image = _resized(torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)[None].float(), image_size, "bilinear")
    mask = _resized(torch.from_numpy(mask_HW.copy())[None, None].float(), image_size, "nearest-exact")
    image_SSC = image[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return image_SSC, mask[0, 0].byte().numpy()


def _resized(pixels_BCHW: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    antialias = mode == "bilinear"
    return torch.nn.functional.interpolate(pixels_BCHW, (size, size), mode=mode, antialias=antialias)


def _decode(folder: Path, records: list[Record], size: int, into: Path) -> None:
    shape = (len(records), size, size)
    images = np.lib.format.open_memmap(into / "images.npy", "w+", np.uint8, (*shape, 3))
    masks = np.lib.format.open_memmap(into / "masks.npy", "w+", np.uint8, shape)
    for i, record in enumerate(records):
        image_HWC, mask_HW = read_image(folder, record), read_mask(folder, record)
        if image_HWC.shape[:2] != mask_HW.shape:
            raise DataError(
                f"{folder / record.shard}: {record.key} has an image and a mask of different size; pack again"
            )
        images[i], masks[i] = resize(image_HWC, mask_HW, size)
        if not masks[i].any():
            raise DataError(
                f"the lesion of {record.key} ({record.lesion_pixels} of {record.height} x {record.width} pixels) "
                f"vanishes at model.image_size={size}: no overlap can be measured there; raise model.image_size"
            )
    images.flush()
    masks.flush()


def _augment(config: AugmentConfig) -> Augment | None:
    augment = Augment(config)
    return augment if augment.transform else None
