"""Image files as users have them → the pixels that training reads: uint8 RGB at original size, and millimetres.

    folder ─find_images→ paths ─open_picture→ Picture ─read(frame)→ image_HWC → bushpc.data.cache.resize

PNG, JPEG, TIFF and BMP through Pillow, DICOM through pydicom. Whatever a file's trouble is, it is a DataError.
"""

from __future__ import annotations

import hashlib
import io
import numbers
import os
import typing as t
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bushpc.errors import DataError

if t.TYPE_CHECKING:
    from pydicom import Dataset

FORMATS = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"},
    **{".dcm": "DICOM", ".dicom": "DICOM"},
}
# Other names are DICOM where the file says so itself: scanners and archives name them IM000001 or by their UID.
DICOM_MAGIC, DICOM_MAGIC_AT = b"DICM", 128
# The index of a DICOM medium has the magic and no pixels.
NO_IMAGES = ("DICOMDIR",)
# Edges that a pixel of an ultrasound image may have, in millimetres.
LEAST_MM, MOST_MM = 1e-4, 100.0
CENTIMETRES, TISSUE = 3, 1  # Physical Units and Region Spatial Format of an ultrasound region (DICOM PS3.3, C.8.5.5)


class PixelSize(t.NamedTuple):
    """Width and height of one pixel in millimetres."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image file that could be opened.

    frames: 1, or the pages of a TIFF, or the frames of a DICOM clip.
    pixel_mm: where the file says it, which only DICOM does reliably; None elsewhere.
    sha256: of the file, in hex.
    read: frame number, from 0 → image_HWC, uint8 RGB. Raises: DataError.
    """

    frames: int
    pixel_mm: PixelSize | None
    sha256: str
    read: Callable[[int], np.ndarray]


