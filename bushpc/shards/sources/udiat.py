"""UDIAT, "Dataset B" (Yap et al. 2018): numbered images and masks, and a spreadsheet of labels.

    DatasetB.xlsx row → original/<n>.png, GT/<n>.png, diagnosis

shards/udiat/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.sample import Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read the spreadsheet and check every file it names. `excerpt` skips rows without their image.

    Raises: DataError naming every missing file, every image without a row, and every invalid row.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    images, masks = (tree.part(folder, card.layout[name]) for name in ("images", "masks"))
    sheet = card.layout["spreadsheet"]
    items, problems, files = [], [], [sheet]
    for row, cells in readers.spreadsheet_rows(folder / sheet, card.columns):
        number, label = str(cells["Image"] or "").strip(), str(cells["Type"] or "").strip().lower()
        if not number.isdecimal():
            problems.append(f"{sheet}, row {row}: Image is '{number}'; it must be an image number")
            continue
        key = f"{int(number):06d}"  # the cell may hold 1 where the file is 000001.png
        image, mask = f"{images}/{key}.png", f"{masks}/{key}.png"
        if excerpt and not (folder / image).exists():
            if (folder / mask).exists():
                problems.append(f"{mask} is the mask of no image")
                files.append(mask)
            continue
        faults = readers.missing_files(folder, (image, mask))
        if label not in card.counts:
            faults.append(f"Type is '{cells['Type']}'; allowed: {', '.join(card.counts)}")
        if image in files:
            faults.append(f"image {key} already has a row")
        problems += [f"{sheet}, row {row}: {fault}" for fault in faults]
        files += [image, mask]
        diagnosis = str(cells["Diagnosis"] or "").strip().lower() or None
        scan = readers.ScanFiles(
            folder=folder, image=image, masks=(mask,), patient=key, attributes={"diagnosis": diagnosis}
        )
        items.append(Item(key=key, label=label, recipe=scan))
    pictures = [f"{part}/{path.name}" for part in (images, masks) for path in tree.glob(folder, f"{part}/*.png")]
    problems += [f"{picture} has no row in {sheet}" for picture in pictures if picture not in files]
    readers.raise_if_any(folder, problems)
    return Plan(items, readers.hash_files(folder, files))


def load(item: Item) -> Sample:
    """Decode the image and its mask. Raises: DataError naming the file."""
    return readers.load_scan(item)
