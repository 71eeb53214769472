"""BrEaST-Lesions-USG (Pawłowska et al. 2024): one spreadsheet row and one scan a patient. Oddities end here.

    spreadsheet row → image, tumour mask, clinical attributes

What is odd about the published files, and what is done about it, is listed under `notes` in
shards/breast/card.yaml; the code below names each where it deals with it.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bushpc.errors import DataError
from bushpc.files import sha256_of
from bushpc.sample import LABELS, Sample
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

ATTRIBUTES = (  # columns that become attributes, under their name in lower case
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
MOST_SHOWN = 20  # a wrong folder has hundreds of missing files; the first ones tell


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where one sample's files are, and what its spreadsheet row says. `mask` is None for a normal scan."""

    folder: Path
    image: str
    mask: str | None
    row: int
    attributes: dict[str, str | float | None]
    pixel_mm: float


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read the spreadsheet and check that every file that it names exists; with `excerpt`, that its masks do.

    Raises: DataError naming missing columns, or every missing file and unusable cell with its row.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    sheet, images = card.layout["spreadsheet"], card.layout["images"]
    items, problems, files = [], [], [sheet]
    rows_by_image: dict[str, int] = {}
    for row, cells in _rows(folder / sheet, card.columns):
        image, masks, others = (_files(cells[column]) for column in FILE_COLUMNS)
        if excerpt and image and not (folder / images / image[0]).exists():
            continue
        named = [f"{images}/{name}" for name in image + masks + others]
        missing = [name for name in named if not (folder / name).is_file()]
        problems += [f"row {row}: {name} is missing" for name in missing]
        faults = _faults(cells, image, masks)
        if image and rows_by_image.setdefault(image[0], row) != row:
            faults.append(f"{image[0]} is in row {rows_by_image[image[0]]} already")
        problems += [f"row {row}: {fault}" for fault in faults]
        if missing or faults:
            continue
        files += named
        recipe = Recipe(
            folder=folder,
            image=f"{images}/{image[0]}",
            mask=f"{images}/{masks[0]}" if masks else None,
            row=row,
            attributes={column.lower(): _attribute(column, cells[column]) for column in ATTRIBUTES},
            pixel_mm=round(float(cells["Pixel_size"]) * 10, 6),  # centimetres, says the data dictionary
        )
        items.append(Item(key=Path(image[0]).stem, label=str(cells["Classification"]), recipe=recipe))
    if problems:
        more = f"\n  … and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise DataError(f"{folder / sheet}:\n  " + "\n  ".join(problems[:MOST_SHOWN]) + more)
    return Plan(items, {file: sha256_of(folder / file) for file in sorted(files)})


def load(item: Item) -> Sample:
    """Decode the image and its tumour mask. Raises: DataError naming file and row."""
    recipe: Recipe = item.recipe
    image_HWC = _read_on_black(recipe, recipe.image)
    mask_HW: np.ndarray
    if recipe.mask is None:
        mask_HW = np.zeros(image_HWC.shape[:2], np.uint8)
    else:
        # Masks are drawn with opacity, and one has half-transparent edge pixels: half and more is lesion.
        mask_HW = (_read_on_black(recipe, recipe.mask)[..., 0] > 127).astype(np.uint8)
    if image_HWC.shape[:2] != mask_HW.shape:
        raise DataError(
            f"Row {recipe.row}: {recipe.image} has {image_HWC.shape[1]}x{image_HWC.shape[0]} pixels, "
            f"its mask {recipe.mask} has {mask_HW.shape[1]}x{mask_HW.shape[0]}."
        )
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


def _rows(path: Path, columns: list[str]) -> t.Iterator[tuple[int, dict[str, t.Any]]]:
    """The rows of the first sheet, each with its number as a spreadsheet program shows it."""
    import openpyxl  # here, because the processes that decode images do without it

    try:
        book = openpyxl.load_workbook(path, data_only=True)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: the folder must hold the spreadsheet of that name.") from None
    except Exception as error:  # openpyxl raises whatever zip and XML parsing raise
        raise DataError(f"{path} is not a readable spreadsheet ({type(error).__name__}: {error}).") from error
    rows = book.worksheets[0].iter_rows(values_only=True)
    header = [str(name).strip() if name is not None else "" for name in next(rows, ())]
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} in its first sheet, row 1."
        )
    for row, values in enumerate(rows, start=2):
        if any(value is not None for value in values):
            yield row, dict(zip(header, values, strict=True))


def _files(cell: object) -> list[str]:
    """File names in a cell: none, one, or several joined by &."""
    return [name.strip() for name in str(cell).split("&")] if cell not in (None, *NO_VALUE) else []


def _faults(cells: dict[str, t.Any], image: list[str], masks: list[str]) -> list[str]:
    """What makes a row unusable, in words."""
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
        faults.append(f"Pixel_size is '{cells['Pixel_size']}'; a number of centimetres above 0 is needed")
    return faults


def _attribute(column: str, cell: object) -> str | float | None:
    """A cell as an attribute: missing in any spelling is None; several values stay joined by &.

    Age is a number, and a string only where it is missing. BI-RADS is a number in some rows and a string in
    others; it is a category, so always a string here.
    """
    text = "" if cell is None else str(cell).strip()
    if text in NO_VALUE:
        return None
    if column == "Age" and isinstance(cell, int | float):
        return float(cell)
    return "&".join(part.strip() for part in text.split("&"))


def _read_on_black(recipe: Recipe, name: str) -> np.ndarray:
    """A PNG as uint8 RGB, with whatever is transparent black.

    All files are RGBA and 31 images have transparent regions: what is outside the scan's sector was cut out, and
    some hide white pixels or annotations under it. A scanner's screen is black there, as the other images are.
    """
    try:
        with Image.open(recipe.folder / name) as file:
            image = file.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"Row {recipe.row}: {name} is not a readable PNG ({error}).") from error
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, image).convert("RGB"))
