"""The card describes a dataset before it is packed: one `card.yaml` per dataset, written by whoever adds it.

It states where to download the dataset, its licence, and what its folder must contain; packing rejects a folder
that does not match. How to handle oddities of the files is the job of the dataset's source.
"""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass
from pathlib import Path

import yaml

from bushpc.config import places
from bushpc.config.read import YAML_FAILS, load_yaml
from bushpc.errors import ConfigError, DataError, unknown_name
from bushpc.files import write_atomically
from bushpc.sample import LABELS, UNLABELLED

FILE_NAME = "card.yaml"
MOST_MASK_CLASSES = 8  # a mask has one byte per pixel and one bit per class
CHANNEL_COUNTS = (3, 4)  # RGB and RGBA, the multi-channel kinds of PNG
PROJECT_SHARDS = places.shipped_shards()


@dataclass(frozen=True, kw_only=True)
class Card:
    """A dataset's description, as its publisher states it.

    name: as in `data=<name>`; also the name of its source module and of its folder in shards/.
    title, what: the publisher's title, and a paragraph on the content.
    licence, citation: what users must respect and cite.
    where: download page or DOI; empty for a dataset that bushpc generates.
    layout: names of the parts of the raw folder that the source reads, and what they are.
    mask_classes: what the masks delineate, one to eight names; classes may overlap. Bit k of a mask is class k.
    channels: names of the images' channels, three or four.
    counts: number of samples by label; empty if a parameter sets it.
    files: number of files by glob pattern relative to the raw folder.
    layouts: further layouts of the same data, by name, each with its `files` and, where they differ, its `counts`.
    columns: columns that the spreadsheet must have.
    notes: oddities of the raw files, and how the source resolves each.
    folds: where `folds.csv` and `folds_published.csv` come from.
    parameters: settings of the source, such as the phantom's; `bushpc pack` can override them.
    verified: whether source and card have been run on the publisher's real files.
    synthetic: a trained generator made the images (`bushpc generate`). They may train, but are never part of a fold.
    imported: how `bushpc shards import` reads a cohort of the user's own (`bushpc.shards.exchange.settings`).
    """

    name: str
    title: str
    what: str
    licence: str
    citation: str
    verified: bool
    where: str = ""
    layout: dict[str, str] = dataclasses.field(default_factory=dict)
    mask_classes: list[str] = dataclasses.field(default_factory=lambda: ["lesion"])
    channels: list[str] = dataclasses.field(default_factory=lambda: ["red", "green", "blue"])
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    layouts: dict[str, dict[str, dict[str, int]]] = dataclasses.field(default_factory=dict)
    columns: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    folds: dict[str, str] = dataclasses.field(default_factory=dict)
    parameters: dict[str, int | float] = dataclasses.field(default_factory=dict)
    synthetic: bool = False
    imported: dict[str, t.Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """Read `folder`/card.yaml. Raises: DataError naming the key that is missing, unknown or has the wrong type."""
        path = Path(folder) / FILE_NAME
        try:
            content = load_yaml(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; every dataset needs a card (CONTRIBUTING.md).") from None
        except YAML_FAILS as error:
            raise DataError(f"{path} cannot be read as yaml: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} must be a mapping of keys to values, not {type(content).__name__}.")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in content:
            if key not in fields:
                raise DataError(f"{path}: {unknown_name('key', str(key), fields)}")
        for name, field in fields.items():
            _check(path, name, field, content)
        card = cls(**content)
        for label in card.counts:
            if label not in (*LABELS, UNLABELLED):
                raise DataError(f"{path}: counts: {unknown_name('label', str(label), (*LABELS, UNLABELLED))}")
        for layout, content in card.layouts.items():
            if not isinstance(content, dict) or not {"files"} <= content.keys() <= {"files", "counts"}:
                raise DataError(f"{path}: layouts: {layout} must have the key files, and may have counts.")
        for key, names, counts in (
            ("mask_classes", card.mask_classes, range(1, MOST_MASK_CLASSES + 1)),
            ("channels", card.channels, CHANNEL_COUNTS),
        ):
            distinct = {name for name in names if isinstance(name, str) and name}
            if len(distinct) != len(names) or len(names) not in counts:
                raise DataError(f"{path}: {key}: {names}; it must list {counts[0]} to {counts[-1]} distinct names.")
        return card

    @classmethod
    def find(cls, name: str, folder: str | Path) -> Card:
        """The card in the shards' `folder`, else the one that the project ships for `name`.

        Raises: DataError if the card in `folder` belongs to another dataset, or if there is no card.
        """
        folder = Path(folder)
        card = cls.load(folder if (folder / FILE_NAME).exists() else PROJECT_SHARDS / name)
        if card.name != name:
            raise DataError(f"{folder / FILE_NAME} is the card of '{card.name}': '{name}' cannot be packed there.")
        return card

    def save(self, folder: Path) -> None:
        """Write `folder`/card.yaml, without the keys that are at their defaults."""
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True, width=110)
        write_atomically(folder / FILE_NAME, text)

    def content(self) -> dict[str, t.Any]:
        """What card.yaml holds."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        needed = ("name", "title", "what", "licence", "citation", "verified")
        plain = Card(**{name: given[name] for name in needed})
        return {name: value for name, value in given.items() if name in needed or value != getattr(plain, name)}

    @property
    def every_layout(self) -> list[Card]:
        """The card for each layout in which the data are met, its own first."""
        others = [dataclasses.replace(self, layouts={}, **content) for content in self.layouts.values()]  # type: ignore[arg-type]
        return [self, *others]

    @property
    def made_here(self) -> bool:
        """Whether bushpc generates the dataset from parameters, with nothing to download."""
        return not self.where

    def override(self, parameters: dict[str, int | float]) -> Card:
        """A copy of the card with some parameters changed. Raises: ConfigError for an unknown parameter."""
        for key, value in parameters.items():
            if key not in self.parameters:
                raise ConfigError(unknown_name(f"parameter of {self.name}", key, self.parameters))
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{key}={value!r} must be a number, such as {self.parameters[key]}.")
        return dataclasses.replace(self, parameters={**self.parameters, **parameters})


def _check(path: Path, name: str, field: dataclasses.Field[t.Any], content: dict[str, t.Any]) -> None:
    if name not in content:
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DataError(f"{path} lacks '{name}'.")
        return
    kind = {"str": str, "bool": bool, "list": list, "dict": dict}[str(field.type).partition("[")[0]]
    if not isinstance(content[name], kind):
        raise DataError(f"{path}: '{name}' must be a {kind.__name__}, not {type(content[name]).__name__}.")
