"""Readers for the images, masks and tables of raw datasets and for fold files; every error names the file.

    raw folder ─plan reads tables→ ScanFiles recipes ─load reads images→ samples

Code that only one dataset needs belongs in that dataset's source.
"""

from __future__ import annotations

import contextlib
import contextvars
import csv
import io
import typing as t
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.files import decoded, delimiter_of, sha256_of
from bushpc.sample import Sample
from bushpc.shards import pictures
from bushpc.shards.manifest import PNG_FAILS

if t.TYPE_CHECKING:
    from bushpc.shards.sources import Item

HALF = 128  # of a mask's brightness
MOST_UNPACKED = 1 << 28  # bytes of a workbook, which is a zip; a table of a million cells has some 50 MB
MOST_SHOWN = 20  # a wrong folder has hundreds of missing files; the first few are enough to see why


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the pictures of the set that is being packed are read.

    ranges: of 16-bit and float pictures (`bushpc.shards.pictures`).
    mask_threshold: least level of a lesion in a mask; None is half brightness.
    levels: filled by `read_mask`: the highest level of each mask.
    """

    ranges: pictures.Ranges = field(default_factory=dict)
    mask_threshold: int | None = None
    levels: dict[str, int] = field(default_factory=dict)

    def stated(self) -> dict[str, t.Any]:
        """What differs from the usual; empty for 8-bit pictures with masks of 0 and 255."""
        threshold = {} if self.mask_threshold is None else {"mask_threshold": self.mask_threshold}
        return threshold | {kind: list(range_) for kind, range_ in sorted(self.ranges.items())}


# A source's `load` gets an item and nothing else, so how to read its files is ambient.
_READING: contextvars.ContextVar[Reading | None] = contextvars.ContextVar("reading", default=None)


@contextlib.contextmanager
def reading(how: Reading) -> t.Iterator[Reading]:
    """Read the pictures in the block as `how` says."""
    token = _READING.set(how)
    try:
        yield how
    finally:
        _READING.reset(token)


@dataclass(frozen=True, kw_only=True)
class ScanFiles:
    """The files of one sample: an image and any number of masks of the same lesion class.

    image, masks: relative to `folder`. A scan without masks is normal.
    """

    folder: Path
    image: str
    masks: tuple[str, ...]
    patient: str
    attributes: Mapping[str, str | float | None] = field(default_factory=dict)


def load_scan(item: Item) -> Sample:
    """Decode a `ScanFiles`: the image and the union of its masks. Raises: DataError naming file and sizes."""
    scan: ScanFiles = item.recipe
    image_HWC = read_image(scan.folder, scan.image)
    lesion = item.label != "normal"
    return sample_of(item, image_HWC, union(scan.folder, scan.image, image_HWC.shape[:2], scan.masks, lesion=lesion))


def union(folder: Path, image: str, size: tuple[int, ...], masks: Iterable[str], *, lesion: bool) -> np.ndarray:
    """The union of masks of an image of this size (height, width). Raises: DataError naming file and sizes."""
    mask_HW = np.zeros(size, np.uint8)
    for name in masks:
        one_HW = read_mask(folder, name, lesion=lesion)
        check_size(image, size, name, one_HW)
        mask_HW |= one_HW
    return mask_HW


def sample_of(item: Item, image_HWC: np.ndarray, mask_HW: np.ndarray) -> Sample:
    """The sample of a decoded `ScanFiles`."""
    scan: ScanFiles = item.recipe
    return Sample(
        key=item.key,
        patient=scan.patient,
        label=item.label,
        image_HWC=image_HWC,
        mask_HW=mask_HW,
        attributes=dict(scan.attributes),
        sources=(scan.image, *scan.masks),
    )


def read_image(folder: Path, name: str) -> np.ndarray:
    """Read an image of any mode as uint8 RGB, (H, W, 3). Transparent pixels become black, like a scanner's screen.

    16-bit and float pictures are scaled by the range of the set (`bushpc.shards.pictures`).
    """
    how = _READING.get()
    with _named(folder / name):
        return pictures.read(folder / name, how.ranges if how else None)


class FaintMask(DataError):
    """A lesion's mask without a pixel of half brightness; it has levels of 0 and 1, say."""

    code = "faint-mask"
    cure = "Give `mask_threshold=` to `bushpc pack`, or write the masks as 0 and 255."


def read_mask(folder: Path, name: str, *, lesion: bool = True, known: Collection[int] = ()) -> np.ndarray:
    """Read a mask image of any mode as uint8 0 or 1, (H, W). Pixels of at least half brightness are lesion.

    `mask_threshold=` of `bushpc pack` sets another level, and the packer does so itself where no mask of the set has a
    level above 1. lesion: whether the scan has one; then a mask of dark levels only raises FaintMask. known: the levels
    that the masks of this dataset use; another one is a DataError, unless the user gives a threshold.
    """
    levels_HW = read_mask_levels(folder, name)
    how = _READING.get() or Reading()
    least = HALF if how.mask_threshold is None else how.mask_threshold
    highest = int(levels_HW.max(initial=0))
    if known and how.mask_threshold is None and highest != 1:
        _check_levels(folder / name, levels_HW, known)
    if lesion and 0 < highest < least:
        raise FaintMask(
            f"{folder / name}: its highest level is {highest}, and lesion is {least} and above. To read this dataset's "
            f"masks from another level on, add mask_threshold=N (1 takes everything that is not black)."
        )
    return (levels_HW >= least).astype(np.uint8)


