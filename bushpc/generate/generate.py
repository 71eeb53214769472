"""Trained generator → synthetic shards: `bushpc generate RUN out=FOLDER n=…`.

    seed, index ─priors→ masks, captions ─generator, in batches over all ranks→ images ─write_shards→ OUT

    OUT/generate.json       what the samples depend on; another attempt must ask for the same
    OUT/.generating/        batches that are done, until the shards are whole
    OUT/contact_sheet.png   some of the images, masks outlined
    OUT/card.yaml, *.tar, manifest.json   ordinary shards, marked synthetic

What is in a batch follows from its number alone: not from the ranks, nor from where an earlier attempt was killed. So
any number of ranks makes the same images. A batch lies on the disk whole or not at all, and is made once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import typing as t
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from bushpc.config import CellConfig, flat
from bushpc.dist import World, barrier, from_main_or_raise, keyed_seed, meeting
from bushpc.errors import ConfigError, TrainingError
from bushpc.evaluate.predictor import DTYPES, Member, TrainedCell, TrainedRun, load_cell, open_run, trained_on
from bushpc.files import exclusive, read_json, write_atomically
from bushpc.generate.priors import Drawn, Priors, PriorsConfig
from bushpc.generate.sheet import MOST, Shown, write_sheet
from bushpc.sample import Sample
from bushpc.shards import manifest as manifests
from bushpc.shards.card import FILE_NAME as CARD_FILE
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest
from bushpc.shards.progress import Show
from bushpc.shards.sources import Item, Plan
from bushpc.shards.write import write_shards
from bushpc.train.engine import start_ranks

SETTINGS_FILE, SHEET_FILE, LOCK_FILE, WORK_FOLDER = "generate.json", "contact_sheet.png", ".lock", ".generating"
# Noise seeds stay exact where a reader takes numbers for doubles.
SEEDS = 2**53
# At the end ranks wait for each other: one that is slower, or lost its GPU's clock, may be hours behind.
PATIENCE_S = 12 * 3600


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """`configs/generate.yaml` documents each field."""

    n: int
    seed: int
    batch_size: int
    priors: PriorsConfig

    def __post_init__(self) -> None:
        for name, least, most in (("n", 1, 10**6), ("batch_size", 1, 10**6), ("seed", 0, 2**63 - 1)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is {least} or more, up to {most}")

    @property
    def batches(self) -> list[range]:
        """The indices of every batch."""
        return [range(first, min(first + self.batch_size, self.n)) for first in range(0, self.n, self.batch_size)]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's generator, loaded. adapter: taken over from another run, of the same base.

    trained_on: what either learnt from, see `bushpc.evaluate.predictor.trained_on`.
    """

    cell: TrainedCell
    member: Member
    adapter: Member | None
    trained_on: list[dict[str, t.Any]]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 as hex of all that makes the images, `generator` and `adapter`."""
        adapter = {"adapter": self.adapter.sha256} if self.adapter else {}
        return {"generator": self.member.sha256, **adapter}


def generate(
    run_dir: Path,
    out: Path,
    config: GenerateConfig,
    *,
    adapter: Path | None = None,
    fold: int | None = None,
    row: str | None = None,
    world: World | None = None,
    show: Show | None = None,
) -> Manifest | None:
    """Make `config.n` samples with the generator of a run, as one of the ranks of `world`; done ones are kept.

    adapter: another run, whose adapter the generator takes over. fold, row: which cell, of both runs.
    show: told how many samples there are, on rank 0. Returns the manifest, on the other ranks None.
    Raises: ConfigError for a run that is no generator, an adapter of another base, priors that cannot be drawn in this
    generator's frame, and an `out` that holds anything else; DataError, ResumeError for runs that are not whole.
    """
    world = world or World()
    run = find_generator(run_dir, fold, row)
    adapting = find_generator(adapter, fold, row) if adapter else None
    cell = run.cells[0]
    priors = Priors(config.priors, cell.config.model.image_size, config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = out.resolve()
    with meeting(world, out.parent):
        start_ranks(_engine_of(cell.config, device), world)
    trained = _load(run, adapting)
    with contextlib.ExitStack() as held:
        missing = from_main_or_raise(lambda: _begin(out, _stated(config, trained), config, held))
        for number in missing[world.rank :: world.size]:
            drawn = [priors(index) for index in config.batches[number]]
            seeds = [noise_seed(config.seed, index) for index in config.batches[number]]
            image_BSSC = _images(trained, drawn, seeds, device)
            _write_batch(_batch_file(out, number), image_BSSC, drawn)
            if world.is_main and show:
                there = sum(len(batch) for k, batch in enumerate(config.batches) if _batch_file(out, k).exists())
                show(there, config.n)
        barrier()
        return _finish(out, config, trained, priors) if world.is_main else None


def find_generator(run_dir: Path, fold: int | None, row: str | None) -> TrainedRun:
    """The run with the one cell that is meant. Raises: ConfigError if it makes no images, or is one of several."""
    run = open_run(run_dir, fold, row, say=lambda line: None)
    cell, *others = run.cells
    model_class, config = cell.config.model_class, cell.config.model
    if not hasattr(model_class, "generate") or "captions" not in model_class.needs(config):
        raise ConfigError(
            f"{run_dir} is no generator: {model_class.__name__}, as it was trained there, makes no images. Train one, "
            "`bushpc train model=tumor_generator`, and give its run"
        )
    if others:
        folds = ", ".join(str(each.fold) for each in run.cells)
        raise ConfigError(f"{run_dir} has several generators, one of each fold: choose one with fold=, of {folds}")
    return run


def noise_seed(seed: int, index: int) -> int:
    """Of the noise that sample `index` grows from."""
    return keyed_seed(seed, "noise", index) % SEEDS


# --- one rank ---------------------------------------------------------------------------------------------------


def _engine_of(cell: CellConfig, device: str) -> CellConfig:
    """The training's settings of threads and kernels, for ranks that share nothing but files."""
    engine = dataclasses.replace(cell.engine, kind="ddp", device=device, hang_s=PATIENCE_S / 2)
    return dataclasses.replace(cell, engine=engine)


