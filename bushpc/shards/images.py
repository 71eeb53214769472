"""Users' image files → pixels as in training: uint8 RGB at original size, and the pixel size in millimetres.

    folder ─find_images→ paths ─open_picture→ Picture ─read(frame)→ image_HWC → bushpc.data.square.resize

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
from bushpc.files import is_litter
from bushpc.sample import PixelSize, Region, Regions, is_plausible
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
# What Pillow refuses as a decompression bomb; and more frames than any clip has.
MOST_PIXELS = 178_956_970
MOST_FRAMES = 100_000
# DICOM names what a file holds. Segmentations, reports, dose and presentation states are no pictures, whatever they
# hold; what has no public name may be one.
IMAGE_STORAGE = ("Image", "Volume")
# Physical Units, Region Spatial Format and Region Data Type of an ultrasound region (DICOM PS3.3, C.8.5.5).
CENTIMETRES, TISSUE, B_MODE = 3, 1, 1


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An opened image file.

    frames: 1, or the number of pages of a TIFF or of frames of a DICOM clip.
    pixel_mm: if the file states one for the whole picture, which only DICOM does reliably; else None.
    regions: of an ultrasound image, calibrated one by one: millimetres then depend on where the lesion lies.
    sha256: of the file, in hex.
    read: frame number, from 0 → image_HWC, uint8 RGB. Raises: DataError.
    notes: what the user should know of it, such as burned-in text.
    """

    frames: int
    pixel_mm: PixelSize | None
    sha256: str
    read: Callable[[int], np.ndarray]
    regions: Regions | None = None
    notes: tuple[str, ...] = ()

    @property
    def scale(self) -> PixelSize | Regions | None:
        """The regions, if there are any, else the size of every pixel."""
        return self.regions or self.pixel_mm


def check_dicom_size(dataset: Dataset) -> None:
    """A header may promise any size; decoders of compressed pixels take the memory before they read the first one.

    Raises: DataError for more pixels or frames than Pillow would take, or an ultrasound clip can have.
    """
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if rows * columns > MOST_PIXELS or not 0 < frames <= MOST_FRAMES:
        raise DataError(
            f"{frames} frames of {columns}x{rows} pixels; allowed: 1 to {MOST_FRAMES:,} frames of at most "
            f"{MOST_PIXELS:,} pixels"
        )


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
        paths = [Path(place, name) for name in folders if not is_litter(name)]
        folders[:] = [path.name for path in paths if os.path.realpath(path) not in seen and not skip(path)]
        paths = [Path(place, name) for name in files if not is_litter(name)]
        found += [path for path in paths if (kind := _format(path)) and not (kind == "DICOM" and _is_other_dicom(path))]
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


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its name or its first bytes."""
    return _format(path) == "DICOM"


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


def _is_other_dicom(path: Path) -> bool:
    """Whether a DICOM file says that it holds something else than a picture: a segmentation, a report."""
    from pydicom.filereader import read_file_meta_info

    try:
        return not holds_image(read_file_meta_info(path).get("MediaStorageSOPClassUID"))
    except Exception:  # damaged: reading it reports that
        return False


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
        if not holds_image(dataset.get("SOPClassUID")):
            raise DataError(f"the DICOM file holds no picture, but {dataset.SOPClassUID.name}")
        if "PixelData" not in dataset:
            raise DataError("the DICOM file has no pixels")
        check_dicom_size(dataset)
        frames = int(dataset.get("NumberOfFrames") or 1)
        scale, notes = _dicom_scale(dataset)
        if dataset.get("BurnedInAnnotation") == "YES":
            notes.append("has burned-in text (BurnedInAnnotation)")

    def read(frame: int) -> np.ndarray:
        with _reading("DICOM"):
            try:
                return as_rgb(_dicom_pixels(dataset, frame))
            except RuntimeError as error:  # pydicom has no decoder for this compression
                if "plugin" not in str(error) and "missing dependencies" not in str(error):
                    raise
                name = dataset.file_meta.TransferSyntaxUID.name
                raise DataError(
                    f"its compression, {name}, cannot be decoded here: pip install 'bushpc[dicom]' installs decoders "
                    f"({' '.join(str(error).split())})"
                ) from error

    regions = scale if isinstance(scale, Regions) else None
    pixel_mm = regions.pixel_mm(np.zeros((1, 1))) if regions else scale
    return {"frames": frames, "pixel_mm": pixel_mm, "regions": regions, "read": read, "notes": tuple(notes)}


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


def holds_image(sop_class: t.Any) -> bool:
    """Whether objects of a DICOM class are pictures."""
    name = str(getattr(sop_class, "name", ""))
    public = bool(name) and name != str(sop_class)
    return not public or any(word in name for word in IMAGE_STORAGE)


def _dicom_scale(dataset: Dataset) -> tuple[PixelSize | Regions | None, list[str]]:
    """Pixel size by region, else from Pixel Spacing (row, column); and what the user should know of either.

    A region that reaches beyond the picture shows that the picture was shrunk or cropped after its calibration. Its
    scale would then be wrong, so there is none.
    """
    described = list(dataset.get("SequenceOfUltrasoundRegions") or ())
    if not described:
        spacing = dataset.get("PixelSpacing")
        return _plausible(PixelSize(float(spacing[1]), float(spacing[0]))) if spacing else None, []
    regions = Regions(map(_region, described))
    notes = []
    views = [one for one, region in zip(described, regions, strict=True) if region.pixel_mm and _is_b_mode(one)]
    if len(views) > 1:
        notes.append(f"shows {len(views)} views side by side, which are predicted as one picture")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    beyond = [region for region in regions if region.right > columns or region.bottom > rows]
    if beyond:
        notes.append(
            f"no millimetres: a calibrated region ends at column {beyond[0].right}, row {beyond[0].bottom}, but the "
            f"picture has {columns} columns and {rows} rows; it was shrunk or cropped after its calibration"
        )
        return None, notes
    return regions if any(region.pixel_mm for region in regions) else None, notes


def _region(described: Dataset) -> Region:
    corners = [int(described.get(f"RegionLocation{name}") or 0) for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
    deltas = (described.get("PhysicalDeltaX"), described.get("PhysicalDeltaY"))
    calibrated = (
        described.get("PhysicalUnitsXDirection") == described.get("PhysicalUnitsYDirection") == CENTIMETRES
        and described.get("RegionSpatialFormat", TISSUE) == TISSUE
        and None not in deltas
    )
    size = PixelSize(*(round(abs(float(t.cast(t.Any, delta))) * 10, 12) for delta in deltas)) if calibrated else None
    left, top, right, bottom = corners
    return Region(left, top, right, bottom, _plausible(size))


def _is_b_mode(described: Dataset) -> bool:
    return described.get("RegionDataType", B_MODE) == B_MODE


def _plausible(size: PixelSize | None) -> PixelSize | None:
    return size if size and all(map(is_plausible, size)) else None


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
