"""Class and clinical attributes → the caption that a generator draws by (tumor generator 2.2).

The paper's template names the class, the echogenicity (homogeneous or heterogeneous) and the boundary (clear or
unclear). A dataset that records echogenicity and margin, as BrEaST does, speaks for each of its scans; where it is
silent, the prior of BI-RADS speaks for the class: benign lesions are homogeneous with a clear boundary, malignant ones
heterogeneous with an unclear one. The paper's own datasets are silent throughout, and its text says no more than this.
"""

from __future__ import annotations

import typing as t

import numpy as np

from bushpc.conditions.base import Condition, Draw, Scan, Shown
from bushpc.sample import UNLABELLED

NO_CAPTION = ""
HOMOGENEOUS, HETEROGENEOUS = "homogeneous", "heterogeneous"
CLEAR, UNCLEAR = "clear", "unclear"
# The prior: echogenicity and boundary of a class where nothing else is known.
TYPICAL = {"benign": (HOMOGENEOUS, CLEAR), "malignant": (HETEROGENEOUS, UNCLEAR)}
# Values of echogenicity that say that a lesion is not of one kind; all others name the one level of its echo.
MIXED = (HETEROGENEOUS, "complex cystic/solid")
CIRCUMSCRIBED = "circumscribed"
# The paper has lesions only.
NORMAL = "breast ultrasound image without tumor"


def caption(label: str, attributes: t.Mapping[str, t.Any]) -> str:
    """The caption of a scan. label, attributes: as in `bushpc.sample.Sample`, of a real scan or of a drawn prior.

    "breast ultrasound image of malignant tumor with heterogeneous echogenicity and unclear boundary". Without a class,
    it is left out, and so is what neither attributes nor class tell.
    """
    if label == "normal":
        return NORMAL
    echogenicity, boundary = TYPICAL.get(label, (None, None))
    if said := attributes.get("echogenicity"):
        echogenicity = HETEROGENEOUS if said in MIXED else HOMOGENEOUS
    if said := attributes.get("margin"):  # "circumscribed", or "not circumscribed" and how
        boundary = CLEAR if said == CIRCUMSCRIBED else UNCLEAR
    if said := attributes.get("boundary"):
        boundary = said
    parts = [f"{echogenicity} echogenicity"] * bool(echogenicity) + [f"{boundary} boundary"] * bool(boundary)
    tumor = "tumor" if label == UNLABELLED else f"{label} tumor"
    return f"breast ultrasound image of {tumor}" + (f" with {' and '.join(parts)}" if parts else "")


class Caption(Condition):
    """The caption of each scan, in training and evaluation alike."""

    name = "captions"

    def of(self, scan: Scan, mask_HW: np.ndarray) -> str:
        """From label and attributes."""
        return caption(scan.label, scan.attributes)

    def shown(self, variant: str, part: t.Sequence[Scan], draw: Draw) -> Shown:
        """The same."""
        return self.of
