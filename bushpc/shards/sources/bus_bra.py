"""BUS-BRA (Gómez-Flores et al. 2024): one table row per scan, several scans per patient.

    bus_data.csv row → image, mask, BI-RADS, histology, device, side      5-fold-cv.csv → the publisher's folds

shards/bus_bra/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.sample import Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

ATTRIBUTES = {"BIRADS": "birads", "Histology": "histology", "Device": "device", "Side": "side"}
HELD_OUT = "NaN"  # in `valid_k`: tested on in fold k, so neither trained nor validated on


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read both tables and check every file they name. `excerpt` skips rows without their image.

    Raises: DataError naming every missing file, every image without a row, and every invalid row.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    table, images, masks = card.layout["table"], *(tree.part(folder, part) for part in _parts(card))
    items, problems, files = [], [], [table]
    rows_by_id: dict[str, int] = {}
    for row, cells in readers.csv_rows(folder / table, card.columns):
        name = cells["ID"]
        image = f"{images}/{name}.png"
        mask = f"{masks}/mask_{name.removeprefix('bus_')}.png"
        if rows_by_id.setdefault(name, row) != row:
            problems.append(f"{table}, row {row}: {name} is already in row {rows_by_id[name]}")
        if excerpt and not (folder / image).exists():
            if (folder / mask).exists():
                problems.append(f"{mask} is the mask of no image")
                files.append(mask)
            continue
        faults = readers.missing_files(folder, (image, mask))
        if cells["Pathology"] not in card.counts:
            faults.append(f"Pathology is '{cells['Pathology']}'; allowed: {', '.join(card.counts)}")
        problems += [f"{table}, row {row}: {fault}" for fault in faults]
        files += [image, mask]
        attributes = {attribute: cells[column] or None for column, attribute in ATTRIBUTES.items()}
        scan = readers.ScanFiles(
            folder=folder, image=image, masks=(mask,), patient=cells["Case"], attributes=attributes
        )
        items.append(Item(key=name, label=cells["Pathology"], recipe=scan))
    pictures = [f"{part}/{path.name}" for part in (images, masks) for path in tree.glob(folder, f"{part}/*.png")]
    problems += [f"{picture} has no row in {table}" for picture in sorted(set(pictures) - set(files))]
    published = None
    if (folder / card.layout["folds"]).exists() or not excerpt:
        published, faults = _published_folds(folder / card.layout["folds"], [item.key for item in items])
        problems += faults
        files.append(card.layout["folds"])
    readers.raise_if_any(folder, problems)
    return Plan(items, readers.hash_files(folder, files), published)


def load(item: Item) -> Sample:
    """Decode the image and its mask. Raises: DataError naming the file."""
    return readers.load_scan(item)


def _parts(card: Card) -> tuple[str, str]:
    return card.layout["images"], card.layout["masks"]


def _published_folds(path: Path, keys: list[str]) -> tuple[dict[str, int], list[str]]:
    """The fold of every scan, from 0, and the problems of the table.

    `kFold` is the fold, from 1, that tests on the scan. `valid_k` is the scan's role in fold k: 1 for training,
    0 for validation, and the string NaN where it is tested on.
    """
    folds, problems = {}, []
    for row, cells in readers.csv_rows(path, ("ID", "kFold")):
        tested = [column.removeprefix("valid_") for column, cell in cells.items() if cell == HELD_OUT]
        if not cells["kFold"].isdecimal() or tested != [cells["kFold"]]:
            problems.append(
                f"{path.name}, row {row}: kFold is '{cells['kFold']}', but {HELD_OUT} is in valid_"
                f"{', valid_'.join(tested) or '…'}"
            )
        else:
            folds[cells["ID"]] = int(cells["kFold"]) - 1
    problems += [f"{path.name} has no row for {key}" for key in keys if key not in folds and not problems]
    return {key: folds[key] for key in keys if key in folds}, problems
