"""Weights of the filters that workers and device share."""

from __future__ import annotations

import functools

import numpy as np

# The 3 x 3 filter of Pillow's and torchvision's sharpness.
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def kept_rows(edge: int, rows: int) -> np.ndarray:
    """Which `rows` of `edge` rows a lower resolution keeps: those that lie nearest to its own.

    In whole numbers, as OpenCV and torch break ties differently, up to a tenth of all pixels.
    """
    kept: np.ndarray = (2 * np.arange(rows) + 1) * edge // (2 * rows)
    return kept


@functools.lru_cache(maxsize=64)
def blur_kernel(sigma: float) -> np.ndarray:
    """Gaussian weights up to four deviations, as scipy's and nnU-Net's; sum 1, float32."""
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-((np.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    return (weights / weights.sum()).astype(np.float32)
