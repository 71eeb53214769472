"""BUS-BRA (Gómez-Flores et al. 2024): one table row a scan, several scans a patient. Oddities end here.

    bus_data.csv row → image, mask, BI-RADS, histology, device, side      5-fold-cv.csv → the publisher's folds

What is odd about the published files, and what is done about it, is listed under `notes` in
shards/bus_bra/card.yaml.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.sample import Sample
from bushpc.shards import raw
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

ATTRIBUTES = {"BIRADS": "birads", "Histology": "histology", "Device": "device", "Side": "side"}
NO_TURN = "NaN"  # in `valid_k`: held out in fold k, so neither trained nor validated on


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read both tables and check every file that they name; with `excerpt`, rows whose image is absent are left out.

    Raises: DataError naming every missing file, every picture without a row, and every unusable row.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    table = card.layout["table"]
    items, problems, files = [], [], [table]
    rows_by_id: dict[str, int] = {}
    for row, cells in raw.csv_rows(folder / table, card.columns):
        name = cells["ID"]
        image = f"{card.layout['images']}/{name}.png"
        mask = f"{card.layout['masks']}/mask_{name.removeprefix('bus_')}.png"
        if rows_by_id.setdefault(name, row) != row:
            problems.append(f"{table}, row {row}: {name} is in row {rows_by_id[name]} already")
        if excerpt and not (folder / image).exists():
            if (folder / mask).exists():
                problems.append(f"{mask} is the mask of no image")
                files.append(mask)
            continue
        faults = raw.absent(folder, (image, mask))
        if cells["Pathology"] not in card.counts:
            faults.append(f"Pathology is '{cells['Pathology']}'; allowed: {', '.join(card.counts)}")
        problems += [f"{table}, row {row}: {fault}" for fault in faults]
        files += [image, mask]
        attributes = {attribute: cells[column] or None for column, attribute in ATTRIBUTES.items()}
        scan = raw.Scan(folder=folder, image=image, masks=(mask,), patient=cells["Case"], attributes=attributes)
        items.append(Item(key=name, label=cells["Pathology"], recipe=scan))
    pictures = [f"{part}/{path.name}" for part in _parts(card) for path in sorted((folder / part).glob("*.png"))]
    problems += [f"{picture} has no row in {table}" for picture in sorted(set(pictures) - set(files))]
    published = None
    if (folder / card.layout["folds"]).exists() or not excerpt:
        published, faults = _published_folds(folder / card.layout["folds"], [item.key for item in items])
        problems += faults
        files.append(card.layout["folds"])
    raw.refuse(folder, problems)
    return Plan(items, raw.hashes(folder, files), published)


def load(item: Item) -> Sample:
    """Decode the image and its mask. Raises: DataError naming the file."""
    return raw.load_scan(item)


def _parts(card: Card) -> tuple[str, str]:
    return card.layout["images"], card.layout["masks"]


def _published_folds(path: Path, keys: list[str]) -> tuple[dict[str, int], list[str]]:
    """Fold of every scan, counted from 0, and what is wrong with the table.

    `kFold` is the fold, from 1, that tests on the scan. `valid_k` says what the scan is in fold k: 1 or 0 for the
    training and validation parts of the rest, and the string NaN where it is tested on.
    """
    folds, problems = {}, []
    for row, cells in raw.csv_rows(path, ("ID", "kFold")):
        tested = [column.removeprefix("valid_") for column, cell in cells.items() if cell == NO_TURN]
        if not cells["kFold"].isdecimal() or tested != [cells["kFold"]]:
            problems.append(
                f"{path.name}, row {row}: kFold is '{cells['kFold']}', but {NO_TURN} stands in valid_"
                f"{', valid_'.join(tested) or '…'}"
            )
        else:
            folds[cells["ID"]] = int(cells["kFold"]) - 1
    problems += [f"{path.name} has no row for {key}" for key in keys if key not in folds and not problems]
    return {key: folds[key] for key in keys if key in folds}, problems
