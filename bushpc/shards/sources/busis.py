"""BUSIS (Xian et al. 2018, Zhang et al. 2022): numbered images and masks, and a table of labels that copies may lack.

    Original/case<n>.bmp + GT/case<n>_GT.bmp, row of BUSIS562.csv → image, mask, label

shards/busis/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

from bushpc.sample import UNLABELLED
from bushpc.shards import pairs, readers
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAMES = pairs.Names(
    image=r"Original/case(?P<scan>\d+)\.(bmp|png)",
    mask=r"GT/case(?P<scan>\d+)_GT\.(bmp|png)",
    like="Original/case1.bmp or GT/case1_GT.bmp",
    unread=r"(?!Original/|GT/).*",
)
TYPES = {"B": "benign", "M": "malignant"}
load = readers.load_scan


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks by number. `excerpt` skips rows of the table without their image.

    Raises: DataError naming every file without a counterpart, every image without a row, and every invalid row.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    table = card.layout["table"]
    scans, problems = pairs.pair(folder, "", NAMES)
    labels = dict.fromkeys(scans, UNLABELLED)
    if has_table := (folder / table).exists():
        labels, faults = _labels(folder, table, card)
        problems += faults
        problems += [f"{image} has no row in {table}" for scan, (image, _) in scans.items() if scan not in labels]
        if not excerpt:
            problems += [
                f"{table} has a row for case {scan}, which has no image" for scan in labels.keys() - scans.keys()
            ]
    readers.raise_if_any(folder, problems)
    items = []
    for scan, (image, masks) in scans.items():
        key = f"busis_{scan.zfill(3)}"
        recipe = readers.ScanFiles(folder=folder, image=image, masks=masks, patient=key)
        items.append(Item(key=key, label=labels[scan], recipe=recipe))
    files = [file for image, masks in scans.values() for file in (image, *masks)]
    return Plan(items, readers.hash_files(folder, [*files, *([table] if has_table else [])]))


def _labels(folder: Path, table: str, card: Card) -> tuple[dict[str, str], list[str]]:
    """The label of every case number, and the problems of the table."""
    name, kind = card.columns
    labels, problems = {}, []
    for row, cells in readers.csv_rows(folder / table, card.columns):
        if not any(cells.values()):
            continue  # the table ends in empty rows
        number = re.fullmatch(r"\D*(\d+)", cells[name])
        if not number or cells[kind].upper() not in TYPES:
            problems.append(
                f"{table}, row {row}: '{name}' is '{cells[name]}' and '{kind}' is '{cells[kind]}'; allowed: case001 "
                f"and {' or '.join(TYPES)}"
            )
        else:
            labels[str(int(number[1]))] = TYPES[cells[kind].upper()]
    return labels, problems
