"""LoadedGenerator generator → synthetic shards: `bushpc generate RUN out=FOLDER n=…`.

    seed, index ─priors→ masks, captions ─generator, in batches over all ranks→ images ─write_shards→ OUT

    OUT/generate.json       everything the samples depend on; a later attempt must request the same
    OUT/.generating/        finished batches, until the shards are complete; and the lock
    OUT/contact_sheet.png   some of the images with outlined masks
    OUT/card.yaml, *.tar, manifest.json   ordinary shards, marked synthetic

The content of a batch depends only on its number, not on the ranks or on where an earlier attempt was killed. So any
number of ranks gives the same images; on a CPU bit for bit, if the ranks have the same number of threads. Batches are
written atomically and computed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import typing as t
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from bushpc.cluster.base import this_step
from bushpc.config import CellConfig, Device, Precision, flat
from bushpc.config.catalogue import is_hashed, kinds
from bushpc.config.read import plain
from bushpc.data.lineage import GENERATED, distinct, of_cell
from bushpc.dist import World, barrier, from_main_or_raise, keyed_seed, meeting
from bushpc.errors import ConfigError, DataError, TrainingError
from bushpc.evaluate.predictor import DTYPES, Member, load_cell
from bushpc.evaluate.trained import TrainedCell, TrainedRun, open_run
from bushpc.files import exclusive, read_json, write_atomically
from bushpc.generate.config import GenerateConfig
from bushpc.generate.contact_sheet import MOST, Shown, write_sheet
from bushpc.generate.priors import Drawn, Priors
from bushpc.sample import Sample
from bushpc.shards import manifest as manifests
from bushpc.shards.card import FILE_NAME as CARD_FILE
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest
from bushpc.shards.progress import Show
from bushpc.shards.sources import Item, Plan
from bushpc.shards.write import write_shards
from bushpc.train.engine import start_ranks

SHEET_FILE, LOCK_FILE, WORK_FOLDER = "contact_sheet.png", ".lock", ".generating"
# Limits noise seeds so that JSON readers that use doubles keep them exact.
SEEDS = 2**53
# At the end ranks wait for each other; a slow rank, for instance with a throttled GPU, may be hours behind.
PATIENCE_S = 12 * 3600


@dataclass(frozen=True, kw_only=True)
class GeneratorSource:
    """Selects the generator. run_dir: of its training. adapter: another run, whose adapter the generator loads.

    fold, row: select the cell of the run; adapter_fold, adapter_row: that of the adapter's run. adapter_fold None
    selects the generator's fold, if the adapter's run has it.
    """

    run_dir: Path
    fold: int | None = None
    row: str | None = None
    adapter: Path | None = None
    adapter_fold: int | None = None
    adapter_row: str | None = None

    def __post_init__(self) -> None:
        for name in ("adapter_fold", "adapter_row"):
            if self.adapter is None and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)} needs adapter=: give the adapter's run too")

    def open(self) -> list[TrainedRun]:
        """The generator's run, then the adapter's, if any; each with one cell. Raises: as `find_generator`."""
        run = find_generator(self.run_dir, self.fold, self.row)
        if self.adapter is None:
            return [run]
        like = run.cells[0].fold
        return [run, find_generator(self.adapter, self.adapter_fold, self.adapter_row, like=like, of="adapter_")]


@dataclass(frozen=True, kw_only=True)
class LoadedGenerator:
    """A loaded generator. cells, members: its own, then those of its adapter, if any.

    trained_on: the trainings of both, see `bushpc.data.lineage`.
    """

    cells: list[TrainedCell]
    members: list[Member]
    trained_on: list[dict[str, t.Any]]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 as hex of the tensors of `generator` and `adapter`."""
        return {name: each.sha256 for name, each in zip(("generator", "adapter"), self.members, strict=False)}


