"""Sources: one module a dataset, which turns the publisher's folder into samples. First step of the pipeline.

    raw folder ─plan→ items (cheap, in one process) ─load→ samples (decoded, in as many processes as there are cores)

A source module has two functions. `plan` reads lists and spreadsheets, checks that every file exists and
decodes no pixel; `load` decodes one item. All oddities of the dataset are resolved between the two, so that
everything after them is the same for every dataset. See CONTRIBUTING.md, "Add a dataset".
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
    """One sample to be: what is known of it before its pixels are decoded. Small, and can be pickled.

    key, label: those of the sample.
    recipe: whatever `load` of the same source needs.
    """

    key: str
    label: str
    recipe: t.Any


class Plan(t.NamedTuple):
    """All items of a dataset, and the SHA-256 of everything that they are made from, by relative path.

    published: fold by key, from 0, where the publisher ships folds with the dataset; None elsewhere.
    """

    items: list[Item]
    sources: dict[str, str]
    published: dict[str, int] | None = None


class Source(t.Protocol):
    """What a source module offers."""

    def plan(self, folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
        """List the samples. Raises: DataError naming missing files, columns and spreadsheet rows."""

    def load(self, item: Item) -> Sample:
        """Decode one sample. Raises: DataError naming the file."""


def names() -> list[str]:
    """Every dataset that can be packed."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def source(name: str) -> Source:
    """The source module of a dataset. Raises: ConfigError listing the datasets that exist."""
    if name not in names():
        raise ConfigError(unknown_name("dataset", name, names()))
    return t.cast(Source, importlib.import_module(f"{__name__}.{name}"))


def read(name: str, folder: Path | None, card: Card) -> t.Iterator[Sample]:
    """The simple door: every sample of a raw folder, one after the other, without packing anything."""
    module = source(name)
    for item in module.plan(folder, card).items:
        yield module.load(item)
