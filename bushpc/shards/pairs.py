"""Images and masks that belong together by their names: the layout that many publishers share.

    folder + name patterns ─pair→ images with their masks ─class_folders→ plan of a dataset with one folder per class

Sources use it: BUSI, BUS-UC, BUID, BUSC, BUSIS.
"""

from __future__ import annotations

import re
import typing as t
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from bushpc.errors import DataError
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a dataset names its files. Case does not matter; `{label}` stands for the label of a class folder.

    image, mask: regular expressions of a path below the class folder. Their group `scan` tells which belong together.
    like: an image and its mask, for the error about other pictures.
    unread: regular expression of pictures that the dataset has, too.
    """

    image: str
    mask: str
    like: str
    unread: str = r"(?!)"  # matches nothing

    def of(self, label: str) -> Names:
        """The names in the folder of one class."""
        image, mask, like, unread = (
            text.replace("{label}", label) for text in (self.image, self.mask, self.like, self.unread)
        )
        return Names(image=image, mask=mask, like=like, unread=unread)


class Pair(t.NamedTuple):
    """An image and its masks, relative to the raw folder."""

    image: str
    masks: tuple[str, ...]


def pair(folder: Path, place: str, names: Names) -> tuple[dict[str, Pair], list[str]]:
    """The scans in the folder `place`, or in the raw folder, by group `scan`; a text for each picture that fits none.

    A number is one scan however many zeros it begins with: 001 and 1.
    """
    images: dict[str, list[str]] = defaultdict(list)
    masks: dict[str, list[str]] = defaultdict(list)
    problems = []
    for path in tree.glob(folder, f"{place}/**/*" if place else "**/*"):
        if path.suffix.lower() not in PICTURES:
            continue
        name, file = path.relative_to(folder / place).as_posix(), path.relative_to(folder).as_posix()
        while place and name.startswith(f"{place}/"):  # archives double their folders
            name = name.removeprefix(f"{place}/")
        for pattern, found in ((names.mask, masks), (names.image, images)):
            if match := re.fullmatch(pattern, name, re.IGNORECASE):
                found[_scan(match)].append(file)
                break
        else:
            if not re.fullmatch(names.unread, name, re.IGNORECASE):
                problems.append(f"{file}: names must be like {names.like}")
    problems += [f"{files[0]} has no mask" for scan, files in images.items() if scan not in masks]
    problems += [f"{files[0]} is the mask of no image" for scan, files in masks.items() if scan not in images]
    problems += [f"{' and '.join(files)} have one name" for files in images.values() if len(files) > 1]
    return {scan: Pair(files[0], tuple(masks.get(scan, ()))) for scan, files in images.items()}, problems


def class_folders(folder: Path, card: Card, names: Names, *, excerpt: bool = False, others: str = r"(?!)") -> Plan:
    """The plan of a dataset with one folder for each label of the card, named like it or as its layout says.

    Keys are the label and the scan; every image counts as a patient. excerpt: class folders may be missing.
    others: regular expression of folders that may lie beside them. Raises: DataError naming every missing or unknown
    class folder and every file without a counterpart.
    """
    places = {label: card.layout.get(label, label) for label in card.counts}
    problems = [
        f"{path.name}/ holds images but is not a class of the card ({', '.join(places.values())})"
        for path in tree.listed(folder)
        if path.is_dir() and path.name not in places.values() and not re.fullmatch(others, path.name)
        if any(each.suffix.lower() in PICTURES for each in tree.glob(path, "**/*"))
    ]
    items, files = [], []
    for label, place in places.items():
        if not (folder / place).is_dir() and not excerpt:
            problems.append(f"the class folder {place}/ is missing")
        pairs, faults = pair(folder, place, names.of(label))
        problems += faults
        for scan, (image, masks) in pairs.items():
            key = f"{label}_{scan.zfill(4) if scan.isdecimal() else re.sub(r'[^A-Za-z0-9._-]+', '_', scan)}"
            recipe = readers.ScanFiles(folder=folder, image=image, masks=masks, patient=key)
            items.append(Item(key=key, label=label, recipe=recipe))
            files += [image, *masks]
    readers.raise_if_any(folder, problems)
    if not items:
        raise DataError(f"{folder} has no image in {', '.join(places.values())}.")
    return Plan(items, readers.hash_files(folder, files))


def _scan(match: re.Match[str]) -> str:
    scan = match["scan"]
    return str(int(scan)) if scan.isdecimal() else scan