def generate(
    source: GeneratorSource, out: Path, config: GenerateConfig, *, world: World | None = None, show: Show | None = None
) -> Manifest | None:
    """Generate `config.n` samples as one of the ranks of `world`; finished batches are kept.

    show: reports progress on rank 0. Returns the manifest on rank 0, else None. If the tars of a finished set are
    damaged, all samples are generated again, with the same result.
    Raises: ConfigError for a run that is not a generator, an adapter of a different base, priors that do not fit this
    generator's frame, and an `out` with other content; DataError, ResumeError for incomplete runs; DataError if `out`
    cannot be written.
    """
    world = world or World()
    out, runs, priors = _understand(source, out, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with meeting(world, out.parent, this_step()):
        start_ranks(_engine_of(runs[0].cells[0].config, device), world)
    trained = _load(runs)
    stated = _stated(config, trained, device)
    with contextlib.ExitStack() as held:
        missing = from_main_or_raise(lambda: _begin(out, stated, config, held))
        if missing is None:
            return Manifest.load(out) if world.is_main else None
        if world.is_main and show and (out / manifests.FILE_NAME).exists():
            show(0, config.n, f"{out} is damaged: the samples of its shards are generated again")
        for number in missing[world.rank :: world.size]:
            drawn = [priors(index) for index in config.batches[number]]
            seeds = [noise_seed(config.seed, index) for index in config.batches[number]]
            image_BSSC = _images(trained, drawn, seeds, device)
            with _writing(out):
                _write_batch(_batch_file(out, number), image_BSSC, drawn)
            if world.is_main and show:
                there = sum(len(batch) for k, batch in enumerate(config.batches) if _batch_file(out, k).exists())
                show(there, config.n)
        barrier()
        return _finish(out, config, trained, priors, stated) if world.is_main else None


def check(source: GeneratorSource, out: Path, config: GenerateConfig) -> int:
    """Run all checks of `generate` before a job is queued, without generating or writing. Raises: as `generate`.

    It may run on a machine without the job's GPU, so for an existing set it assumes the device on which it was started.
    Returns the number of missing batches.
    """
    out, runs, _ = _understand(source, out, config)
    device = (read_json(out / GENERATED) or {}).get("device", "cpu")
    _refuse_others(out, _stated(config, _load(runs), device))
    return len(_missing(out, config) or [])


def find_generator(
    run_dir: Path, fold: int | None, row: str | None, *, like: int | None = None, of: str = ""
) -> TrainedRun:
    """The run with the selected cell. Raises: ConfigError if it is not a generator, or several cells match.

    like: the fold if none is given and the run has it. of: prefix of the words `fold` and `row` in messages.
    """
    find = functools.partial(open_run, run_dir, row=row, say=lambda line: None)
    try:
        run = find(fold=fold)
        if fold is None and like in {cell.fold for cell in run.record.trainings}:
            run = find(fold=like)
    except ConfigError as error:
        raise ConfigError(f"{error} (`bushpc generate` has {of}fold= and {of}row= for them)") from error
    cell, *others = run.cells
    model_class, config = cell.config.model_class, cell.config.model
    if not hasattr(model_class, "generate") or not config.reads("captions"):
        raise ConfigError(
            f"{run_dir} is no generator: {model_class.__name__}, as it was trained there, makes no images. Train one, "
            "`bushpc train model=tumor_generator`, and give its run"
        )
    if others:
        folds = ", ".join(str(each.fold) for each in run.cells)
        raise ConfigError(f"{run_dir} has a generator for each fold: choose one with {of}fold= (one of {folds})")
    return run


def noise_seed(seed: int, index: int) -> int:
    """The seed of the initial noise of sample `index`."""
    return keyed_seed(seed, "noise", index) % SEEDS


# --- one rank ---------------------------------------------------------------------------------------------------


def _understand(source: GeneratorSource, out: Path, config: GenerateConfig) -> tuple[Path, list[TrainedRun], Priors]:
    """Open and check everything that does not require loading a model."""
    runs = source.open()
    priors = Priors(config.priors, runs[0].cells[0].config.model.image_size, config.seed)
    out = out.resolve()
    with _writing(out):
        existing = next(folder for folder in (out, *out.parents) if folder.exists())
        if not existing.is_dir():
            raise ConfigError(f"out={out}: {existing} is a file; choose a new folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission in {existing}")
    return out, runs, priors


def _precision(cell: CellConfig, device: str) -> Precision:
    """The precision of evaluation on this device."""
    return cell.engine.precision if cell.engine.device == device else "fp32"


def _engine_of(cell: CellConfig, device: str) -> CellConfig:
    """The training's thread and kernel settings, for ranks that communicate only through files."""
    where: Device = "cpu" if device == "cpu" else "cuda"
    precision = _precision(cell, device)
    engine = dataclasses.replace(cell.engine, kind="ddp", device=where, precision=precision, hang_s=PATIENCE_S / 2)
    return dataclasses.replace(cell, engine=engine)


def _load(runs: list[TrainedRun]) -> LoadedGenerator:
    cells = [run.cells[0] for run in runs]
    members = [load_cell(cell) for cell in cells]
    model: t.Any = members[0].model
    for adapter in members[1:]:
        model.load_adapter(adapter.model, "adapter")
        model.use_adapter("adapter")
    seen = [each for run, cell in zip(runs, cells, strict=True) for each in of_cell(run.record, cell.name)]
    return LoadedGenerator(cells=cells, members=members, trained_on=distinct(seen))


def _images(trained: LoadedGenerator, drawn: list[Drawn], seeds: list[int], device: str) -> np.ndarray:
    """One batch: uint8, (B, S, S, 3)."""
    precision = _precision(trained.cells[0].config, device)
    model: t.Any = trained.members[0].model.to(device).eval()
    mask_BHW = torch.from_numpy(np.stack([each.mask_SS for each in drawn])).to(device, torch.float32)
    with torch.inference_mode(), torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
        image_BCHW: torch.Tensor = model.generate(mask_BHW, [each.caption for each in drawn], seeds)
    if not torch.isfinite(image_BCHW).all():
        raise TrainingError(
            f"the generator of {trained.cells[0].folder} produced pixels that are not finite, from seeds {seeds}: its "
            "training diverged, or engine.precision is too low"
        )
    return (image_BCHW.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _batch_file(out: Path, number: int) -> Path:
    return out / WORK_FOLDER / f"batch-{number:06d}.npz"


def _write_batch(path: Path, image_BSSC: np.ndarray, drawn: list[Drawn]) -> None:
    """Write images and the masks they were generated from, atomically."""
    stream = io.BytesIO()
    np.savez_compressed(stream, image_BSSC=image_BSSC, mask_BSS=np.stack([each.mask_SS for each in drawn]))
    write_atomically(path, stream.getvalue())


# --- rank 0: before and after -----------------------------------------------------------------------------------


def _stated(config: GenerateConfig, trained: LoadedGenerator, device: str) -> dict[str, t.Any]:
    """The settings that the samples depend on, and the generator's trainings (for `data.synthetic`)."""
    cell = trained.cells[0].config
    settings = {
        **{"device": device, "precision": _precision(cell, device)},
        # Tensors don't determine how they are used: sampler, steps, guidance, attention heads, ….
        "model": dataclasses.asdict(cell.model.standalone()),
        **dataclasses.asdict(config),
    }
    # A setting that a later version adds changes no set while it has its default.
    known = {**kinds(GenerateConfig), **kinds(type(cell.model))}
    settings = {key: value for key, value in flat(plain(settings)).items() if is_hashed(known.get(key), value)}
    stated = {**trained.hashes, "trained_on": trained.trained_on, **settings}
    return t.cast(dict[str, t.Any], json.loads(json.dumps(stated)))  # as it is read back


@contextlib.contextmanager
def _writing(out: Path) -> t.Iterator[None]:
    """Context manager: turns an OSError into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error}). Fix that and run the same command again") from error


def _refuse_others(out: Path, stated: dict[str, t.Any]) -> None:
    """Raises: ConfigError if `out` contains anything other than these samples or a part of them."""
    if not (out / GENERATED).exists() and any(out.glob("[!.]*")):
        raise ConfigError(f"out={out} contains other files: choose a new folder")
    then = read_json(out / GENERATED) or stated
    if differ := [key for key in {**then, **stated} if then.get(key) != stated.get(key)]:
        changes = "; ".join(f"{key} was {then.get(key)}, now {stated.get(key)}" for key in differ)
        raise ConfigError(f"out={out} contains other samples: {changes}. Choose another folder, or delete this one")


def _missing(out: Path, config: GenerateConfig) -> list[int] | None:
    """The missing batches; None if the set is complete."""
    try:
        manifests.verify(out, Manifest.load(out), deep=True)
        return None
    except DataError:
        pass  # not packed, or damaged: generate what is missing in either case
    return [number for number in range(len(config.batches)) if not _batch_file(out, number).exists()]


def _begin(out: Path, stated: dict[str, t.Any], config: GenerateConfig, held: contextlib.ExitStack) -> list[int] | None:
    """Lock `out` for this command; returns the result of `_missing`. Raises: ConfigError if it is in use; DataError."""
    with _writing(out):
        _refuse_others(out, stated)  # before anything is written
        (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        if not held.enter_context(exclusive(out / WORK_FOLDER / LOCK_FILE)):
            raise ConfigError(f"another process is generating into {out}: wait for it, or choose another folder")
        _refuse_others(out, stated)  # another process may have started in between
        write_atomically(out / GENERATED, json.dumps(stated, indent=1))
        return _missing(out, config)


def _finish(
    out: Path, config: GenerateConfig, trained: LoadedGenerator, priors: Priors, stated: dict[str, t.Any]
) -> Manifest:
    """Batches → contact sheet, card and shards, the manifest last."""
    # Samples come in order. The cache is local, as another set in this process may have had the same paths.
    load = functools.partial(_load_sample, functools.lru_cache(maxsize=2)(_read_batch))
    items = [_item(out, config, trained, priors, index) for index in range(config.n)]
    with _writing(out):
        samples = [load(item) for item in items[:MOST]]
        captions = [priors(index).caption for index in range(len(samples))]
        scans = [Shown(s.image_HWC, s.mask_HW, caption) for s, caption in zip(samples, captions, strict=True)]
        title = f"{len(scans)} of {config.n} synthetic scans, generator {trained.hashes['generator'][:12]}"
        write_sheet(scans, out / SHEET_FILE, title)
        card = _card(config, trained, items)
        content = {key: value for key, value in dataclasses.asdict(card).items() if value or key == "verified"}
        write_atomically(out / CARD_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        settings = json.dumps(stated, sort_keys=True)
        sources = {**trained.hashes, "settings": hashlib.sha256(settings.encode()).hexdigest()}
        manifest = write_shards(card, out, Plan(items, sources), load)
        for path in (out / WORK_FOLDER).iterdir():
            if path.name != LOCK_FILE:  # this process holds the lock
                path.unlink()
    return manifest


def _item(out: Path, config: GenerateConfig, trained: LoadedGenerator, priors: Priors, index: int) -> Item:
    drawn = priors(index)
    number, place = divmod(index, config.batch_size)
    attributes = {
        **drawn.attributes,
        "seed": noise_seed(config.seed, index),
        **{name: sha256[:16] for name, sha256 in trained.hashes.items()},
    }
    return Item(key=f"synthetic{index:06d}", label=drawn.label, recipe=(_batch_file(out, number), place, attributes))


def _load_sample(read_batch: t.Callable[[Path], tuple[np.ndarray, np.ndarray]], item: Item) -> Sample:
    file, place, attributes = item.recipe
    image_BSSC, mask_BSS = read_batch(file)
    return Sample(
        key=item.key,
        patient=item.key,
        label=item.label,
        image_HWC=image_BSSC[place],
        mask_HW=mask_BSS[place],
        attributes=attributes,
    )


def _read_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as batch:
        return batch["image_BSSC"], batch["mask_BSS"]


def _card(config: GenerateConfig, trained: LoadedGenerator, items: list[Item]) -> Card:
    """The card, named after the data of the last training (the adapter's, if there is one)."""
    data, model = trained.cells[-1].config.data.name, trained.cells[0].config.model_class.__name__
    runs = [f"run {c.folder.run.name}, fold {c.fold}, step {c.step}" for c in trained.cells]
    licences = {c.config.data.name: _licence(c) for c in trained.cells}
    listed = "; ".join(f"{name}: {licence}" for name, licence in licences.items())
    return Card(
        name=f"synthetic_{data}",
        title=f"{config.n} synthetic scans after {data}",
        what=f"{model} ({', adapted by '.join(runs)}) generated the images from masks and captions drawn from a "
        "clinical prior; the dataset's masks are these masks.",
        licence=f"that of the generator's training scans ({listed}) and of its initial weights",
        citation="Pan et al., Clinical Prior-Guided Tumor Generation for Breast Ultrasound, MICCAI 2025",
        verified=True,
        counts=dict(Counter(item.label for item in items)),
        notes=["Synthetic: for training only. bushpc accepts it as data.synthetic=, but never in a fold."],
        synthetic=True,
    )


def _licence(cell: TrainedCell) -> str:
    """The licence of the cell's training data."""
    data = cell.config.data
    try:
        return Card.find(data.name, data.folder).licence
    except DataError:  # no longer here, and not one of the project's datasets
        return "see there"