def find_images(folder: Path, skip: Callable[[Path], bool] = lambda folder: False) -> list[Path]:
    """Every image file below `folder`, sorted; hidden ones left out, links followed, each folder entered once.

    skip: true for a folder that must not be entered.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> t.NoReturn:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): mend that, or name another folder")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        seen.add(os.path.realpath(place))
        paths = [Path(place, name) for name in folders if not name.startswith(".")]
        folders[:] = [path.name for path in paths if os.path.realpath(path) not in seen and not skip(path)]
        found += [path for name in files if not name.startswith(".") and _format(path := Path(place, name))]
    return sorted(found)


def open_picture(path: Path) -> Picture:
    """Read a file and find out what is in it. Raises: DataError if it is no image, or damaged."""
    kind = _format(path)
    if kind is None:
        raise DataError(f"{path.name} is no image that can be read: allowed are {', '.join(FORMATS)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    opened = _open_dicom(content) if kind == "DICOM" else _open_common(content, kind)
    return Picture(sha256=hashlib.sha256(content).hexdigest(), **opened)


def as_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """A PIL image, or an array H x W or H x W x 3 of uint8, as image_HWC: uint8 RGB, what is transparent black.

    Transparent regions of ultrasound are cut-outs outside the scanned sector, which a scanner shows black; bright
    pixels may hide under them. 16-bit grey loses its low byte. Raises: DataError for any other array or mode.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or (image.ndim, image.shape[2:]) not in ((2, ()), (3, (3,))) or not image.size:
            raise DataError(f"an array {image.shape} of {image.dtype}: allowed is uint8, (H, W) or (H, W, 3)")
        return np.array(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))
    if image.mode.startswith("I;16"):
        return as_rgb((np.asarray(image).astype(np.uint32) * 255 // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"its pixels are 32-bit numbers (mode {image.mode}) without a known range: save it with 8 bits")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.array(image.convert("RGB"))  # a copy of its own, which torch may take over


def _format(path: Path) -> str | None:
    known = FORMATS.get(path.suffix.lower())
    if known or path.name in NO_IMAGES:
        return None if path.is_fifo() else known
    if not path.is_file():  # opening a pipe would wait for whoever writes into it
        return None
    try:
        with path.open("rb") as file:
            file.seek(DICOM_MAGIC_AT)
            return "DICOM" if file.read(len(DICOM_MAGIC)) == DICOM_MAGIC else None
    except PermissionError:  # it may be one, and is listed as a reject
        return "DICOM"
    except OSError:
        return None


def _open_common(content: bytes, kind: str) -> dict[str, t.Any]:
    def read(frame: int) -> np.ndarray:
        with _reading(kind), Image.open(io.BytesIO(content), formats=[kind]) as image:
            image.seek(frame)
            return as_rgb(ImageOps.exif_transpose(image))  # upright, as every viewer shows it

    with _reading(kind), Image.open(io.BytesIO(content), formats=[kind]) as image:
        # Further frames of the others are animations and thumbnails.
        frames = getattr(image, "n_frames", 1) if kind == "TIFF" else 1
    return {"frames": frames, "pixel_mm": None, "read": read}


def _open_dicom(content: bytes) -> dict[str, t.Any]:
    import pydicom

    with _reading("DICOM"):
        dataset = pydicom.dcmread(io.BytesIO(content))
        if "PixelData" not in dataset:
            raise DataError("a DICOM file without pixels")
        frames = int(dataset.get("NumberOfFrames") or 1)
        pixel_mm = _dicom_pixel_mm(dataset)

    def read(frame: int) -> np.ndarray:
        with _reading("DICOM"):
            return as_rgb(_dicom_pixels(dataset, frame))

    return {"frames": frames, "pixel_mm": pixel_mm, "read": read}


def _dicom_pixels(dataset: Dataset, frame: int) -> np.ndarray:
    """One frame as a viewer shows it: uint8, H x W or H x W x 3."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
    from pydicom.pixels.utils import pixel_array

    stored = pixel_array(dataset, index=frame)  # colour comes as RGB, whatever it is stored as
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim == 3:
        bits = 16 if kind == "PALETTE COLOR" else dataset.BitsStored  # a palette's colours use all of them
        return stored if stored.dtype == np.uint8 else (stored >> (bits - 8)).astype(np.uint8)
    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence") or dataset.get("WindowWidth"):
        # With these the range follows from the header: what the window makes of the least and the greatest value.
        shown = apply_voi_lut(values, dataset)
        low, high = apply_voi_lut(_extremes(values.dtype, bool(dataset.get("VOILUTSequence"))), dataset)
    elif stored.dtype == np.uint8 and np.array_equal(values, stored):  # a slope of 1 gives a copy as floats
        return stored if kind != "MONOCHROME1" else 255 - stored
    else:  # more than 8 bits and no window: all of it, as viewers do
        shown, (low, high) = values, (values.min(), values.max())
    share = (shown.astype(np.float64) - low) / max(float(high) - float(low), 1e-9)
    grey = np.round(share.clip(0, 1) * 255).astype(np.uint8)
    return 255 - grey if kind == "MONOCHROME1" else grey


def _extremes(dtype: np.dtype[t.Any], table: bool) -> np.ndarray:
    """Values beyond either end of any window; a table is asked with its own integers."""
    if dtype.kind == "f" or not table:
        return np.array([-1e9, 1e9])
    limits = np.iinfo(dtype)
    return np.array([limits.min, limits.max], dtype)


def _dicom_pixel_mm(dataset: Dataset) -> PixelSize | None:
    """From the largest tissue region that is measured in centimetres, else from Pixel Spacing (row, column)."""
    regions = [
        region
        for region in dataset.get("SequenceOfUltrasoundRegions") or ()
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == CENTIMETRES
        and region.get("RegionSpatialFormat", TISSUE) == TISSUE
    ]
    if regions:
        largest = max(regions, key=_area)
        deltas = (largest.get("PhysicalDeltaX"), largest.get("PhysicalDeltaY"))
        if None in deltas:
            return None
        size = PixelSize(*(abs(float(delta)) * 10 for delta in deltas))
    elif spacing := dataset.get("PixelSpacing"):
        size = PixelSize(float(spacing[1]), float(spacing[0]))
    else:
        return None
    return size if all(map(_is_plausible, size)) else None


def _is_plausible(side_mm: float) -> bool:
    """Whether a pixel can be so large; nan cannot."""
    return LEAST_MM <= side_mm <= MOST_MM


def _area(region: Dataset) -> int:
    corners = [int(region.get(f"RegionLocation{name}") or 0) for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


class _reading:
    """Any failure inside → DataError. Pillow and pydicom raise whatever parsing damaged bytes raises."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, *rest: object) -> None:
        if isinstance(error, UnidentifiedImageError):
            raise DataError(f"no {self.kind} image, whatever its name says") from error
        if isinstance(error, Exception) and not isinstance(error, DataError):
            line = " ".join(str(error).split())
            raise DataError(f"no readable {self.kind} ({type(error).__name__}: {line})") from error


def pixel_size(given: float | Sequence[float]) -> PixelSize:
    """One number for square pixels, or (x, y), in millimetres. Raises: DataError for what no pixel has."""
    sides = [float(side) for side in ((given, given) if isinstance(given, numbers.Real) else t.cast(t.Any, given))]
    if len(sides) != 2 or not all(_is_plausible(side) for side in sides):
        raise DataError(
            f"pixel size {given}: allowed is a number of millimetres above 0, from {LEAST_MM} to {MOST_MM:g}, or one "
            "for x and one for y"
        )
    return PixelSize(sides[0], sides[1])
