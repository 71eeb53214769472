"""BrEaST-Lesions-USG (Pawłowska et al. 2024): one spreadsheet row and one scan per patient.

    spreadsheet row → image, tumour mask, clinical attributes

shards/breast/card.yaml lists the oddities of the published files and how they are handled (`notes`); comments below
mark where.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.sample import LABELS, Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

ATTRIBUTES = (  # columns that become attributes, named in lower case
    "Age",
    "Tissue_composition",
    "Signs",
    "Symptoms",
    "Shape",
    "Margin",
    "Echogenicity",
    "Posterior_features",
    "Halo",
    "Calcifications",
    "Skin_thickening",
    "Interpretation",
    "BIRADS",
    "Verification",
    "Diagnosis",
)
FILE_COLUMNS = ("Image_filename", "Mask_tumor_filename", "Mask_other_filename")
NO_VALUE = ("not available", "not applicable", "")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One sample's files and the content of its spreadsheet row. `mask` is None for a normal scan."""

    folder: Path
    image: str
    mask: str | None
    row: int
    attributes: dict[str, str | float | None]
    pixel_mm: float


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read the spreadsheet and check that every file it names exists. `excerpt` skips rows without their image.

    Raises: DataError naming missing columns, or every missing file and invalid cell with its row.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    sheet, images = card.layout["spreadsheet"], tree.part(folder, card.layout["images"])
    items, problems, files = [], [], [sheet]
    rows_by_image: dict[str, int] = {}
    for row, cells in readers.spreadsheet_rows(folder / sheet, card.columns):
        image, masks, others = (_files(cells[column]) for column in FILE_COLUMNS)
        if excerpt and image and not (folder / images / image[0]).exists():
            continue
        named = [f"{images}/{name}" for name in image + masks + others]
        missing = readers.missing_files(folder, named)
        faults = _faults(cells, image, masks)
        if image and rows_by_image.setdefault(image[0], row) != row:
            faults.append(f"{image[0]} is already in row {rows_by_image[image[0]]}")
        problems += [f"row {row}: {fault}" for fault in missing + faults]
        if missing or faults:
            continue
        files += named
        recipe = Recipe(
            folder=folder,
            image=f"{images}/{image[0]}",
            mask=f"{images}/{masks[0]}" if masks else None,
            row=row,
            attributes={column.lower(): _attribute(column, cells[column]) for column in ATTRIBUTES},
            pixel_mm=round(float(cells["Pixel_size"]) * 10, 6),  # the data dictionary gives centimetres
        )
        items.append(Item(key=Path(image[0]).stem, label=str(cells["Classification"]), recipe=recipe))
    readers.raise_if_any(folder / sheet, problems)
    return Plan(items, readers.hash_files(folder, files))


def load(item: Item) -> Sample:
    """Decode the image and its tumour mask. Raises: DataError naming file and row."""
    recipe: Recipe = item.recipe
    try:
        # Regions outside the scan's sector are transparent, and some hide white pixels or annotations: make them black.
        image_HWC = readers.read_image(recipe.folder, recipe.image)
        mask_HW = np.zeros(image_HWC.shape[:2], np.uint8)
        if recipe.mask is not None:
            # Masks use opacity, and one has half-transparent edge pixels: at least half counts as lesion.
            mask_HW = readers.read_mask(recipe.folder, recipe.mask)
            readers.check_size(recipe.image, image_HWC.shape[:2], recipe.mask, mask_HW)
    except DataError as error:
        raise DataError(f"Row {recipe.row}: {error}") from error
    return Sample(
        key=item.key,
        patient=item.key,
        label=item.label,
        image_HWC=image_HWC,
        mask_HW=mask_HW,
        attributes=recipe.attributes,
        pixel_mm=recipe.pixel_mm,
        sources=(recipe.image,) if recipe.mask is None else (recipe.image, recipe.mask),
    )


def _files(cell: object) -> list[str]:
    """The file names in a cell: none, one, or several joined by &."""
    return [name.strip() for name in str(cell).split("&")] if cell not in (None, *NO_VALUE) else []


def _faults(cells: dict[str, t.Any], image: list[str], masks: list[str]) -> list[str]:
    """One text for each reason why a row cannot be used."""
    faults = []
    label = cells["Classification"]
    if label not in LABELS:
        faults.append(f"Classification is '{label}'; allowed: {', '.join(LABELS)}")
    if len(image) != 1:
        faults.append(f"Image_filename names {len(image)} files instead of 1")
    # A row without a tumour mask is a normal scan; `_other` masks show findings that are not the lesion.
    if label in LABELS and len(masks) != (0 if label == "normal" else 1):
        faults.append(f"Mask_tumor_filename names {len(masks)} files for a {label} scan")
    if not isinstance(cells["Pixel_size"], int | float) or not cells["Pixel_size"] > 0:
        faults.append(f"Pixel_size is '{cells['Pixel_size']}'; it must be a number of centimetres > 0")
    return faults


def _attribute(column: str, cell: object) -> str | float | None:
    """A cell as an attribute. Every spelling of "missing" becomes None; several values stay joined by &.

    Age is a number, and a string only where it is missing. BI-RADS is a number in some rows and a string in
    others; it is a category, so it always becomes a string.
    """
    text = "" if cell is None else str(cell).strip()
    if text in NO_VALUE:
        return None
    if column == "Age" and isinstance(cell, int | float):
        return float(cell)
    return "&".join(part.strip() for part in text.split("&"))
