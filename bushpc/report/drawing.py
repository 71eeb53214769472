"""Image, mask, probability or heat map → one picture as a data URI."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

from bushpc.report.figures import DEVIATION_COLOURS

EDGE = 400  # longest side of a picture on the page, in pixels
SMALL_EDGE = 260  # of one of many
_CONTOUR = (255, 214, 10)
_FALSE_POSITIVE = (58, 134, 255)
_FALSE_NEGATIVE = (255, 59, 48)
_OPACITY = 0.75
_HEAT = 0.55  # weight of the heat map where it is hottest


def errors_of(
    image_HWC: np.ndarray, mask_HW: np.ndarray, prob_HW: np.ndarray, threshold: float, edge: int = EDGE
) -> str:
    """The image with errors in colour, in its own aspect ratio.

    The prediction was made on an image squeezed to a square, so it is stretched back first.
    """
    size = size_of(mask_HW, edge)
    truth = _truth(mask_HW, size)
    found = np.asarray(Image.fromarray(prob_HW).resize(size, Image.Resampling.BILINEAR)) >= threshold * 255
    overlay = _resized(image_HWC, size).astype(float)
    for wrong, colour in ((found & ~truth, _FALSE_POSITIVE), (truth & ~found, _FALSE_NEGATIVE)):
        overlay[wrong] = (1 - _OPACITY) * overlay[wrong] + _OPACITY * np.array(colour)
    return _jpeg(overlay.astype(np.uint8))


def contour_of(image_HWC: np.ndarray, mask_HW: np.ndarray, edge: int) -> str:
    """The image with the ground-truth contour of each mask class (bit of the mask)."""
    size = size_of(mask_HW, edge)
    contour = _resized(image_HWC, size).copy()
    for k in range(int(mask_HW.max()).bit_length()):
        truth = _truth(mask_HW >> k & 1, size)
        contour[ndimage.binary_dilation(truth) & ~ndimage.binary_erosion(truth, iterations=1)] = _CONTOUR
    return _jpeg(contour)


def heat_of(image_HWC: np.ndarray, cam_HW: np.ndarray) -> str:
    """The image under a Grad-CAM map; hotter is redder and less transparent."""
    size = size_of(image_HWC[..., 0], SMALL_EDGE)
    cam = np.asarray(Image.fromarray(cam_HW).resize(size, Image.Resampling.BILINEAR)) / 255
    colour_HWC = 255 * matplotlib.colormaps["turbo"](cam)[..., :3]
    weight_HW1 = _HEAT * cam[..., None]
    image = _resized(image_HWC, size)
    return _jpeg((image * (1 - weight_HW1) + colour_HWC * weight_HW1).astype(np.uint8))


def deviation_of(map_HW: np.ndarray, size: tuple[int, int]) -> str:
    """A map of the standard deviation; the colour scale is the same on every page.

    map_HW: uint8, 255 = MOST_DEVIATION.
    """
    larger = np.asarray(Image.fromarray(map_HW).resize(size, Image.Resampling.BILINEAR)) / 255
    return _jpeg((255 * matplotlib.colormaps[DEVIATION_COLOURS](larger)[..., :3]).astype(np.uint8))


def size_of(mask_HW: np.ndarray, edge: int) -> tuple[int, int]:
    """(width, height) with `edge` as the longest."""
    height, width = mask_HW.shape
    scale = edge / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS))


def _truth(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    whole = Image.fromarray((mask_HW > 0).astype(np.uint8) * 255)
    return np.asarray(whole.resize(size, Image.Resampling.BILINEAR)) > 127


def _jpeg(image_HWC: np.ndarray) -> str:
    """JPEG without chroma subsampling: a fifth of the PNG, and the thin coloured edges stay sharp."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
