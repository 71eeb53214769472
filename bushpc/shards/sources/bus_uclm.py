"""BUS-UCLM (Vallez et al. 2025): the mask's colour gives the class, the file name the patient.

    images/<PATIENT>_<n>.png + masks/<PATIENT>_<n>.png ─colour→ mask, label      INFO.csv → Doppler, marks, combined

shards/bus_uclm/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.sample import Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAME = re.compile(r"(?P<patient>[A-Za-z]+)_\d+\.png")
RED, GREEN = 1, 2  # the three channels as bits; black is 0
ATTRIBUTES = ("Doppler", "Marks", "Combined")
INFO_COLUMNS = ("Image", "Label", *ATTRIBUTES)


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks, and read the labels from the masks' colours. INFO.csv, if present, must agree.

    `excerpt` skips rows of INFO.csv without their image.
    Raises: DataError naming every file without a counterpart, unknown colour, and row that contradicts its mask.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    images, masks = (tree.part(folder, card.layout[name]) for name in ("images", "masks"))
    table = card.layout["table"]
    problems = [f"the folder {part}/ is missing" for part in (images, masks) if not (folder / part).is_dir()]
    names, of_masks = ({path.name for path in tree.glob(folder, f"{part}/*.png")} for part in (images, masks))
    problems += [f"{images}/{name} has no mask" for name in sorted(names - of_masks)]
    problems += [f"{masks}/{name} is the mask of no image" for name in sorted(of_masks - names)]
    readers.raise_if_any(folder, problems)
    facts = _info(folder / table, names, excerpt, problems) if (folder / table).exists() else None
    items = []
    for name in sorted(names):
        match = NAME.fullmatch(name)
        if not match:
            problems.append(f"{images}/{name} does not begin with a patient code like the one in ALWI_000.png")
            continue
        label = _label(_colours(folder, f"{masks}/{name}"))
        fact = facts.get(name, {}) if facts is not None else {}
        if fact and fact["Label"].lower() != label:
            problems.append(f"{table} labels {name} {fact['Label']}, but its mask's colour means {label}")
        scan = readers.ScanFiles(
            folder=folder,
            image=f"{images}/{name}",
            masks=(f"{masks}/{name}",),
            patient=match["patient"],
            attributes={column.lower(): _answer(fact.get(column, "")) for column in ATTRIBUTES},
        )
        items.append(Item(key=Path(name).stem, label=label, recipe=scan))
    readers.raise_if_any(folder, problems)
    files = [f"{part}/{name}" for part in (images, masks) for name in names]
    return Plan(items, readers.hash_files(folder, files if facts is None else [table, *files]))


def load(item: Item) -> Sample:
    """Decode the image and its mask of any colour. Raises: DataError naming the file."""
    scan: readers.ScanFiles = item.recipe
    if item.label != "normal":
        try:
            return readers.load_scan(item)
        except DataError as error:
            raise DataError(f"{error} Or remove such scans from the folder and add excerpt=true.") from None
    image_HWC = readers.read_image(scan.folder, scan.image)
    # The mask is all black, so its size doesn't matter.
    return readers.sample_of(item, image_HWC, np.zeros(image_HWC.shape[:2], np.uint8))


def _answer(cell: str) -> str | None:
    """A cell of the table; one Doppler value is Y where the others are yes."""
    cell = cell.lower()
    return {"y": "yes", "n": "no"}.get(cell, cell) or None


def _colours(folder: Path, mask: str) -> set[int]:
    """Which of black, green and red the mask contains. Raises: DataError for any other colour."""
    colours_HWC = readers.read_image(folder, mask)
    least = readers.mask_threshold() or readers.HALF
    if 0 < colours_HWC.max() < least:
        readers.read_mask(folder, mask)  # says so: dark colours would count as black
    bits_HW = ((colours_HWC >= least) * np.array([RED, GREEN, 4])).sum(axis=2)
    colours = {int(bits) for bits in np.unique(bits_HW)}
    if unknown := colours - {0, GREEN, RED}:
        y, x = np.argwhere(np.isin(bits_HW, list(unknown)))[0]
        raise DataError(f"{folder / mask}: pixel x={x} y={y} is not black, green (benign) or red (malignant).")
    return colours


def _label(colours: set[int]) -> str:
    """An image with lesions of both classes is malignant."""
    return "malignant" if RED in colours else "benign" if GREEN in colours else "normal"


def _info(path: Path, names: set[str], excerpt: bool, problems: list[str]) -> dict[str, dict[str, str]]:
    """The rows of INFO.csv by image; appends mismatches with the folder to `problems`."""
    facts = {}
    for row, cells in readers.csv_rows(path, INFO_COLUMNS, delimiter=";"):
        name = cells["Image"]
        if name in names:
            facts[name] = cells
        elif not excerpt:
            problems.append(f"{path.name}, row {row}: {name} is missing")
    problems += [f"{path.name} has no row for {name}" for name in sorted(names - set(facts))]
    return facts
