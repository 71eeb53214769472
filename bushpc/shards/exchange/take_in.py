"""Import a cohort: look at every scan first, then pack all of them or nothing.

raw folder, settings ─examine→ Examined (a page, or problems) ─take_in→ card, shards, folds
"""

from __future__ import annotations

import contextvars
import dataclasses
import re
import typing as t
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.config import config_names, places
from bushpc.errors import BushpcError, ConfigError, DataError
from bushpc.files import write_atomically
from bushpc.sample import LABELS, UNLABELLED
from bushpc.shards import encode, raw_folder, readers, sources, work_folder, write
from bushpc.shards.card import FILE_NAME, Card
from bushpc.shards.exchange import cohort
from bushpc.shards.exchange.settings import NONE, ImportSettings
from bushpc.shards.manifest import Manifest
from bushpc.shards.progress import Show, silent
from bushpc.shards.split import FILE_BY_SOURCE

VALID_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Look:
    """A scan that was decoded. problem: what is wrong with it; "" if nothing is. lesion_share: of its pixels."""

    item: sources.Item
    height: int = 0
    width: int = 0
    lesion_share: float = 0.0
    pixel_mm: float | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What an import would pack. problems: stop it; of the folder as a whole first, then of single scans."""

    folder: Path
    card: Card
    how: readers.Reading
    survey: cohort.Survey
    looks: list[Look]

    @property
    def problems(self) -> list[str]:
        return [*self.survey.problems, *(look.problem for look in self.looks if look.problem)]

    @property
    def labels(self) -> dict[str, int]:
        counts = Counter(look.item.label for look in self.looks)
        return {label: counts[label] for label in (*LABELS, UNLABELLED) if counts[label]}

    @property
    def patients(self) -> int | None:
        """Number of patients; None where they are declared unknown."""
        if self.card.imported.get("patients") == NONE:
            return None
        return len({look.item.recipe.patient for look in self.looks})

    def load(self, look: Look) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask of a scan, decoded once more. Raises: DataError."""
        with readers.reading(self.how):
            sample = cohort.load(look.item)
        return sample.image_HWC, sample.mask_HW


def check_name(name: str) -> None:
    """Raises: ConfigError if no cohort can have this name."""
    if not VALID_NAME.fullmatch(name):
        raise ConfigError(f"data={name}: a name has 1 to 40 letters, digits and underscores, and begins with a letter.")
    if name in sources.names():
        raise ConfigError(
            f"data={name} is a dataset that bushpc knows, with a layout of its own: `bushpc pack data={name} src=…` "
            "packs it. Choose another name for a cohort of yours."
        )
    config = places.config_file(f"data/{name}")
    if name in config_names("data") and config and not config.read_text(encoding="utf-8").startswith(CONFIG_HEAD):
        raise ConfigError(f"data={name}: {config} already describes another dataset. Choose another name.")


def examine(
    name: str,
    src: Path,
    settings: ImportSettings,
    about: t.Mapping[str, str],
    *,
    workers: int = 1,
    progress: Show | None = None,
) -> Examined:
    """Find and decode every scan of the raw folder; writes nothing. about: title, licence and the like for the card.

    Raises: DataError for a folder that is not of the layout; ConfigError for a number that cannot be.
    """
    show = progress or silent
    if not src.is_dir():
        raise DataError(f"src={src} is not a folder.")
    threshold = settings.mask_threshold
    if threshold is not None and not 1 <= threshold <= 255:
        raise ConfigError(f"mask_threshold={threshold}: it must be a level from 1 to 255.")
    how = readers.Reading(mask_threshold=threshold)
    with work_folder.typed_errors(src), readers.reading(how):
        survey = cohort.find(src, settings)
    if survey.items:
        how = raw_folder.how_to_read(survey.items, cohort.load, how, settings.grey_max, show)
    card = _card(name, settings, survey, about)
    looks = _look(survey.items, card, how, workers, show)
    return Examined(folder=src, card=card, how=how, survey=survey, looks=looks)


def take_in(examined: Examined, out: Path, *, workers: int = 1, progress: Show | None = None) -> Manifest:
    """Write card and shards to `out`. Raises: DataError if there are problems; nothing is then written."""
    readers.raise_if_any(examined.folder, examined.problems)
    card, survey = examined.card, examined.survey
    if (out / FILE_NAME).exists() and (before := Card.load(out)).name != card.name:
        raise DataError(f"{out} holds {before.name}: choose another folder with out=.")
    plan = write.with_reading(cohort.planned(examined.folder, survey), card, examined.how)
    with work_folder.typed_errors(out):
        card.save(out)
    return write.write_shards(card, out, plan, cohort.load, workers=workers, progress=progress, how=examined.how)


CONFIG_HEAD = "# Imported by `bushpc shards import`."


def write_config(name: str, out: Path) -> Path:
    """The yaml that makes `data=<name>` work, in the first config folder that the user may write to."""
    path = places.config_file(f"data/{name}") or places.new_config_folder() / "data" / f"{name}.yaml"
    usual = out.resolve() == (places.home() / "shards" / name).resolve()
    root = "" if usual else f"root: {out.resolve()}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{CONFIG_HEAD} Card: {out / FILE_NAME}.\nname: {name}\n{root}")
    return path


def _card(name: str, settings: ImportSettings, survey: cohort.Survey, about: t.Mapping[str, str]) -> Card:
    labels = Counter(item.label for item in survey.items)
    notes = [*survey.notes, *survey.left_out]
    if settings.patients == NONE:
        notes.insert(
            0,
            "Patients are not known (patients=none). Each scan counts as a patient, so scans of one patient may lie on "
            "both sides of a fold, and results may be too good.",
        )
    card = Card(
        name=name,
        title=about.get("title") or name,
        what=about.get("what") or f"A cohort that was imported from a {settings.kind} layout.",
        licence=about.get("licence") or "not stated",
        citation=about.get("citation") or "not stated",
        where=about.get("where") or "imported; not published",
        verified=True,
        counts={label: labels[label] for label in (*LABELS, UNLABELLED) if labels[label]},
        mask_classes=survey.mask_classes,
        notes=notes,
        folds={FILE_BY_SOURCE["published"]: "came with the cohort"} if survey.folds else {},
        imported=settings.to_card(),
    )
    return dataclasses.replace(card, channels=survey.channels) if survey.channels else card


def _look(items: list[sources.Item], card: Card, how: readers.Reading, workers: int, show: Show) -> list[Look]:
    """Decode all scans in threads: Pillow and numpy let others work meanwhile."""

    def one(item: sources.Item) -> Look:
        with readers.reading(how):
            return _look_at(item, card)

    looks: list[Look] = []
    context = contextvars.copy_context()
    with ThreadPoolExecutor(workers) as pool:
        for look in pool.map(lambda item: context.copy().run(one, item), items):
            looks.append(look)
            show(len(looks), len(items))
    return looks


def _look_at(item: sources.Item, card: Card) -> Look:
    try:
        sample = cohort.load(item)
        encode.check_sample(sample, card)
    except BushpcError as error:
        return Look(item=item, problem=str(error))
    except Exception as error:
        return Look(item=item, problem=f"{item.recipe.image} cannot be read ({type(error).__name__}: {error})")
    height, width = sample.mask_HW.shape
    share = float(np.count_nonzero(sample.mask_HW)) / (height * width)
    return Look(item=item, height=height, width=width, lesion_share=share, pixel_mm=sample.pixel_mm)
