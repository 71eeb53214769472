"""What the draws need to know of a scan: found once, kept for all epochs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of a lesion's pixels, evenly spaced: enough to tell what share of it leaves the image.
POINTS = 32


@dataclass(frozen=True, slots=True)
class Scan:
    """Facts of the pixels in the cache.

    grey: all channels are equal. counts: how often each grey level occurs, over all channels. points_N2: x and y of
    pixels of the lesion; none of a normal scan.
    """

    grey: bool
    counts: np.ndarray
    points_N2: np.ndarray

    @classmethod
    def of(cls, image_HWC: np.ndarray, mask_HW: np.ndarray) -> Scan:
        """image_HWC, mask_HW: uint8."""
        first_HW = image_HWC[..., :1]
        grey = bool((image_HWC == first_HW).all())
        counts = np.bincount((first_HW if grey else image_HWC).ravel(), minlength=256)
        inside = np.flatnonzero(mask_HW)
        chosen = inside[np.linspace(0, len(inside) - 1, min(POINTS, len(inside))).astype(np.intp)]
        y, x = np.divmod(chosen, mask_HW.shape[1])
        return cls(grey=grey, counts=counts.astype(np.float32), points_N2=np.stack([x, y], axis=1).astype(np.float32))

    def mean_std(self, table: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of the scan's grey levels after `table`, 256 floats."""
        total = float(self.counts.sum())
        mean = float(self.counts @ table) / total
        return mean, max(float(self.counts @ (table - mean) ** 2) / total, 0.0) ** 0.5

    def least_most(self, table: np.ndarray) -> tuple[float, float]:
        """Lowest and highest grey level of the scan after `table`."""
        there = table[self.counts > 0]
        return float(there.min()), float(there.max())
