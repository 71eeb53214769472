"""What XBusNet's released code conditions on, as its folds and data set have it (rmallina14/XBusNet at ba770f6).

p_c has numbers: width and height of the mask's bounding box and its centroid, in pixels of the original image. p_l has
the spreadsheet's own words. In training, p_c is mixed with a picture of another scan that has the same p_l, see
`Highlight`. All three know the ground truth; the release has no first pass.
"""

from __future__ import annotations

import typing as t
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from bushpc.conditions.base import Condition, Draw, Scan, Shown
from bushpc.conditions.sentences import NO_PROMPT, AttributePrompt, centroid
from bushpc.conditions.variants import NO_PROMPTS
from bushpc.conditions.words import refuse_long

BLUR_PX, BLUR_SIGMA = 15, 3.0  # the Gaussian kernel's edge and deviation, in pixels of the network's image
BEHIND = 0.1  # how bright the blurred surroundings of a highlighted lesion are
MARGIN = 0.1  # of its bounding box, on each side, as a share of the box


def numeric_prompt(mask_HW: np.ndarray, height: int, width: int) -> str:
    """p_c of a mask at any resolution; height, width: of the original image, in whose pixels it counts. "" if empty."""
    if not mask_HW.any():
        return NO_PROMPT
    rows, columns = np.nonzero(mask_HW)
    down, across = height / mask_HW.shape[0], width / mask_HW.shape[1]
    size = round(float(np.ptp(columns) + 1) * across), round(float(np.ptp(rows) + 1) * down)
    c_x, c_y = centroid(mask_HW)
    centre = int((c_x + 0.5) * across - 0.5), int((c_y + 0.5) * down - 0.5)
    across_by_down = "\N{MULTIPLICATION SIGN}".join(map(str, size))
    return f"Ultrasound shows a tumor approximately {across_by_down} pixels near ({centre[0]}, {centre[1]})."


def spreadsheet_prompt(attributes: t.Mapping[str, t.Any]) -> str:
    """p_l: "Ultrasound shows a Tumor with oval shaped, circumscribed margin, BIRADS 4a"; "" if nothing is recorded."""
    parts = []
    if shape := attributes.get("shape"):
        parts.append(f"{shape} shaped")
    if margin := attributes.get("margin"):
        parts.append(f"{margin} margin")
    if birads := attributes.get("birads"):
        parts.append(f"BIRADS {birads}")
    return f"Ultrasound shows a Tumor with {', '.join(parts)}" if parts else NO_PROMPT


@dataclass(frozen=True, kw_only=True)
class NumericPrompt(Condition):
    """p_c with the lesion's size and place in pixels, always from the ground-truth mask."""

    name = "spatial_prompts"
    from_mask = True
    column = "spatial_prompt"
    note = (
        "Unless you give a spatial prompt, there is none. In training and validation it held the size and place of the "
        "ground-truth mask in pixels: without it, expect lower scores."
    )

    def of(self, scan: Scan, mask_HW: np.ndarray) -> str:
        """From the mask as it is now, in pixels of the original image."""
        return numeric_prompt(mask_HW, scan.height, scan.width)

    def shown(self, variant: str, part: t.Sequence[Scan], draw: Draw) -> Shown:
        """From the mask in every variant but `none`."""
        return (lambda scan, mask_HW: NO_PROMPT) if variant == NO_PROMPTS.name else self.of

    def from_user(self, given: t.Mapping[str, str]) -> str | None:
        """The sentence. Raises: DataError."""
        sentence = super().from_user(given)
        return refuse_long(sentence, self.column) if sentence else None


@dataclass(frozen=True, kw_only=True)
class SpreadsheetPrompt(AttributePrompt):
    """p_l in the words of the release."""

    def worded(self, attributes: t.Mapping[str, t.Any]) -> str:
        """As its folds have it."""
        return spreadsheet_prompt(attributes)


@dataclass(frozen=True, kw_only=True)
class Highlight(Condition):
    """A picture of a training scan with the same p_l, possibly the same scan; None where no other has it.

    float32, S x S x 3, normalised by `mean` and `std`: the lesion before its blurred and darkened surroundings, cropped
    to the lesion and padded to a square. Only training sees it. partners: key → keys of the scans to choose from.
    """

    name = "highlights"
    absent = None
    from_pixels = True

    mean: tuple[float, ...]
    std: tuple[float, ...]
    partners: t.Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fitted(self, training: t.Sequence[Scan], prompting: t.Any) -> Highlight:
        """With the training part in groups of equal p_l."""
        groups = defaultdict(list)
        for scan in training:
            groups[spreadsheet_prompt(scan.attributes)].append(scan.key)
        partners = {key: tuple(keys) for keys in groups.values() for key in keys}
        return Highlight(mean=self.mean, std=self.std, partners=partners)

    @property
    def is_fitted(self) -> bool:
        """A trained model predicts without."""
        return False

    def partner(self, draw: Draw, turn: int, key: str) -> str | None:
        """One of the group, drawn anew at every turn."""
        keys = self.partners.get(key, ())
        return keys[int(draw("highlight", turn, key).integers(len(keys)))] if len(keys) > 1 else None

    def of(self, scan: Scan, mask_HW: np.ndarray) -> None:
        """Nothing: it is made of another scan's pixels."""
        return

    def shown(self, variant: str, part: t.Sequence[Scan], draw: Draw) -> Shown:
        """Nothing: evaluation reads the sentence alone."""
        return self.of

    def pictured(self, image_SSC: np.ndarray, mask_SS: np.ndarray) -> np.ndarray:
        """The picture."""
        import cv2  # large

        x = ((image_SSC.astype(np.float32) / 255 - self.mean) / self.std).astype(np.float32)
        behind = BEHIND * cv2.GaussianBlur(x, (BLUR_PX, BLUR_PX), BLUR_SIGMA)
        lesion_SS = mask_SS > 0
        x = np.where(lesion_SS[..., None], x, behind)
        rows, columns = (_with_margin(np.asarray(lesion_SS.any(axis=axis))) for axis in (1, 0))
        return _square(x[rows, columns], len(mask_SS))


def _with_margin(hit_S: np.ndarray) -> slice:
    """From the first hit to the last and `MARGIN` more on each side; all of an axis without a hit."""
    first, end = (int(hit_S.argmax()), len(hit_S) - int(hit_S[::-1].argmax()))
    margin = MARGIN * (end - first)
    return slice(int(max(0, first - margin)), int(min(len(hit_S), end + margin)))


def _square(x_HWC: np.ndarray, size: int) -> np.ndarray:
    """Padded with zeros to a square, the odd line behind; then size x size by nearest neighbour, floor(i in / out)."""
    height, width = x_HWC.shape[:2]
    edge = max(height, width)
    square = np.zeros((edge, edge, x_HWC.shape[2]), x_HWC.dtype)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = x_HWC
    nearest = (np.arange(size, dtype=np.float32) * np.float32(edge / size)).astype(int)  # in float32, as torch
    return square[np.ix_(nearest, nearest)]
