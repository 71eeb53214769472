"""BUS-UCLM (Vallez et al. 2025): colour-coded masks say the class, the file's name the patient. Oddities end here.

    images/<PATIENT>_<n>.png + masks/<PATIENT>_<n>.png ─colour→ mask, label      INFO.csv → Doppler, marks, combined

What is odd about the published files, and what is done about it, is listed under `notes` in
shards/bus_uclm/card.yaml.
"""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.sample import Sample
from bushpc.shards import raw
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAME = re.compile(r"(?P<patient>[A-Za-z]+)_\d+\.png")
RED, GREEN = 1, 2  # of the three channels as bits; black is 0
ATTRIBUTES = ("Doppler", "Marks", "Combined")
INFO_COLUMNS = ("Image", "Label", *ATTRIBUTES)


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks and read the masks' colours, which are the labels; INFO.csv must agree where it is there.

    With `excerpt`, rows of INFO.csv whose image is absent are left out.
    Raises: DataError naming every file without a counterpart, unknown colour, and row that contradicts its mask.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    images, masks, table = card.layout["images"], card.layout["masks"], card.layout["table"]
    problems = [f"the folder {part}/ is missing" for part in (images, masks) if not (folder / part).is_dir()]
    names, of_masks = ({path.name for path in (folder / part).glob("*.png")} for part in (images, masks))
    problems += [f"{images}/{name} has no mask" for name in sorted(names - of_masks)]
    problems += [f"{masks}/{name} is the mask of no image" for name in sorted(of_masks - names)]
    raw.refuse(folder, problems)
    facts = _info(folder / table, names, excerpt, problems) if (folder / table).exists() else None
    items = []
    for name in sorted(names):
        match = NAME.fullmatch(name)
        if not match:
            problems.append(f"{images}/{name} does not begin with a patient's code, as ALWI_000.png does")
            continue
        label = _label(_colours(folder, f"{masks}/{name}"))
        fact = facts.get(name, {}) if facts is not None else {}
        if fact and fact["Label"].lower() != label:
            problems.append(f"{table} calls {name} {fact['Label']}, but its mask's colour says {label}")
        scan = raw.Scan(
            folder=folder,
            image=f"{images}/{name}",
            masks=(f"{masks}/{name}",),
            patient=match["patient"],
            attributes={column.lower(): fact.get(column, "").lower() or None for column in ATTRIBUTES},
        )
        items.append(Item(key=Path(name).stem, label=label, recipe=scan))
    raw.refuse(folder, problems)
    files = [f"{part}/{name}" for part in (images, masks) for name in names]
    return Plan(items, raw.hashes(folder, files if facts is None else [table, *files]))


def load(item: Item) -> Sample:
    """Decode the image and its mask, whatever its colour. Raises: DataError naming the file."""
    scan: raw.Scan = item.recipe
    if item.label != "normal":
        try:
            return raw.load_scan(item)
        except DataError as error:
            raise DataError(f"{error} Or leave such scans out of the folder, and add excerpt=true.") from None
    image_HWC = raw.read_image(scan.folder, scan.image)
    return Sample(
        key=item.key,
        patient=scan.patient,
        label=item.label,
        image_HWC=image_HWC,
        mask_HW=np.zeros(image_HWC.shape[:2], np.uint8),  # an all-black mask says nothing more, whatever its size
        attributes=dict(scan.attributes),
        sources=(scan.image, *scan.masks),
    )


def _colours(folder: Path, mask: str) -> set[int]:
    """Which of black, green and red a mask holds. Raises: DataError for any other colour."""
    bits_HW = ((raw.read_image(folder, mask) > 127) * np.array([RED, GREEN, 4])).sum(axis=2)
    colours = {int(bits) for bits in np.unique(bits_HW)}
    if unknown := colours - {0, GREEN, RED}:
        y, x = np.argwhere(np.isin(bits_HW, list(unknown)))[0]
        raise DataError(f"{folder / mask}: pixel x={x} y={y} is not black, green (benign) or red (malignant).")
    return colours


def _label(colours: set[int]) -> str:
    """An image with lesions of both classes is a malignant one."""
    return "malignant" if RED in colours else "benign" if GREEN in colours else "normal"


def _info(path: Path, names: set[str], excerpt: bool, problems: list[str]) -> dict[str, dict[str, str]]:
    """The rows of INFO.csv by image; appends to `problems` what does not fit the folder."""
    facts = {}
    for row, cells in raw.csv_rows(path, INFO_COLUMNS, delimiter=";"):
        name = cells["Image"]
        if name in names:
            facts[name] = cells
        elif not excerpt:
            problems.append(f"{path.name}, row {row}: {name} is missing")
    problems += [f"{path.name} has no row for {name}" for name in sorted(names - set(facts))]
    return facts
