"""Dataset sources: one module per dataset turns the publisher's folder into samples. First step of the pipeline.

    raw folder ─plan→ items (cheap, in one process) ─load→ samples (decoded, in several processes)

A source module has two functions. `plan` reads lists and spreadsheets and checks that every file exists, but decodes
no pixels; `load` decodes one item. Together they resolve every oddity of the dataset, so all later steps are the
same for every dataset. See CONTRIBUTING.md, "Add a dataset".
"""

from __future__ import annotations

import importlib
import pkgutil
import typing as t
from dataclasses import dataclass
from pathlib import Path

from bushpc.errors import ConfigError, unknown_name
from bushpc.sample import Sample

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is known of a sample before its pixels are decoded. Small and picklable.

    key, label: as in the sample.
    recipe: whatever `load` of the same source needs.
    """

    key: str
    label: str
    recipe: t.Any


# Turns an item into a sample; every source module has one.
Load = t.Callable[[Item], Sample]


class Plan(t.NamedTuple):
    """All items of a dataset, and the SHA-256 of every file they are made from, by relative path.

    published: fold by key, from 0, if the publisher ships folds with the dataset; else None.
    """

    items: list[Item]
    sources: dict[str, str]
    published: dict[str, int] | None = None


class DatasetSource(t.Protocol):
    """The interface of a source module."""

    def plan(self, folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
        """List the samples. Raises: DataError naming missing files, columns and spreadsheet rows."""

    def load(self, item: Item) -> Sample:
        """Decode one sample. Raises: DataError naming the file."""


def image_of(item: Item) -> Path | None:
    """The file of an item's image; None for a dataset whose images are not single files."""
    recipe = getattr(item.recipe, "item", item).recipe  # a union wraps the items of its datasets
    image = getattr(recipe, "image", None)
    return recipe.folder / image if image else None


def names() -> list[str]:
    """The names of all datasets that can be packed."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def source(name: str) -> DatasetSource:
    """The source module of a dataset. Raises: ConfigError listing the datasets that exist."""
    if name not in names():
        raise ConfigError(unknown_name("dataset", name, names()))
    return t.cast(DatasetSource, importlib.import_module(f"{__name__}.{name}"))


def read(name: str, folder: Path | None, card: Card) -> t.Iterator[Sample]:
    """Yield every sample of a raw folder without packing it."""
    module = source(name)
    for item in module.plan(folder, card).items:
        yield module.load(item)
