"""Shards → batches. Which samples make up step s depends on seed and s alone, never on ranks or workers.

The epochs' permutations are laid end to end, and step s takes the s-th stretch of `batch_size` samples. So every
global batch is full, each sample is seen exactly once an epoch, nothing is dropped or repeated at its end, and
the position of a run is one number: its step.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import typing as t
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bushpc.config import CellConfig
from bushpc.data.augment import Augment
from bushpc.data.cache import Cache, open_cache
from bushpc.data.captions import NO_CAPTION, caption
from bushpc.data.feature_files import FeatureStore
from bushpc.data.members import fold_members
from bushpc.data.mixture import open_synthetic
from bushpc.data.prompts import FROM_MASK, NO_PROMPT, FirstPass, SizeBins, attribute_prompt, spatial_prompt
from bushpc.dist import World, keyed_seed
from bushpc.process import STOP_SIGNALS, end_with_parent
from bushpc.sample import Batch, Reprompter, label_index
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.split import load_folds, refuse_synthetic


@dataclass(frozen=True, kw_only=True)
class FoldData:
    """The parts of one fold, with normal scans where data.normals asks, and the size bins that training fixes.

    manifest: of the dataset, and of the synthetic scans that train besides, where data.synthetic asks for some.
    repeats: how often an epoch draws each of `train`. holdout: of the training part, held out for the schedule.
    features: what was computed of them before (bushpc.data.features), where `loader.features` asks for it.
    """

    manifest: Manifest
    folder: Path
    train: list[Record]
    repeats: list[int]
    holdout: list[Record]
    validation: list[Record]
    bins: SizeBins
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
        lesions = [record for record in members.train if record.lesion_pixels]
        shares = [record.lesion_pixels / (record.height * record.width) for record in lesions]
        bins = SizeBins.from_training(shares, cell.prompting.size_quantiles)
        return cls(
            manifest=manifest,
            folder=folder,
            train=members.train,
            repeats=members.repeats,
            holdout=members.holdout,
            validation=members.validation,
            bins=bins,
        )


class Draw(t.NamedTuple):
    """One sample of a batch. place: its index in the training part. turn: how often it was drawn before."""

    epoch: int
    place: int
    turn: int


class StepSampler(Sampler[list[Draw]]):
    """Batches for one rank, from step `start` to `stop`. repeats: how often an epoch draws each sample."""

    def __init__(self, repeats: Sequence[int], batch_size: int, seed: int, world: World, start: int, stop: int) -> None:
        self.repeats, self.batch_size, self.seed = repeats, batch_size, seed
        self.world, self.start, self.stop = world, start, stop
        self.samples = [(index, copy) for index, times in enumerate(repeats) for copy in range(times)]

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.stop):
            yield self.global_batch(step)[self.world.rank :: self.world.size]

    def global_batch(self, step: int) -> list[Draw]:
        """What all ranks together draw at this step, in order."""
        draws = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.samples))
            index, copy = self.samples[_order(len(self.samples), self.seed, epoch)[place]]
            draws.append(Draw(epoch, index, epoch * self.repeats[index] + copy))
        return draws


@functools.lru_cache(maxsize=8)  # a batch larger than the training part spans several epochs
def _order(samples: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng(keyed_seed(seed, "order", epoch)).permutation(samples).tolist()
    return order


class Preparation:
    """Decoded pixels → Batch. Augmentation and prompts depend on (seed, sample, turn), on nothing else.

    mask_classes: planes that a mask's bits are laid out in. augment: None leaves the pixels as they are. spatial:
    whether there are spatial prompts; "" otherwise. spatial_dropout: share of samples without one all the same.
    captions: whether there are captions; "" otherwise.
    """

    def __init__(
        self,
        bins: SizeBins,
        *,
        mask_classes: int = 1,
        augment: Augment | None = None,
        seed: int = 0,
        spatial: bool = True,
        spatial_dropout: float = 0.0,
        captions: bool = False,
    ) -> None:
        self.bins, self.mask_classes, self.augment, self.seed = bins, mask_classes, augment, seed
        self.spatial, self.spatial_dropout, self.captions = spatial, spatial_dropout, captions
        # What every epoch would find again: attribute prompts, and the spatial prompts of masks as they are.
        self._attribute_prompts: dict[str, str] = {}
        self._spatial_prompts: dict[str, str] = {}

    def __call__(
        self,
        epochs: list[int],
        turns: list[int],
        records: Sequence[Record],
        image_BSSC: np.ndarray,
        mask_BSS: np.ndarray,
    ) -> Batch:
        """image_BSSC, mask_BSS: uint8, as the cache has them; the batch keeps them if nothing changes them."""
        image_BCHW = torch.from_numpy(image_BSSC).permute(0, 3, 1, 2)
        mask_BKHW = mask_planes(torch.from_numpy(mask_BSS), self.mask_classes)
        if self.augment:
            changed = [
                self.augment(image_CHW.contiguous(), mask_KHW, record, self.seed, turn)
                for turn, record, image_CHW, mask_KHW in zip(turns, records, image_BCHW, mask_BKHW, strict=True)
            ]
            image_BCHW = torch.stack([image_CHW for image_CHW, _ in changed])
            mask_BKHW = torch.stack([mask_KHW for _, mask_KHW in changed])
        spatial_prompts = [NO_PROMPT] * len(records)
        if self.spatial:
            masks = mask_BKHW.amax(dim=1).numpy()  # a size is that of all classes united, as the bins are
            spatial_prompts = [self._spatial(*sample) for sample in zip(turns, records, masks, strict=True)]
        return Batch(
            keys=[record.key for record in records],
            epochs=epochs,
            image_BCHW=image_BCHW,
            mask_BKHW=mask_BKHW,
            label_B=torch.tensor([label_index(record.label) for record in records]),
            spatial_prompts=spatial_prompts,
            attribute_prompts=[self._attribute(record) for record in records],
            captions=[caption(r.label, r.attributes) if self.captions else NO_CAPTION for r in records],
        )

    def _spatial(self, turn: int, record: Record, mask_HW: np.ndarray) -> str:
        if self.spatial_dropout:
            draw = np.random.default_rng(keyed_seed(self.seed, "spatial_dropout", turn, record.key)).random()
            if draw < self.spatial_dropout:
                return NO_PROMPT
        if self.augment:  # the lesion is where it is now: a flip moves it to another quadrant
            return spatial_prompt(mask_HW > 0, self.bins)
        if record.key not in self._spatial_prompts:
            self._spatial_prompts[record.key] = spatial_prompt(mask_HW > 0, self.bins)
        return self._spatial_prompts[record.key]

    def _attribute(self, record: Record) -> str:
        if record.key not in self._attribute_prompts:
            self._attribute_prompts[record.key] = attribute_prompt(record.attributes)
        return self._attribute_prompts[record.key]


def mask_planes(mask_BHW: torch.Tensor, classes: int) -> torch.Tensor:
    """uint8 masks with a bit a class (B, H, W) → a plane of 0 and 1 a class (B, K, H, W)."""
    if classes == 1:
        return mask_BHW[:, None]
    return mask_BHW[:, None] >> torch.arange(classes, dtype=torch.uint8)[:, None, None] & 1


class Samples(Dataset[Batch]):
    """Batches of some records from the cache; each is asked for as the draws of its samples."""

    def __init__(
        self, records: list[Record], cache: Cache, prepare: Preparation, features: FeatureStore | None = None
    ) -> None:
        self.records, self.cache, self.prepare, self.features = records, cache, prepare, features
        self.rows = np.array([cache.rows[record.key] for record in records], dtype=np.intp)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draws: list[Draw]) -> Batch:
        rows = self.rows[[draw.place for draw in draws]]
        batch = self.prepare(
            [draw.epoch for draw in draws],
            [draw.turn for draw in draws],
            [self.records[draw.place] for draw in draws],
            self.cache.images_NSSC[rows],
            self.cache.masks_NSS[rows],
        )
        if self.features is None:
            return batch
        augment = self.prepare.augment
        variants = [augment.variant(draw.turn) if augment else None for draw in draws]
        return replace(batch, features=self.features(batch.keys, variants))


def training_batches(cell: CellConfig, data: FoldData, world: World, start: int) -> Generator[Batch, None, None]:
    """This rank's share of the global batches from step `start` to the end of training. Closing it ends its workers."""
    if cell.data.stream:
        from bushpc.data import stream  # which builds on this module

        yield from stream.training_batches(cell, data, world, start)
        return
    prepare = training_preparation(cell, data)
    cache = open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader)
    samples = Samples(data.train, cache, prepare, data.features)
    sampler = StepSampler(data.repeats, cell.train.batch_size, cell.seed, world, start, cell.train.iterations)
    if prepare.augment and cell.loader.workers:
        yield from in_workers(samples, cell.loader.workers, sampler)
    else:
        yield from map(samples.__getitem__, sampler)  # a plain copy is faster than what it takes to hand it over


