"""What the readers of the formats have in common: a found scan, its mask on disk, keys made of file names.

A mask is read by `Mask.read` in a worker process; bit k of the result is mask class k.
"""

from __future__ import annotations

import hashlib
import re
import typing as t
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from bushpc.shards import readers
from bushpc.shards.exchange.settings import ImportSettings

LONGEST_KEY = 80  # bytes, of which WebDataset and file systems are sure
# A single mask class of one of these names is the lesion, as in the datasets that bushpc knows; so models of one can be
# tested on the other.
LESION_NAMES = ("lesion", "tumor", "tumour", "mass", "nodule", "foreground", "1")


class Mask(t.Protocol):
    """A mask as it lies in the raw folder; picklable."""

    @property
    def files(self) -> tuple[str, ...]:
        """Its files, relative to the raw folder."""

    def read(self, folder: Path, image: str, height: int, width: int, *, lesion: bool) -> np.ndarray:
        """uint8 (height, width), bit k is class k. Raises: DataError naming file and sizes."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A scan as a format's reader finds it.

    name: of the image without its ending, with folders, as its key is made of it.
    image, frame: the file, relative to the raw folder, and the frame of a clip.
    mask: None where there is none; `looked_for` then says what was looked for.
    given: facts that the format itself states: key, patient, label, pixel_mm, fold, attributes.
    channels: of a picture that is no RGB: its number of channels.
    """

    name: str
    image: str
    mask: Mask | None
    looked_for: str = ""
    frame: int = 0
    given: Mapping[str, t.Any] = field(default_factory=dict)
    channels: int = 3


@dataclass(kw_only=True)
class Cohort:
    """What a reader finds in a raw folder.

    problems: sentences on what stops an import. left_out: on what `skip_incomplete` leaves out. notes: on what the user
    should know. table: of facts that comes with the format. files: further files that the scans depend on.
    """

    scans: list[Found]
    mask_classes: list[str] = field(default_factory=lambda: ["lesion"])
    channels: list[str] | None = None
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    table: str | None = None
    files: list[str] = field(default_factory=list)

    def incomplete(self, problem: str, settings: ImportSettings) -> None:
        """Something has no counterpart: a problem, or left out if the user wants that."""
        (self.left_out if settings.skip_incomplete else self.problems).append(problem)


@dataclass(frozen=True, kw_only=True)
class MaskFiles:
    """One or several mask pictures of the lesion: their union."""

    files: tuple[str, ...]

    def read(self, folder: Path, image: str, height: int, width: int, *, lesion: bool) -> np.ndarray:
        return readers.union(folder, image, (height, width), self.files, lesion=lesion)


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """A picture whose levels are classes. levels: of each class; a level of several classes is their overlap."""

    files: tuple[str, ...]
    levels: tuple[tuple[int, ...], ...]

    def read(self, folder: Path, image: str, height: int, width: int, *, lesion: bool) -> np.ndarray:
        mask_HW = np.zeros((height, width), np.uint8)
        known = {0, *(level for levels in self.levels for level in levels)}
        for name in self.files:
            levels_HW = readers.read_levels(folder, name, known)
            readers.check_size(image, (height, width), name, levels_HW)
            for k, levels in enumerate(self.levels):
                mask_HW[np.isin(levels_HW, levels)] |= 1 << k
        return mask_HW


def stem(path: str) -> str:
    """A path without its ending: `a/b.png` → `a/b`. Names such as `1.2.840.5` have no ending."""
    pure = PurePosixPath(path)
    ending = pure.suffix[1:]
    return str(pure.with_suffix("")) if ending and not ending.isdecimal() and len(ending) <= 5 else str(pure)


def key_of(name: str) -> str:
    """A key from a name: folders are joined with a hyphen, and what a key may not contain becomes an underscore."""
    key = re.sub(r"[.\s\\]", "_", name.replace("/", "-"))
    if len(key.encode()) <= LONGEST_KEY:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return key.encode()[: LONGEST_KEY - 13].decode(errors="ignore") + "-" + digest


def class_names(names: list[str]) -> list[str]:
    """The names of mask classes; one class that is called like a lesion is `lesion`."""
    return ["lesion"] if len(names) == 1 and names[0].strip().lower() in LESION_NAMES else names


def image_label(names: t.Iterable[str], settings: ImportSettings) -> dict[str, str] | None:
    """Name → label, if all of these names of classes are labels of images, such as benign and malignant; else None."""
    known = {label: label for label in ("benign", "malignant")} | {k.lower(): v for k, v in settings.labels.items()}
    found = {name: known.get(name.strip().lower(), "") for name in names}
    return found if found and all(found.values()) else None