def mask_threshold() -> int | None:
    """The least level of a lesion, where it is not half brightness."""
    how = _READING.get()
    return how.mask_threshold if how else None


def read_mask_levels(folder: Path, name: str) -> np.ndarray:
    """A mask's levels as uint8, (H, W): of the brightest channel, if it has colours."""
    with _named(folder / name):
        levels_HW = pictures.read_levels(folder / name).max(axis=2)
    if how := _READING.get():
        how.levels[name] = int(levels_HW.max(initial=0))
    return levels_HW


@contextlib.contextmanager
def _named(path: Path) -> t.Iterator[None]:
    """Errors of a picture name its file."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Change its permissions.") from error
    except PNG_FAILS as error:
        raise DataError(f"{path} is not a readable {path.suffix[1:].upper()} ({error}).") from error
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error


def read_levels(folder: Path, name: str, known: Collection[int]) -> np.ndarray:
    """Read a grey mask image of any mode, uint8 (H, W), in which each grey level stands for a class.

    Raises: DataError for a level outside `known`. Masks that were resized or saved as JPEG have such levels.
    """
    with _named(folder / name):
        mask_HW = pictures.read_levels(folder / name)[..., 0]
    _check_levels(folder / name, mask_HW, known)
    return mask_HW


def _check_levels(path: Path, levels_HW: np.ndarray, known: Collection[int]) -> None:
    if strange := sorted(set(np.unique(levels_HW).tolist()) - set(known)):
        raise DataError(
            f"{path} has pixels of value {', '.join(map(str, strange[:MOST_SHOWN]))}; "
            f"masks of this dataset use only {', '.join(map(str, sorted(known)))}."
        )


def check_size(image: str, size: tuple[int, ...], mask: str, mask_HW: np.ndarray) -> None:
    """Raises: DataError naming both files if the mask has not the image's size (height, width)."""
    if mask_HW.shape[:2] != size:
        raise DataError(
            f"{image} has {size[1]}x{size[0]} pixels, its mask {mask} has {mask_HW.shape[1]}x{mask_HW.shape[0]}."
        )


def csv_rows(path: Path, columns: Sequence[str], delimiter: str = ",") -> t.Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file with their line numbers, surrounding white space stripped from each cell.

    Semicolons, tabs and UTF-16 are read too: spreadsheet programs of many countries write them.
    Raises: DataError if a column is missing or the file cannot be read.
    """
    try:
        text = decoded(path.read_bytes())
        table = io.StringIO(text, newline="")
        reader = csv.DictReader(table, delimiter=delimiter_of(text, delimiter), strict=True)
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        _check_columns(path, columns, header)
        for cells in reader:
            if any(cells[column] is None for column in columns):
                raise DataError(f"{path}, row {reader.line_num}: too few cells; {', '.join(columns)} are required.")
            yield reader.line_num, {column: cells[column].strip() for column in header if cells[column] is not None}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: the folder must contain this table.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither UTF-8 nor UTF-16 ({error}): save it as UTF-8 CSV.") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error


def spreadsheet_rows(path: Path, columns: Sequence[str]) -> t.Iterator[tuple[int, dict[str, t.Any]]]:
    """Yield the rows of a workbook's first sheet with their row numbers as a spreadsheet program shows them.

    Raises: DataError if a column is missing or the file cannot be read.
    """
    import openpyxl  # imported here because the processes that decode images don't need it

    try:
        with zipfile.ZipFile(path) as parts:
            if (unpacked := sum(part.file_size for part in parts.infolist())) > MOST_UNPACKED:
                raise ValueError(f"{unpacked:,} bytes when unpacked; allowed: {MOST_UNPACKED:,}")
        book = openpyxl.load_workbook(path, data_only=True)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: the folder must contain this spreadsheet.") from None
    except Exception as error:  # openpyxl lets any error from zip and XML parsing through
        raise DataError(f"{path} is not a readable spreadsheet ({type(error).__name__}: {error}).") from error
    rows = book.worksheets[0].iter_rows(values_only=True)
    header = [str(name).strip() if name is not None else "" for name in next(rows, ())]
    _check_columns(path, columns, header, " in its first sheet, row 1")
    for row, values in enumerate(rows, start=2):
        if any(value is not None for value in values):
            yield row, dict(zip(header, values, strict=True))


def missing_files(folder: Path, names: Iterable[str]) -> list[str]:
    """One problem text for each of the files that is missing."""
    return [f"{name} is missing" for name in names if not (folder / name).is_file()]


def raise_if_any(where: Path, problems: Sequence[str]) -> None:
    """Raises: DataError listing the first problems, if there are any."""
    if problems:
        more = f"\n  … and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise DataError(f"{where}:\n  " + "\n  ".join(problems[:MOST_SHOWN]) + more)


def hash_files(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 as hex by relative path, sorted by path."""
    hashes = {}
    for file in sorted(set(files)):
        try:
            hashes[file] = sha256_of(folder / file)
        except OSError as error:
            raise DataError(f"{folder / file} cannot be read: {error.strerror or error}.") from error
    return hashes


def _check_columns(path: Path, columns: Sequence[str], header: Sequence[str], where: str = "") -> None:
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}{where}; "
            f"it has: {', '.join(header) or 'none'}."
        )
