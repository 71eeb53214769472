"""BUSI (Al-Dhabyani et al. 2020): one folder per class, masks next to their images.

    <class>/<class> (<n>).png ─with _mask, _mask_1 and _mask_2→ image, united mask

shards/busi/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import re
import typing as t
from collections import defaultdict
from pathlib import Path

from bushpc.sample import Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAME = re.compile(r"(?P<label>\w+) \((?P<number>\d+)\)(?P<mask>_mask(_\d+)?)?\.png")


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair the images of every class folder with their masks. With `excerpt`, class folders may be missing.

    Raises: DataError naming every missing or unknown class folder, and every file without a counterpart.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    problems = [
        f"{path.name}/ holds images but is not a class of the card ({', '.join(card.counts)})"
        for path in tree.listed(folder)
        if path.is_dir() and path.name not in card.counts and tree.glob(folder, f"{path.name}/*.png")
    ]
    images: dict[tuple[str, int], str] = {}
    masks: dict[tuple[str, int], list[str]] = defaultdict(list)
    for label in card.counts:
        if not (folder / label).is_dir() and not excerpt:
            problems.append(f"the class folder {label}/ is missing")
        for path in tree.glob(folder, f"{label}/*.png"):
            file, match = path.relative_to(folder).as_posix(), NAME.fullmatch(path.name)
            if not match or match["label"] != label:
                problems.append(f"{file}: names must be like '{label} (1).png' or '{label} (1)_mask.png'")
            elif match["mask"]:
                masks[label, int(match["number"])].append(file)
            else:
                images[label, int(match["number"])] = file
    problems += [f"{file} has no mask" for scan, file in images.items() if scan not in masks]
    problems += [f"{files[0]} is the mask of no image" for scan, files in masks.items() if scan not in images]
    readers.raise_if_any(folder, problems)
    items = []
    for (label, number), image in images.items():
        key = f"{label}_{number:04d}"
        scan = readers.ScanFiles(folder=folder, image=image, masks=tuple(masks[label, number]), patient=key)
        items.append(Item(key=key, label=label, recipe=scan))
    return Plan(
        items, readers.hash_files(folder, [*images.values(), *(file for files in masks.values() for file in files)])
    )


def load(item: Item) -> Sample:
    """Decode the image and the union of its masks. Raises: DataError naming the file."""
    return readers.load_scan(item)
