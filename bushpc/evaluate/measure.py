"""Lesion mask → what a sonographer measures: area, long and short axis, place; in pixels and, if known, millimetres.

A pixel is a square, and the mask is the region that its pixels cover: a rectangle of a x b pixels has the area a b
and the long axis sqrt(a² + b²), and a single pixel a long axis of sqrt(2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist, squareform

from bushpc.conditions.sentences import centroid, largest_component
from bushpc.sample import PixelSize


@dataclass(frozen=True, kw_only=True)
class Measures:
    """A measured mask. Lengths and the centroid are of the largest 8-connected component, the area is of all.

    pixel_mm: None where the size of a pixel is not known; then so is everything in millimetres.
    components: how many parts the mask has.
    long_axis: the greatest distance between two points of the lesion (maximum Feret diameter).
    short_axis: the lesion's greatest extent perpendicular to the long axis.
    centroid_px: (x, y) as column and row, from 0, of pixel centres (XBusNet, eq. 1). centroid_mm: (x, y) from the
        image's left and upper edge. Both None for an empty mask, whose axes are 0.
    """

    pixel_mm: PixelSize | None
    components: int
    area_px: int
    area_mm2: float | None
    long_axis_px: float
    short_axis_px: float
    long_axis_mm: float | None
    short_axis_mm: float | None
    centroid_px: tuple[float, float] | None
    centroid_mm: tuple[float, float] | None


def measure(mask_HW: np.ndarray, pixel_mm: PixelSize | None) -> Measures:
    """Measure a mask of 0 and 1 at original size. pixel_mm may differ in x and y: axes follow the real distances."""
    mask_HW = mask_HW.astype(bool)
    components = int(ndimage.label(mask_HW, structure=np.ones((3, 3)))[1])
    area_px = int(mask_HW.sum())
    largest = largest_component(mask_HW)
    corners = _corners(largest)
    long_px, short_px = _axes(corners)
    long_mm, short_mm = _axes(corners * np.array(pixel_mm)) if pixel_mm else (None, None)
    x, y = centroid(largest) if area_px else (0.0, 0.0)
    return Measures(
        pixel_mm=pixel_mm,
        components=components,
        area_px=area_px,
        area_mm2=area_px * pixel_mm.x * pixel_mm.y if pixel_mm else None,
        long_axis_px=long_px,
        short_axis_px=short_px,
        long_axis_mm=long_mm,
        short_axis_mm=short_mm,
        centroid_px=(x, y) if area_px else None,
        centroid_mm=((x + 0.5) * pixel_mm.x, (y + 0.5) * pixel_mm.y) if area_px and pixel_mm else None,
    )


def _corners(mask_HW: np.ndarray) -> np.ndarray:
    """(x, y) of the outermost pixel corners of every row: their convex hull is that of the whole region."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    left = mask_HW[rows].argmax(axis=1)
    right = mask_HW.shape[1] - mask_HW[rows, ::-1].argmax(axis=1)
    return np.stack([np.tile(np.concatenate([left, right]), 2), np.concatenate([rows, rows, rows + 1, rows + 1])], 1)


def _axes(points_N2: np.ndarray) -> tuple[float, float]:
    if not len(points_N2):
        return 0.0, 0.0
    hull = points_N2[ConvexHull(points_N2).vertices].astype(float)
    distances = squareform(pdist(hull))
    a, b = np.unravel_index(int(distances.argmax()), distances.shape)
    long_axis = float(distances[a, b])
    across = (hull[b] - hull[a])[::-1] * (1, -1) / long_axis
    return long_axis, float(np.ptp(hull @ across))
