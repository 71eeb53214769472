"""How a cohort's files and columns map to scans: words of `bushpc shards import`, and `imported:` of the card.

words ─of_words→ ImportSettings ─to_card→ card.yaml ─of_card→ ImportSettings

Settings and card have the same names, so the card that an import writes repeats it.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bushpc.errors import ConfigError, DataError, unknown_name
from bushpc.sample import LABELS, UNLABELLED
from bushpc.shards.card import MOST_MASK_CLASSES

KINDS = ("folder", "nnunet", "coco", "dicom")
NONE, ALL, FOLDER, NAME = "none", "all", "folder", "name:"
ALL_LABELS = (*LABELS, UNLABELLED)


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What the user says of a cohort.

    kind: layout of the raw folder.
    images: folder of the images, relative to the raw folder. masks: folder of the masks, or a pattern of their paths in
        which {name} is the image's name, such as `masks/{name}_seg*.png`. None: found.
    annotations: the COCO file.
    table: CSV or spreadsheet with a row per image.
    image, mask, pixel_mm, fold: columns of the table.
    patients, label: a column, `folder` (the image's folder), `name:REGEX` (its first group in the image's name), or for
        patients `none`: not known.
    labels: value in the data → one of bushpc's labels.
    attributes: column → name of the attribute; None takes the usual clinical descriptors.
    classes: mask class → its level in the masks; for COCO and DICOM, which have names, the level is not used.
    without_mask: `normal` if an image without a mask is a normal scan; else it is a problem.
    skip_incomplete: leave out images without a row or mask, and rows without an image, instead of stopping.
    grey_max, mask_threshold: as for `bushpc pack`.
    """

    kind: str
    images: str | None = None
    masks: str | None = None
    annotations: str | None = None
    table: str | None = None
    image: str | None = None
    mask: str | None = None
    patients: str | None = None
    label: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] | None = None
    classes: dict[str, int] = field(default_factory=dict)
    pixel_mm: str | None = None
    fold: str | None = None
    without_mask: str = "problem"
    skip_incomplete: bool = False
    grey_max: float | None = None
    mask_threshold: int | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("kind", self.kind, KINDS))
        if self.without_mask not in ("problem", "normal"):
            raise ConfigError(unknown_name("without_mask", self.without_mask, ("problem", "normal")))
        for value, label in self.labels.items():
            if label not in ALL_LABELS:
                raise ConfigError(f"labels={value}:{label}: {unknown_name('label', label, ALL_LABELS)}")
        levels = list(self.classes.values())
        if len(set(levels)) != len(levels) or not all(1 <= level <= 255 for level in levels):
            raise ConfigError(f"classes={_pairs(self.classes)}: each class needs a level of its own, from 1 to 255.")
        if len(levels) > MOST_MASK_CLASSES:
            raise ConfigError(f"classes={_pairs(self.classes)}: at most {MOST_MASK_CLASSES} mask classes are possible.")
        for name in ("patients", "label"):
            pattern(name, getattr(self, name))

    def to_card(self) -> dict[str, t.Any]:
        """The settings that differ from the defaults."""
        given = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        plain = ImportSettings(kind=self.kind)
        return {name: value for name, value in given.items() if name == "kind" or value != getattr(plain, name)}

    @classmethod
    def of_card(cls, imported: Mapping[str, t.Any], path: Path) -> ImportSettings:
        """From `imported:` of a card. Raises: DataError naming the file and the key."""
        fields = {one.name: one for one in dataclasses.fields(cls)}
        kinds = {"str": (str,), "dict": (dict,), "bool": (bool,), "float": (int, float), "int": (int,)}
        for name, value in imported.items():
            if name not in fields:
                raise DataError(f"{path}: imported: {unknown_name('key', str(name), fields)}")
            kind = kinds[re.match(r"\w+", str(fields[name].type))[0]]  # type: ignore[index]
            if not isinstance(value, kind):
                raise DataError(f"{path}: imported: {name} must be a {kind[0].__name__}, not {type(value).__name__}.")
        if "kind" not in imported:
            raise DataError(f"{path}: imported: lacks 'kind': one of {', '.join(KINDS)}.")
        texts = {
            name: {str(key): value for key, value in imported[name].items()}
            for name in ("labels", "attributes", "classes")
            if isinstance(imported.get(name), dict)
        }
        try:
            return cls(**{**imported, **texts})
        except (ConfigError, TypeError) as error:
            raise DataError(f"{path}: imported: {error}") from error


def pattern(word: str, value: str | None) -> re.Pattern[str] | None:
    """The pattern of `name:REGEX`; None for anything else. Raises: ConfigError unless it has one group."""
    if value is None or not value.startswith(NAME):
        return None
    example = f"{word}='name:^(P[0-9]+)_' takes P012 from P012_left.png"
    try:
        compiled = re.compile(value.removeprefix(NAME))
    except re.error as error:
        raise ConfigError(f"{word}={value}: not a regular expression ({error}). Example: {example}") from None
    if compiled.groups != 1:
        raise ConfigError(f"{word}={value}: it must have one group in brackets. Example: {example}")
    return compiled


def pairs(word: str, text: str, example: str) -> dict[str, str]:
    """`a:b,c:d` → {a: b, c: d}; the last colon counts. Raises: ConfigError."""
    found: dict[str, str] = {}
    for part in text.split(","):
        value, colon, meaning = part.strip().rpartition(":")
        if not colon or not value or not meaning or value in found:
            raise ConfigError(f"{word}={text}: '{part.strip()}' must be VALUE:MEANING, once. Example: {example}")
        found[value.strip()] = meaning.strip()
    return found


def _pairs(values: Mapping[str, t.Any]) -> str:
    return ",".join(f"{key}:{value}" for key, value in values.items())
