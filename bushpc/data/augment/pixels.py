"""A change → pixels, in a loader's worker: one warp and one table by OpenCV.

OpenCV 5 interpolates at exact coordinates. OpenCV 4 rounds them to 1/32 of a pixel: up to six grey levels off (4.12).
"""

from __future__ import annotations

import typing as t

import cv2
import numpy as np

from bushpc.data.augment import change as changes
from bushpc.data.augment.affine import Affine
from bushpc.data.augment.change import SIGNAL, Change
from bushpc.data.augment.kernels import SMOOTH, blur_kernel, kept_rows
from bushpc.data.augment.source import source_of

# Outside of the scan is black, as around an ultrasound image.
FLAGS = cv2.WARP_INVERSE_MAP
FLIPS = {(-1.0, 1.0): 1, (1.0, -1.0): 0, (-1.0, -1.0): -1}


def apply(change: Change, image: np.ndarray, mask_SS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """image: S x S or S x S x C, uint8; what is returned has the same shape. mask_SS: bits."""
    cv2.setNumThreads(1)  # a worker has one core, and OpenCV's threads do not survive a fork
    if change.table is not None:
        image = cv2.LUT(image, change.table)
    if change.filters:
        image = image.astype(np.float32)
    if change.moves:
        image, mask_SS = moved(change, image, mask_SS)
    if change.filters:
        image = np.rint(filtered(change, image).clip(0, 255)).astype(np.uint8)
    return image, mask_SS


def first_channel(image_SSC: np.ndarray) -> np.ndarray:
    """S x S: all that there is of a grey scan."""
    channel: np.ndarray = cv2.extractChannel(image_SSC, 0) if image_SSC.shape[2] > 1 else image_SSC[..., 0]
    return channel


def moved(change: Change, image: np.ndarray, mask_SS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image by bilinear interpolation and mask by its nearest pixel, both at the same places of the source."""
    size = mask_SS.shape[1], mask_SS.shape[0]
    if change.bends:
        x, y = (each.contiguous().numpy() for each in source_of(change, size[0]))
        warped = _padded(lambda four: cv2.remap(four, x, y, cv2.INTER_LINEAR), image)
        return warped, cv2.remap(mask_SS, x, y, cv2.INTER_NEAREST)
    assert change.source is not None
    flip = flip_of(change.source, size[0])
    if flip is not None:
        return cv2.flip(image, flip), cv2.flip(mask_SS, flip)
    matrix_23 = np.array(change.source).reshape(2, 3)
    return (
        _padded(lambda four: cv2.warpAffine(four, matrix_23, size, flags=FLAGS | cv2.INTER_LINEAR), image),
        cv2.warpAffine(mask_SS, matrix_23, size, flags=FLAGS | cv2.INTER_NEAREST),
    )


def _padded(warp: t.Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Three channels as four, to be warped: OpenCV 5.0 takes 1.6 times as long for three."""
    if image.ndim == 2 or image.shape[2] != 3:
        return warp(image)
    return cv2.cvtColor(warp(cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)), cv2.COLOR_BGRA2BGR)


def mask_moved(change: Change, mask_SS: np.ndarray) -> np.ndarray:
    """The mask alone, for what a batch says about its lesions before the device moves them."""
    return moved(change, mask_SS, mask_SS)[1] if change.moves else mask_SS


def flip_of(source: Affine, edge: int) -> int | None:
    """OpenCV's word for a map that only flips."""
    a, b, c, d, e, f = source
    exact = not (b or d) and (c, f) == ((edge - 1) * (a < 0), (edge - 1) * (e < 0))
    return FLIPS.get((a, e)) if exact else None


def filtered(change: Change, image: np.ndarray) -> np.ndarray:
    """image: float32, grey levels; neither clipped nor rounded."""
    edge = image.shape[0]
    each = (slice(None), slice(None), None) if image.ndim == 3 else (slice(None), slice(None))
    if change.shadow is not None:
        down, across = change.shadow.profiles(edge, edge)
        image = image * (1 - down[:, None] * across)[each]
    if change.speckle is not None:
        image = image * (1 + _cut(changes.speckle_field(edge), change.speckle, edge))[each]
    for gain in (
        None if change.gain_H is None else change.gain_H[:, None],
        None if change.gain_W is None else change.gain_W[None],
    ):
        if gain is not None:
            image = image + np.broadcast_to(gain, (edge, edge))[each] * np.minimum(image * (1 / SIGNAL), 1)
    if change.noise is not None:
        image = image + _cut(changes.noise_field(edge), change.noise, edge)[each]
    if change.blur is not None:
        across, down = (blur_kernel(sigma) for sigma in change.blur)
        image = cv2.sepFilter2D(image, cv2.CV_32F, across, down, borderType=cv2.BORDER_REFLECT_101)
    if change.lowres:
        rows = kept_rows(edge, change.lowres)
        small = np.ascontiguousarray(image[rows][:, rows])
        image = cv2.resize(small, (edge, edge), interpolation=cv2.INTER_CUBIC)
    if change.sharpness != 1:
        smooth = image.copy()
        smooth[1:-1, 1:-1] = cv2.filter2D(image, cv2.CV_32F, SMOOTH)[1:-1, 1:-1]
        image = smooth + (image - smooth) * np.float32(change.sharpness)
    return image


def _cut(field: np.ndarray, window: changes.Window, edge: int) -> np.ndarray:
    cut: np.ndarray = field[window.top : window.top + edge, window.left : window.left + edge]
    return cut * np.float32(window.factor)
