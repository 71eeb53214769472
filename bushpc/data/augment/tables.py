"""Changes of grey levels as tables of 256 entries: what each level becomes.

    levels ─brightness, contrast, gain, gamma …→ levels ─rounded→ table, applied in one pass

A table is made from a scan's histogram, so that means and standard deviations are those of the whole scan.
"""

from __future__ import annotations

import numpy as np

from bushpc.data.augment.scan import Scan

LEVELS = np.arange(256, dtype=np.float32)


def brightness(levels: np.ndarray, factor: float) -> np.ndarray:
    """As torchvision's: multiplied and clipped."""
    return np.clip(levels * factor, 0, 255)


def contrast(levels: np.ndarray, factor: float, scan: Scan) -> np.ndarray:
    """As torchvision's: the distance from the mean grey is multiplied, and the result clipped."""
    mean, _ = scan.mean_std(levels)
    return np.clip(mean + (levels - mean) * factor, 0, 255)


def gamma(levels: np.ndarray, exponent: float, scan: Scan, *, inverted: bool = False) -> np.ndarray:
    """As nnU-Net's: a power of the grey levels between the scan's lowest and highest, mean and deviation restored."""
    if inverted:
        return -gamma(-levels, exponent, scan)
    mean, std = scan.mean_std(levels)
    least, most = scan.least_most(levels)
    span = max(most - least, 1e-7)
    curved = np.clip((levels - least) / span, 0, 1) ** exponent * span + least
    mean_after, std_after = scan.mean_std(curved)
    return (curved - mean_after) * (std / max(std_after, 1e-7)) + mean


def posterise(levels: np.ndarray, bits: int) -> np.ndarray:
    """Only the highest bits are kept."""
    return (rounded(levels) & np.uint8(256 - (1 << (8 - bits)))).astype(np.float32)


def solarise(levels: np.ndarray, threshold: float) -> np.ndarray:
    """Levels from `threshold` on are inverted."""
    return np.where(levels >= threshold, 255 - levels, levels)


def autocontrast(levels: np.ndarray, scan: Scan) -> np.ndarray:
    """The scan's lowest level becomes 0, its highest 255."""
    least, most = scan.least_most(levels)
    return np.clip((levels - least) * (255 / (most - least)), 0, 255) if most > least else levels


def equalise(levels: np.ndarray, scan: Scan) -> np.ndarray:
    """A flat histogram, as far as whole levels allow: as Pillow's and torchvision's."""
    values = rounded(levels)
    counts = np.bincount(values, weights=scan.counts, minlength=256)
    there = counts[counts > 0]
    step = int(there[:-1].sum()) // 255
    if step == 0:
        return levels
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.clip((below + step // 2) // step, 0, 255).astype(np.float32)[values]


def rounded(levels: np.ndarray) -> np.ndarray:
    """The table: whole levels from 0 to 255."""
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
