"""What `bushpc predict` writes of one frame: pictures, and the mask in other formats.

OUT/masks/…          PNG of 0 and 255; OUT/probabilities/, OUT/uncertainty/ and OUT/overlays/ if asked for
OUT/nifti/…          with --as nifti: 0 and 1, pixel size in millimetres where it is known
OUT/dicom-seg/…      with --as dicom-seg
OUT/coco.json        with --as coco: every frame that was predicted
"""

from __future__ import annotations

import gzip
import io
import typing as t
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from scipy import ndimage

from bushpc.evaluate import dicom_seg
from bushpc.evaluate.predictor import Predictor, Result
from bushpc.files import write_atomically
from bushpc.sample import PixelSize
from bushpc.shards.exchange import to_coco

MASKS, PROBABILITIES, OVERLAYS, UNCERTAINTY = "masks", "probabilities", "overlays", "uncertainty"
COCO, DICOM_SEG, NIFTI = "coco", "dicom-seg", "nifti"
ENDINGS = {DICOM_SEG: ".seg.dcm", NIFTI: ".nii.gz"}  # of the formats with a file a frame
COCO_FILE = "coco.json"
CONTOUR_RGB = (255, 196, 0)
CONTOUR_SHARE = 300  # the contour's width is the image's shorter side divided by this


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame of an input. file: relative to the input folder; path: where it is."""

    file: PurePosixPath
    path: Path
    frame: int
    frames: int


def picture(file: PurePosixPath, frame: int = 0, frames: int = 1) -> PurePosixPath:
    """Where the pictures of an input lie, below masks/ and the like; no two inputs that are there share one."""
    if frames > 1:
        return file / f"{frame:0{len(str(frames - 1))}d}.png"
    return file if file.suffix.lower() == ".png" else file.with_name(f"{file.name}.png")


class Writer:
    """Writes to `out`. kinds: folders of pictures. formats: further ones."""

    def __init__(self, out: Path, kinds: Sequence[str], formats: Sequence[str], predictor: Predictor) -> None:
        self.out, self.kinds, self.formats = out, kinds, formats
        self.algorithm = dicom_seg.Algorithm.of(predictor)

    def places(self, file: PurePosixPath, frame: int, frames: int) -> list[Path]:
        """All files of a frame."""
        png = picture(file, frame, frames)
        return [self.out / kind / png for kind in self.kinds] + [
            self.out / kind / f"{png.with_suffix('')}{ending}"
            for kind, ending in ENDINGS.items()
            if kind in self.formats
        ]

    def write(self, of: Frame, image_HWC: np.ndarray, result: Result) -> None:
        """Raises: DataError for a DICOM file that no SEG can refer to."""
        made: dict[str, Callable[[], bytes]] = {
            MASKS: lambda: _png(result.mask_HW * np.uint8(255)),
            PROBABILITIES: lambda: _png(np.round(result.prob_HW * 255).astype(np.uint8)),
            UNCERTAINTY: lambda: _png(_deviation(result)),
            OVERLAYS: lambda: _png(overlay(image_HWC, result.mask_HW)),
            NIFTI: lambda: nifti(result.mask_HW, result.pixel_mm),
            DICOM_SEG: lambda: dicom_seg.segment(of.path, of.frame, of.frames, result.mask_HW, self.algorithm),
        }
        for path in self.places(of.file, of.frame, of.frames):
            content = made[path.relative_to(self.out).parts[0]]()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

    def finish(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Write what describes all frames together. rows: of predictions.csv, those that are predicted."""
        if COCO in self.formats:
            write_atomically(self.out / COCO_FILE, self._coco(rows))

    def _coco(self, rows: Iterable[Mapping[str, str]]) -> str:
        images: list[to_coco.Entry] = []
        annotations: list[to_coco.Entry] = []
        for number, row in enumerate(rows, 1):
            frame, frames = int(row["frame"]), int(row["frames"])
            sides = (row["pixel_mm_x"], row["pixel_mm_y"])
            images.append(
                {
                    **{
                        "id": number,
                        "file_name": row["file"],
                        "width": int(row["width"]),
                        "height": int(row["height"]),
                    },
                    **{"frame": frame, "frames": frames},
                    "pixel_mm": [float(side) for side in sides] if all(sides) else None,
                }
            )
            mask_HW = np.asarray(Image.open(self.out / MASKS / picture(PurePosixPath(row["file"]), frame, frames))) > 0
            found = to_coco.instances(mask_HW.astype(np.uint8), 1, number, len(annotations) + 1)
            annotations += [{**each, "score": float(row["mean_prob"])} for each in found]
        about = {"description": f"predicted by {self.algorithm.name}", "version": self.algorithm.version}
        return to_coco.text(["lesion"], images, annotations, info={**about, **self.algorithm.parameters})


def require(formats: Sequence[str], files: Iterable[Path]) -> None:
    """Raises: ConfigError for formats whose library is missing, or that these inputs cannot have."""
    if COCO in formats:
        to_coco.require_pycocotools()
    if DICOM_SEG in formats:
        dicom_seg.require(files)


def nifti(mask_HW: np.ndarray, pixel_mm: PixelSize | None) -> bytes:
    """A volume of one slice, which stands upright in viewers and comes back as [1, H, W] from SimpleITK.

    NIfTI's x grows to the patient's right and its y to the front. Viewers show the right on the left and the front on
    top, so both axes of a picture run in the negative direction. Without a pixel size, edges are 1, the unit unknown.
    """
    import nibabel

    x, y = pixel_mm or (1.0, 1.0)
    affine = np.diag([-x, -y, 1.0, 1.0])
    image = nibabel.Nifti1Image(mask_HW.astype(np.uint8).T[..., None], affine)
    image.header.set_xyzt_units("mm" if pixel_mm else "unknown")
    image.set_qform(affine, code="scanner")  # ITK takes no direction from a form whose code is 0
    image.set_sform(affine, code="scanner")
    return gzip.compress(image.to_bytes(), mtime=0)


def overlay(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The image with the mask's contour, drawn inside the mask: what it encloses is what was found."""
    width = max(1, round(min(mask_HW.shape) / CONTOUR_SHARE))
    inside = ndimage.binary_erosion(mask_HW, np.ones((3, 3)), iterations=width)
    drawn = image_HWC.copy()
    drawn[(mask_HW > 0) & ~inside] = CONTOUR_RGB
    return drawn


def _png(pixels: t.Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _deviation(result: Result) -> np.ndarray:
    """8-bit gray, 255 = 0.5, the most that probabilities can deviate; as the evaluator writes it."""
    assert result.uncertainty_HW is not None, "asked before anything was predicted"
    return np.round(result.uncertainty_HW * 2 * 255).astype(np.uint8)
