"""Clinical facts → sentences (XBusNet 2.2, 2.7, 2.8). The only place that words a prompt.

Spatial prompt p_c: lesion size (small, medium, large) and breast quadrant. Attribute prompt p_l: shape, margin,
BI-RADS, read from the metadata. The image's left half is called inner and its right half outer: the public data
do not say which breast was scanned, so the word is a consistent name for a place in the image, not anatomy.

Size is the square root of the lesion's share of the image, so that a mask and a first-pass proposal are measured
alike at any resolution. The paper reads it from the metadata, but the published table holds none.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t
from dataclasses import dataclass

import numpy as np

from bushpc.conditions.base import Condition, Draw, Scan, Shown
from bushpc.conditions.words import descriptor, refuse_long
from bushpc.errors import DataError

NO_PROMPT = ""
OPPOSITE = {"upper": "lower", "lower": "upper", "inner": "outer", "outer": "inner"}


@dataclass(frozen=True, kw_only=True)
class SizeBins:
    """small < low <= medium < high <= large; fixed per fold from its training part (paper 2.7)."""

    low: float
    high: float

    @classmethod
    def from_training(cls, shares: t.Sequence[float], quantiles: tuple[float, ...]) -> SizeBins:
        """shares: lesion pixels / image pixels of each training lesion. Raises: DataError without any lesion."""
        sizes = [share**0.5 for share in shares if share > 0]
        if not sizes:
            raise DataError("no lesion in the training part: size quantiles need at least one mask that is not empty")
        low, high = np.quantile(sizes, quantiles)
        return cls(low=float(low), high=float(high))

    def word(self, share: float) -> str:
        """The size word of a lesion that covers `share` of its image."""
        size = share**0.5
        return "small" if size < self.low else "medium" if size < self.high else "large"

    def wrong_word(self, share: float) -> str:
        """The size word that is farthest from the truth; of a medium lesion that beyond the farther boundary."""
        size = share**0.5
        return "large" if size - self.low < self.high - size else "small"


@dataclass(frozen=True, kw_only=True)
class FirstPass:
    """The spatial prompt of the model's own first pass (paper 2.7): threshold, largest component, its centroid.

    It stands in `Batch.conditions` in place of a sentence, until there is a first prediction. It never sees a mask.
    """

    bins: SizeBins
    tau: float

    def __call__(self, prob_HW: np.ndarray) -> str:
        """A sentence; "" where nothing reaches the threshold."""
        return spatial_prompt(largest_component(prob_HW >= self.tau), self.bins)


def centroid(mask_HW: np.ndarray) -> tuple[float, float]:
    """(C_x, C_y) = (M10 / M00, M01 / M00) of a non-empty mask, in pixels (eq. 1)."""
    rows, columns = np.nonzero(mask_HW)
    return float(columns.mean()), float(rows.mean())


def largest_component(mask_HW: np.ndarray) -> np.ndarray:
    """The largest 8-connected component of a boolean map; the first in reading order among equals."""
    from scipy import ndimage  # every command imports this module, and scipy takes half a second

    labels, count = ndimage.label(mask_HW, structure=np.ones((3, 3)))
    if count <= 1:
        return mask_HW
    sizes = np.bincount(labels.ravel())[1:]
    return labels == 1 + int(sizes.argmax())


def spatial_prompt(mask_HW: np.ndarray, bins: SizeBins) -> str:
    """p_c for a lesion mask, or a proposal, of any resolution; "" if it is empty."""
    return _spatial(bins.word(float(mask_HW.mean())), *_quadrant(mask_HW)) if mask_HW.any() else NO_PROMPT


def wrong_size_prompt(mask_HW: np.ndarray, bins: SizeBins) -> str:
    """p_c with its size word falsified, everything else as `spatial_prompt` has it."""
    return _spatial(bins.wrong_word(float(mask_HW.mean())), *_quadrant(mask_HW)) if mask_HW.any() else NO_PROMPT


def wrong_quadrant_prompt(mask_HW: np.ndarray, bins: SizeBins) -> str:
    """p_c with the diagonally opposite quadrant, everything else as `spatial_prompt` has it."""
    if not mask_HW.any():
        return NO_PROMPT
    vertical, horizontal = _quadrant(mask_HW)
    return _spatial(bins.word(float(mask_HW.mean())), OPPOSITE[vertical], OPPOSITE[horizontal])


def attribute_prompt(attributes: t.Mapping[str, t.Any]) -> str:
    """p_l from the metadata: "irregular shape, not circumscribed angular and indistinct margin, BI-RADS 4c".

    What is not recorded is left out; nothing recorded gives "".
    """
    parts = []
    if shape := attributes.get("shape"):
        parts.append(f"{shape} shape")
    if margin := attributes.get("margin"):
        parts.append(f"{_spoken(str(margin))} margin")
    if birads := attributes.get("birads"):
        parts.append(f"BI-RADS {birads}")
    return ", ".join(parts)


def _quadrant(mask_HW: np.ndarray) -> tuple[str, str]:
    """Where the centroid of a non-empty mask lies."""
    height, width = mask_HW.shape
    c_x, c_y = centroid(mask_HW)
    return "upper" if c_y < (height - 1) / 2 else "lower", "inner" if c_x < (width - 1) / 2 else "outer"


def _spatial(size: str, vertical: str, horizontal: str) -> str:
    return f"a {size} lesion in the {vertical} {horizontal} quadrant of the breast"


def _spoken(value: str) -> str:
    """Several values are joined with & in the spreadsheet, and " - " separates a term from its kinds."""
    return value.replace(" - ", " ").replace("&", " and ")


# Descriptors of an attribute prompt, as columns of a user's table name them.
ATTRIBUTES = ("shape", "margin", "birads")
# Sources of spatial prompts that read the ground-truth mask at evaluation; every other one is blind to it.
FROM_MASK: dict[str, t.Callable[[np.ndarray, SizeBins], str]] = {
    "oracle": spatial_prompt,
    "wrong_size": wrong_size_prompt,
    "wrong_quadrant": wrong_quadrant_prompt,
}


@dataclass(frozen=True, kw_only=True)
class SpatialPrompt(Condition):
    """p_c. bins, dropout, tau: once fitted, of the fold and of the settings `prompting`."""

    name = "spatial_prompts"
    from_mask = True
    column = "spatial_prompt"
    note = (
        "Unless you give a spatial prompt, it comes from the model's first pass. The numbers of `oracle` above took it "
        "from the ground-truth mask and cannot be reached on a new image. Inner and outer are the image's left and "
        "right half, not anatomy."
    )

    bins: SizeBins | None = None
    dropout: float = 0.0
    tau: float = 0.5

    def fitted(self, training: t.Sequence[Scan], prompting: t.Any) -> SpatialPrompt:
        """With size bins of the training part. Raises: DataError without any lesion."""
        shares = [scan.lesion_pixels / (scan.height * scan.width) for scan in training if scan.lesion_pixels]
        bins = SizeBins.from_training(shares, prompting.size_quantiles)
        return SpatialPrompt(bins=bins, dropout=prompting.spatial_dropout, tau=prompting.tau)

    def left_out(self, draw: Draw, turn: int, key: str) -> bool:
        """A share `dropout` of the samples, so that the model also learns the first pass."""
        return bool(self.dropout) and bool(draw("spatial_dropout", turn, key).random() < self.dropout)

    def of(self, scan: Scan, mask_HW: np.ndarray) -> str:
        """From the mask as it is now: a flip moves the lesion to another quadrant."""
        return spatial_prompt(mask_HW, self._bins)

    def shown(self, variant: str, part: t.Sequence[Scan], draw: Draw) -> Shown:
        """`oracle` and its falsifications look at the mask; all others but `none` wait for the first pass."""
        bins, worded = self._bins, FROM_MASK.get(variant)
        if worded:
            return lambda scan, mask_HW: worded(mask_HW, bins)
        value = NO_PROMPT if variant == "none" else self.when_unknown()
        return lambda scan, mask_HW: value

    def when_unknown(self) -> FirstPass:
        """From the first pass."""
        return FirstPass(bins=self._bins, tau=self.tau)

    def from_user(self, given: t.Mapping[str, str]) -> str | None:
        """The sentence. Raises: DataError."""
        sentence = super().from_user(given)
        return refuse_long(sentence, self.column) if sentence else None

    def mirrored(self, value: t.Any) -> t.Any:
        """Inner and outer change places; the first pass sees the mirrored image anyway."""
        return re.sub(r"\b(inner|outer)\b", lambda word: OPPOSITE[word[0]], value) if isinstance(value, str) else value

    def state(self) -> dict[str, t.Any]:
        """Size bins and threshold of the first pass."""
        return {"size_bins": dataclasses.asdict(self._bins), "tau": self.tau}

    def restored(self, state: t.Mapping[str, t.Any]) -> SpatialPrompt:
        """With those of an export."""
        return SpatialPrompt(bins=SizeBins(**state["size_bins"]), tau=state["tau"])

    @property
    def _bins(self) -> SizeBins:
        assert self.bins is not None, "it was fitted"
        return self.bins


@dataclass(frozen=True, kw_only=True)
class AttributePrompt(Condition):
    """p_l."""

    name = "attribute_prompts"
    column = "attribute_prompt"
    note = (
        "Unless you give an attribute prompt, there is none. In the validation it came from the dataset's clinical "
        "table, where that has one: without it, expect lower scores."
    )

    def worded(self, attributes: t.Mapping[str, t.Any]) -> str:
        """The sentence on these attributes."""
        return attribute_prompt(attributes)

    def of(self, scan: Scan, mask_HW: np.ndarray) -> str:
        """From the clinical table."""
        return self.worded(scan.attributes)

    def shown(self, variant: str, part: t.Sequence[Scan], draw: Draw) -> Shown:
        """Its own sentence; with `shuffled_attributes` that of another patient."""
        if variant != "shuffled_attributes":
            return self.of
        another = _attributes_of_another(part, draw, self.worded)
        return lambda scan, mask_HW: another(scan.key)

    @property
    def user_columns(self) -> tuple[str, ...]:
        """The sentence's, and those of its attributes."""
        return (self.column, *ATTRIBUTES)

    def from_user(self, given: t.Mapping[str, str]) -> str | None:
        """The sentence, or the attributes shape, margin and birads, worded as in training. Raises: DataError."""
        if sentence := super().from_user(given):
            return refuse_long(sentence, self.column)
        return self.worded({name: descriptor(name, given.get(name) or "") for name in ATTRIBUTES}) or None


def _attributes_of_another(
    part: t.Sequence[Scan], draw: Draw, worded: t.Callable[[t.Mapping[str, t.Any]], str]
) -> t.Callable[[str], str]:
    """Sample key → an attribute prompt that is wrong for it: another sentence, of another patient in `part`.

    Drawn by seed and key alone. If all other patients have the same sentence or none, it is one of theirs; if there is
    no other patient, "".
    """
    patients = {scan.key: scan.patient for scan in part}
    sentences = {scan.key: worded(scan.attributes) for scan in part}
    keys = list(patients)

    def drawn(key: str) -> str:
        order = draw("shuffled_attributes", key).permutation(len(keys))
        others = [sentences[keys[i]] for i in order if patients[keys[i]] != patients[key]]
        wrong = (sentence for sentence in others if sentence not in (sentences[key], NO_PROMPT))
        return next(wrong, others[0] if others else NO_PROMPT)

    return drawn
