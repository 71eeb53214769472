"""Users' image files → pixels as in training: uint8 RGB at original size, and the pixel size in millimetres.

    folder ─find_images→ paths ─open_picture→ Picture ─read(frame)→ image_HWC → bushpc.data.cache.resize

Pillow reads PNG, JPEG, TIFF and BMP, pydicom reads DICOM. Any fault of a file is a DataError.
"""

from __future__ import annotations

import hashlib
import io
import os
import typing as t
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bushpc.errors import DataError
from bushpc.sample import PixelSize, is_plausible
from bushpc.shards import pictures

if t.TYPE_CHECKING:
    from pydicom import Dataset

FORMATS = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"},
    **{".dcm": "DICOM", ".dicom": "DICOM"},
}
# Files with other names are DICOM if they have the magic bytes: scanners and archives use IM000001 or the UID as name.
DICOM_MAGIC, DICOM_MAGIC_AT = b"DICM", 128
# The index file of a DICOM medium has the magic bytes but no pixels.
NO_IMAGES = ("DICOMDIR",)
CENTIMETRES, TISSUE = 3, 1  # Physical Units and Region Spatial Format of an ultrasound region (DICOM PS3.3, C.8.5.5)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An opened image file.

    frames: 1, or the number of pages of a TIFF or of frames of a DICOM clip.
    pixel_mm: if the file states it, which only DICOM does reliably; else None.
    sha256: of the file, in hex.
    read: frame number, from 0 → image_HWC, uint8 RGB. Raises: DataError.
    """

    frames: int
    pixel_mm: PixelSize | None
    sha256: str
    read: Callable[[int], np.ndarray]


def find_images(folder: Path, skip: Callable[[Path], bool] = lambda folder: False) -> list[Path]:
    """All image files below `folder`, sorted. Skips hidden ones, follows links, and enters each folder once.

    skip: returns True for a folder that must not be entered.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> t.NoReturn:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): fix that, or give another folder")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        seen.add(os.path.realpath(place))
        paths = [Path(place, name) for name in folders if not name.startswith(".")]
        folders[:] = [path.name for path in paths if os.path.realpath(path) not in seen and not skip(path)]
        found += [path for name in files if not name.startswith(".") and _format(path := Path(place, name))]
    return sorted(found)


def open_picture(path: Path, ranges: pictures.Ranges | None = None) -> Picture:
    """Open an image file. Raises: DataError if it is not an image, or damaged.

    ranges: of 16-bit and float pictures, from `bushpc.shards.pictures.survey`; without, the file is a set of its own.
    """
    kind = _format(path)
    if kind is None:
        raise DataError(f"{path.name} is not an image in a supported format ({', '.join(FORMATS)})")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    opened = _open_dicom(content) if kind == "DICOM" else _open_common(content, kind, ranges)
    return Picture(sha256=hashlib.sha256(content).hexdigest(), **opened)


def as_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """Convert a PIL image, or a uint8 array H x W or H x W x 3, to image_HWC: uint8 RGB, transparent pixels black.

    Transparent regions of ultrasound images lie outside the scanned sector, which a scanner shows black; they may hide
    bright pixels. 16-bit and float pictures are scaled by the rules of `bushpc.shards.pictures`. Raises: DataError for
    any other array, and for pixels that are not numbers.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or (image.ndim, image.shape[2:]) not in ((2, ()), (3, (3,))) or not image.size:
            raise DataError(f"an array {image.shape} of {image.dtype}: it must be uint8, (H, W) or (H, W, 3)")
        return np.array(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))
    return pictures.of_image(image)


def _format(path: Path) -> str | None:
    known = FORMATS.get(path.suffix.lower())
    if known or path.name in NO_IMAGES:
        return None if path.is_fifo() else known
    if not path.is_file():  # opening a pipe would block until someone writes to it
        return None
    try:
        with path.open("rb") as file:
            file.seek(DICOM_MAGIC_AT)
            return "DICOM" if file.read(len(DICOM_MAGIC)) == DICOM_MAGIC else None
    except PermissionError:  # it may be DICOM: list it, so that reading reports the error
        return "DICOM"
    except OSError:
        return None


def _open_common(content: bytes, kind: str, ranges: pictures.Ranges | None) -> dict[str, t.Any]:
    def read(frame: int) -> np.ndarray:
        with _reading(kind):  # upright, as viewers show it
            return pictures.read(io.BytesIO(content), ranges, frame=frame, formats=(kind,), upright=True)

    with _reading(kind), Image.open(io.BytesIO(content), formats=[kind]) as image:
        # In other formats, further frames are animations or thumbnails.
        frames = getattr(image, "n_frames", 1) if kind == "TIFF" else 1
    return {"frames": frames, "pixel_mm": None, "read": read}


def _open_dicom(content: bytes) -> dict[str, t.Any]:
    import pydicom

    with _reading("DICOM"):
        dataset = pydicom.dcmread(io.BytesIO(content))
        if "PixelData" not in dataset:
            raise DataError("the DICOM file has no pixels")
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

    stored = pixel_array(dataset, index=frame)  # converts any colour space to RGB
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim == 3:
        bits = 16 if kind == "PALETTE COLOR" else dataset.BitsStored  # palette colours use all 16 bits
        return stored if stored.dtype == np.uint8 else (stored >> (bits - 8)).astype(np.uint8)
    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence") or dataset.get("WindowWidth"):
        # The header defines the output range: apply the window to the smallest and the largest value.
        shown = apply_voi_lut(values, dataset)
        low, high = apply_voi_lut(_extremes(values.dtype, bool(dataset.get("VOILUTSequence"))), dataset)
    elif stored.dtype == np.uint8 and np.array_equal(values, stored):  # with a slope of 1, values is a float copy
        return stored if kind != "MONOCHROME1" else 255 - stored
    else:  # more than 8 bits and no window: show the full range, as viewers do
        shown, (low, high) = values, (values.min(), values.max())
    share = (shown.astype(np.float64) - low) / max(float(high) - float(low), 1e-9)
    grey = np.round(share.clip(0, 1) * 255).astype(np.uint8)
    return 255 - grey if kind == "MONOCHROME1" else grey


def _extremes(dtype: np.dtype[t.Any], table: bool) -> np.ndarray:
    """Values beyond both ends of any window; a lookup table takes the limits of its integer type."""
    if dtype.kind == "f" or not table:
        return np.array([-1e9, 1e9])
    limits = np.iinfo(dtype)
    return np.array([limits.min, limits.max], dtype)


def _dicom_pixel_mm(dataset: Dataset) -> PixelSize | None:
    """Pixel size from the largest tissue region measured in centimetres, else from Pixel Spacing (row, column)."""
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
    return size if all(map(is_plausible, size)) else None


def _area(region: Dataset) -> int:
    corners = [int(region.get(f"RegionLocation{name}") or 0) for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


class _reading:
    """Context manager: turns any error into a DataError. Pillow and pydicom let any parsing error through."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, *rest: object) -> None:
        if isinstance(error, UnidentifiedImageError):
            raise DataError(f"not a {self.kind} image, despite its name") from error
        if isinstance(error, Exception) and not isinstance(error, DataError):
            line = " ".join(str(error).split())
            raise DataError(f"not a readable {self.kind} image ({type(error).__name__}: {line})") from error