def training_preparation(cell: CellConfig, data: FoldData) -> Preparation:
    """What training does to decoded pixels. A spatial prompt costs a draw, so none is made that no model reads."""
    return Preparation(
        data.bins,
        mask_classes=len(data.manifest.mask_classes),
        augment=Augment(cell.augment) if cell.augment.changes else None,
        seed=cell.seed,
        spatial="spatial_prompts" in cell.model.needs,
        spatial_dropout=cell.prompting.spatial_dropout,
        captions="captions" in cell.model.needs,
    )


def validation_preparation(cell: CellConfig, data: FoldData) -> Preparation:
    """The same for validation: pixels as they are, and spatial prompts only from the source that is asked for."""
    return Preparation(
        data.bins,
        mask_classes=len(data.manifest.mask_classes),
        spatial=False,
        captions="captions" in cell.model.needs,
    )


def validation_batches(
    cell: CellConfig, data: FoldData, prompts: str, world: World, records: list[Record] | None = None
) -> Iterator[Batch]:
    """This rank's share of the validation part (or of `records`), with prompts from source `prompts`.

    `oracle` and its falsifications, `wrong_size` and `wrong_quadrant`, look at the mask for their spatial prompt;
    nothing else does. `first_pass` hands the model a reprompter instead, and so does `shuffled_attributes`, which
    gives each image the attribute prompt of another patient's.
    """
    part = data.validation if records is None else records
    from_mask = FROM_MASK.get(prompts)
    reprompt: Reprompter | None = None
    if prompts in ("first_pass", "shuffled_attributes"):
        reprompt = FirstPass(bins=data.bins, tau=cell.prompting.tau)
    another = _attributes_of_another(data.validation, cell.seed) if prompts == "shuffled_attributes" else None
    if cell.data.stream:
        from bushpc.data import stream  # which builds on this module

        batches = stream.validation_batches(cell, data, world, part)
    else:
        batches = _cached_validation_batches(cell, data, world, part)
    for batch in batches:
        if from_mask:
            masks = (batch.mask_BKHW.amax(dim=1) > 0).numpy()
            batch = replace(batch, spatial_prompts=[from_mask(mask_HW, data.bins) for mask_HW in masks])
        if another:
            batch = replace(batch, attribute_prompts=[another(key) for key in batch.keys])
        yield replace(batch, reprompt=reprompt)


