"""The card: what a dataset is before it is packed. One `card.yaml` a dataset, written by whoever adds it.

The card says where a human gets the dataset and under which licence, and what its folder must hold; packing
refuses a folder that does not match. Everything odd about the files themselves lives in the dataset's source.
"""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass
from pathlib import Path

import yaml

from bushpc.errors import ConfigError, DataError, unknown_name
from bushpc.sample import LABELS, UNLABELLED

FILE_NAME = "card.yaml"
MOST_MASK_CLASSES = 8  # a mask is a byte with a bit for each
CHANNEL_COUNTS = (3, 4)  # what a PNG with colours holds
PROJECT_SHARDS = Path(__file__).resolve().parents[2] / "shards"


@dataclass(frozen=True, kw_only=True)
class Card:
    """A dataset's facts, as its publisher states them.

    name: as in `data=<name>`; also the name of its source module and of its folder below shards/.
    title, what: the publisher's title, and one paragraph on what it contains.
    licence, citation: what a user must respect and cite.
    where: page or DOI where a human downloads it; empty for a dataset that is made here.
    layout: names of the parts of the raw folder that the source looks for, and what they are.
    mask_classes: what the masks delineate, one to eight names; they may overlap. Bit k of a mask is class k.
    channels: what the images' channels are, three or four names.
    counts: number of samples by label; empty where it is a parameter.
    files: number of files by glob pattern relative to the raw folder.
    columns: columns that the spreadsheet must have.
    notes: oddities of the raw files, and how the source resolves each.
    folds: where `folds.csv` and `folds_published.csv` come from.
    parameters: settings of the source, such as the phantom's; `bushpc pack` can override them.
    verified: whether source and card have been run on the publisher's real files.
    synthetic: its images are a trained generator's (`bushpc generate`): they may train, and are never in a fold.
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
    columns: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    folds: dict[str, str] = dataclasses.field(default_factory=dict)
    parameters: dict[str, int | float] = dataclasses.field(default_factory=dict)
    synthetic: bool = False

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """Read `folder`/card.yaml. Raises: DataError naming the key that is missing, unknown or of a wrong type."""
        path = Path(folder) / FILE_NAME
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; every dataset has a card there (CONTRIBUTING.md).") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path} cannot be read as yaml: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} must hold keys and values, not {type(content).__name__}.")
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
        for key, names, counts in (
            ("mask_classes", card.mask_classes, range(1, MOST_MASK_CLASSES + 1)),
            ("channels", card.channels, CHANNEL_COUNTS),
        ):
            distinct = {name for name in names if isinstance(name, str) and name}
            if len(distinct) != len(names) or len(names) not in counts:
                raise DataError(
                    f"{path}: {key}: {names}; {counts[0]} to {counts[-1]} different names are needed, each once."
                )
        return card

    @classmethod
    def find(cls, name: str, folder: str | Path) -> Card:
        """The card in `folder`, where the shards will be; else the one that the project ships for `name`.

        Raises: DataError for a card in `folder` that is another dataset's, or that does not exist at all.
        """
        folder = Path(folder)
        card = cls.load(folder if (folder / FILE_NAME).exists() else PROJECT_SHARDS / name)
        if card.name != name:
            raise DataError(f"{folder / FILE_NAME} is the card of '{card.name}': '{name}' cannot be packed there.")
        return card

    @property
    def made_here(self) -> bool:
        """Made from parameters instead of downloaded."""
        return not self.where

    def override(self, parameters: dict[str, int | float]) -> Card:
        """The same card with some of its parameters changed. Raises: ConfigError for one that it does not have."""
        for key, value in parameters.items():
            if key not in self.parameters:
                raise ConfigError(unknown_name(f"parameter of {self.name}", key, self.parameters))
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{key}={value!r}: a number is needed, like {self.parameters[key]}.")
        return dataclasses.replace(self, parameters={**self.parameters, **parameters})


def _check(path: Path, name: str, field: dataclasses.Field[t.Any], content: dict[str, t.Any]) -> None:
    if name not in content:
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DataError(f"{path} lacks '{name}'.")
        return
    kind = {"str": str, "bool": bool, "list": list, "dict": dict}[str(field.type).partition("[")[0]]
    if not isinstance(content[name], kind):
        raise DataError(f"{path}: '{name}' must be a {kind.__name__}, not {type(content[name]).__name__}.")