def _load(run: TrainedRun, adapting: TrainedRun | None) -> Trained:
    member, adapter = load_cell(run.cells[0]), load_cell(adapting.cells[0]) if adapting else None
    if adapter:
        model: t.Any = member.model
        model.load_adapter(adapter.model, adapter.name)
        model.use_adapter(adapter.name)
    seen = [each for of in (run, adapting) if of for each in trained_on(of, of.cells[0])]
    distinct = [each for place, each in enumerate(seen) if each not in seen[:place]]
    return Trained(cell=run.cells[0], member=member, adapter=adapter, trained_on=distinct)


def _images(trained: Trained, drawn: list[Drawn], seeds: list[int], device: str) -> np.ndarray:
    """One batch: uint8, (B, S, S, 3)."""
    engine = trained.cell.config.engine
    precision = engine.precision if engine.device == device else "fp32"  # as in evaluation, where that was
    model: t.Any = trained.member.model.to(device).eval()
    mask_BHW = torch.from_numpy(np.stack([each.mask_SS for each in drawn])).to(device, torch.float32)
    with torch.inference_mode(), torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
        image_BCHW: torch.Tensor = model.generate(mask_BHW, [each.caption for each in drawn], seeds)
    if not torch.isfinite(image_BCHW).all():
        raise TrainingError(
            f"the generator of {trained.cell.folder} made pixels that are no numbers, from seeds {seeds}: it has "
            "diverged, or engine.precision is too coarse for it"
        )
    return (image_BCHW.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _batch_file(out: Path, number: int) -> Path:
    return out / WORK_FOLDER / f"batch-{number:06d}.npz"


def _write_batch(path: Path, image_BSSC: np.ndarray, drawn: list[Drawn]) -> None:
    """Images with the very masks that they were made by, whole or not at all."""
    stream = io.BytesIO()
    np.savez_compressed(stream, image_BSSC=image_BSSC, mask_BSS=np.stack([each.mask_SS for each in drawn]))
    write_atomically(path, stream.getvalue())


# --- rank 0: before and after -----------------------------------------------------------------------------------


def _stated(config: GenerateConfig, trained: Trained) -> dict[str, t.Any]:
    """What the samples depend on, by the words that set it; and for `data.synthetic` what the generator has seen."""
    image_size = trained.cell.config.model.image_size
    settings = flat(dataclasses.asdict(config))
    return {**trained.hashes, "trained_on": trained.trained_on, "image_size": image_size, **settings}


def _begin(out: Path, stated: dict[str, t.Any], config: GenerateConfig, held: contextlib.ExitStack) -> list[int]:
    """Hold `out` for this command; the batches that are missing there. Raises: ConfigError if it is anyone else's."""
    if not (out / SETTINGS_FILE).exists() and any(out.glob("[!.]*")):
        raise ConfigError(f"out={out} holds other files: choose a new folder")
    (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    if not held.enter_context(exclusive(out / WORK_FOLDER / LOCK_FILE)):
        raise ConfigError(f"another process generates into {out}: wait for it, or choose another folder")
    stated = json.loads(json.dumps(stated))  # as it will be read
    then = read_json(out / SETTINGS_FILE) or stated
    if differ := [key for key in {**then, **stated} if then.get(key) != stated.get(key)]:
        changes = "; ".join(f"{key} was {then.get(key)}, now {stated.get(key)}" for key in differ)
        raise ConfigError(f"out={out} holds other samples: {changes}. Choose another folder, or delete this one")
    write_atomically(out / SETTINGS_FILE, json.dumps(stated, indent=1))
    if (out / manifests.FILE_NAME).exists():
        return []
    return [number for number in range(len(config.batches)) if not _batch_file(out, number).exists()]


def _finish(out: Path, config: GenerateConfig, trained: Trained, priors: Priors) -> Manifest:
    """Batches → contact sheet, card and shards, the manifest last."""
    work = out / WORK_FOLDER
    if not (out / manifests.FILE_NAME).exists():
        items = [_item(out, config, trained, priors, index) for index in range(config.n)]
        samples = [_load_sample(item) for item in items[:MOST]]
        captions = [priors(index).caption for index in range(len(samples))]
        scans = [Shown(s.image_HWC, s.mask_HW, said) for s, said in zip(samples, captions, strict=True)]
        title = f"{len(scans)} of {config.n} synthetic scans, generator {trained.member.sha256[:12]}"
        write_sheet(scans, out / SHEET_FILE, title)
        card = _card(config, trained, items)
        content = {key: value for key, value in dataclasses.asdict(card).items() if value or key == "verified"}
        write_atomically(out / CARD_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        settings = json.dumps(flat(dataclasses.asdict(config)), sort_keys=True)
        sources = {**trained.hashes, "settings": hashlib.sha256(settings.encode()).hexdigest()}
        write_shards(card, out, Plan(items, sources), _load_sample)
    shutil.rmtree(work)
    return Manifest.load(out)


def _item(out: Path, config: GenerateConfig, trained: Trained, priors: Priors, index: int) -> Item:
    drawn = priors(index)
    number, place = divmod(index, config.batch_size)
    attributes = {
        **drawn.attributes,
        "seed": noise_seed(config.seed, index),
        **{name: sha256[:16] for name, sha256 in trained.hashes.items()},
    }
    return Item(key=f"synthetic{index:06d}", label=drawn.label, recipe=(_batch_file(out, number), place, attributes))


def _load_sample(item: Item) -> Sample:
    file, place, attributes = item.recipe
    image_BSSC, mask_BSS = _read_batch(file)
    return Sample(
        key=item.key,
        patient=item.key,
        label=item.label,
        image_HWC=image_BSSC[place],
        mask_HW=mask_BSS[place],
        attributes=attributes,
    )


@functools.lru_cache(maxsize=2)  # samples come in order
def _read_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as batch:
        return batch["image_BSSC"], batch["mask_BSS"]


def _card(config: GenerateConfig, trained: Trained, items: list[Item]) -> Card:
    cell = trained.cell
    data, model = cell.config.data.name, cell.config.model_class.__name__
    run = f"{cell.folder.parent.parent.name}, fold {cell.fold}, step {cell.step}"
    return Card(
        name=f"synthetic_{data}",
        title=f"{config.n} synthetic scans after {data}",
        what=f"{model} (run {run}) made the images by masks and captions of a clinical prior; the masks are those.",
        licence=f"see {data}, whose scans trained the generator, and the pretrained weights it started from",
        citation="Pan et al., Clinical Prior-Guided Tumor Generation for Breast Ultrasound, MICCAI 2025",
        verified=True,
        counts=dict(Counter(item.label for item in items)),
        notes=["Synthetic: for training only. bushpc takes it as data.synthetic=, and never into a fold."],
        synthetic=True,
    )