def _attributes_of_another(part: list[Record], seed: int) -> t.Callable[[str], str]:
    """Sample key → an attribute prompt that is wrong for it: another sentence, of another patient in `part`.

    Drawn by seed and key alone. Where all other patients have the same sentence or none, it is one of theirs, and
    where there is no other patient, "".
    """
    patients = {record.key: record.patient for record in part}
    sentences = {record.key: attribute_prompt(record.attributes) for record in part}
    keys = list(patients)

    def draw(key: str) -> str:
        order = np.random.default_rng(keyed_seed(seed, "shuffled_attributes", key)).permutation(len(keys))
        others = [sentences[keys[i]] for i in order if patients[keys[i]] != patients[key]]
        wrong = (sentence for sentence in others if sentence not in (sentences[key], NO_PROMPT))
        return next(wrong, others[0] if others else NO_PROMPT)

    return draw


def in_workers(batches: Dataset[t.Any], workers: int, sampler: StepSampler | None = None) -> Iterator[t.Any]:
    """What `batches` gives, made by `workers` processes; they end with this one, however it ends.

    Slurm sends its stop signals to every process of a step. Workers ignore them, as the training process saves first
    and needs its batches until then; torch's own handler would end them, and the training process with them.
    """
    start = functools.partial(_start_worker, os.getpid())
    loader = DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers, worker_init_fn=start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # workers are born with them blocked
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, worker: int) -> None:
    end_with_parent(parent=parent)
    threading.Thread(target=_leave_at_parents_word, args=(parent,), daemon=True).start()


def _leave_at_parents_word(parent: int) -> None:
    """multiprocessing ends a worker that is left over with TERM; only waiting for a signal tells who sent it."""
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def _cached_validation_batches(cell: CellConfig, data: FoldData, world: World, part: list[Record]) -> Iterator[Batch]:
    cache = open_cache(data.manifest, data.folder, cell.model.image_size, cell.loader)
    prepare = validation_preparation(cell, data)
    samples = Samples(part, cache, prepare, data.features)
    mine = list(range(len(part)))[world.rank :: world.size]
    for first in range(0, len(mine), cell.evaluate.batch_size):
        yield samples[[Draw(0, index, 0) for index in mine[first : first + cell.evaluate.batch_size]]]
