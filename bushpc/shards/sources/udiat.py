"""UDIAT, "Dataset B" (Yap et al. 2018): numbered images and masks, and a spreadsheet of labels.

    DatasetB.xlsx row → original/<n>.png, GT/<n>.png, diagnosis

What is odd about the published files, and what is done about it, is listed under `notes` in shards/udiat/card.yaml.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.sample import Sample
from bushpc.shards import raw
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read the spreadsheet and check every file that it names; with `excerpt`, rows without an image are left out.

    Raises: DataError naming every missing file, every picture without a row, and every unusable row.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    sheet, images, masks = card.layout["spreadsheet"], card.layout["images"], card.layout["masks"]
    items, problems, files = [], [], [sheet]
    for row, cells in raw.spreadsheet_rows(folder / sheet, card.columns):
        number, label = str(cells["Image"] or "").strip(), str(cells["Type"] or "").strip().lower()
        if not number.isdecimal():
            problems.append(f"{sheet}, row {row}: Image is '{number}'; the number of an image is needed")
            continue
        key = f"{int(number):06d}"  # the cell may hold 1 where the file is 000001.png
        image, mask = f"{images}/{key}.png", f"{masks}/{key}.png"
        if excerpt and not (folder / image).exists():
            if (folder / mask).exists():
                problems.append(f"{mask} is the mask of no image")
                files.append(mask)
            continue
        faults = raw.absent(folder, (image, mask))
        if label not in card.counts:
            faults.append(f"Type is '{cells['Type']}'; allowed: {', '.join(card.counts)}")
        if image in files:
            faults.append(f"image {key} has a row already")
        problems += [f"{sheet}, row {row}: {fault}" for fault in faults]
        files += [image, mask]
        diagnosis = str(cells["Diagnosis"] or "").strip().lower() or None
        scan = raw.Scan(folder=folder, image=image, masks=(mask,), patient=key, attributes={"diagnosis": diagnosis})
        items.append(Item(key=key, label=label, recipe=scan))
    pictures = [f"{part}/{path.name}" for part in (images, masks) for path in sorted((folder / part).glob("*.png"))]
    problems += [f"{picture} has no row in {sheet}" for picture in pictures if picture not in files]
    raw.refuse(folder, problems)
    return Plan(items, raw.hashes(folder, files))


def load(item: Item) -> Sample:
    """Decode the image and its mask. Raises: DataError naming the file."""
    return raw.load_scan(item)
