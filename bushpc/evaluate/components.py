"""Post-processing of a mask: fill holes, drop small parts, keep the largest. SciPy; no torch.

Parts touch at sides or corners, and holes are what the outside does not reach by sides: as everywhere here
(`bushpc.metrics.mask.betti_numbers`).
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bushpc.runs.chosen import PLAIN, Rule

_AROUND = np.ones((3, 3))


def processed(mask_HW: np.ndarray, rule: Rule) -> np.ndarray:
    """The mask after a rule, of its own type. Of equally large parts the first in reading order stays."""
    if rule == PLAIN:
        return mask_HW
    found_HW = mask_HW > 0
    if rule.fill:
        found_HW = ndimage.binary_fill_holes(found_HW)
    if rule.smallest or rule.largest:
        parts_HW, count = ndimage.label(found_HW, structure=_AROUND)
        area_P = np.bincount(parts_HW.ravel(), minlength=count + 1)[1:]
        stays_P = area_P >= rule.smallest * found_HW.size
        if rule.largest and stays_P.any():
            stays_P = np.arange(count) == np.where(stays_P, area_P, 0).argmax()
        found_HW = np.concatenate([[False], stays_P])[parts_HW]
    return np.asarray(found_HW).astype(mask_HW.dtype)
