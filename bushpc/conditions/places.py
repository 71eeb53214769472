"""A place in the image as a condition, as SAM reads it: a point on the lesion, or the box around it.

Values are numbers in shares of the image's edges; an empty tuple is none. Variants have the names of the spatial
sentences: `first_pass` (from the model's own first prediction), `oracle` (from the ground-truth mask) and `none`.
"""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass

import numpy as np

from bushpc.conditions.base import Condition, Draw, Scan, Shown
from bushpc.conditions.sentences import largest_component
from bushpc.errors import DataError

Place = tuple[float, ...]


def point_of(mask_HW: np.ndarray) -> Place:
    """(x, y) of the mask's pixel that is farthest from its edge, the first among equals; () for an empty mask."""
    if not mask_HW.any():
        return ()
    from scipy import ndimage  # every command imports this module, and scipy takes half a second

    inside = ndimage.distance_transform_edt(np.pad(mask_HW, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    height, width = mask_HW.shape
    return (float(column) + 0.5) / width, (float(row) + 0.5) / height


def box_of(mask_HW: np.ndarray) -> Place:
    """(left, top, right, bottom) of the mask; () for an empty one."""
    rows, columns = np.nonzero(mask_HW)
    if not len(rows):
        return ()
    height, width = mask_HW.shape
    return (
        float(columns.min()) / width,
        float(rows.min()) / height,
        float(columns.max() + 1) / width,
        float(rows.max() + 1) / height,
    )


OF_MASK: dict[str, t.Callable[[np.ndarray], Place]] = {"point": point_of, "box": box_of}


@dataclass(frozen=True, kw_only=True)
class FirstPlace:
    """The place of the model's own first prediction: threshold, largest component. It never sees a mask."""

    kind: str
    tau: float

    def __call__(self, prob_HW: np.ndarray) -> Place:
        return OF_MASK[self.kind](largest_component(prob_HW >= self.tau))


@dataclass(frozen=True, kw_only=True)
class PlacePrompt(Condition):
    """kind: point or box. dropout, tau: once fitted, of the settings `prompting`."""

    name = "place_prompts"
    absent = ()
    from_mask = True
    column = "place_prompt"
    note = (
        "Unless you give a place (x and y of a point, or left, top, right and bottom of a box, in shares of the "
        "image's edges), it comes from the model's first pass. The numbers of `oracle` above took it from the "
        "ground-truth mask and cannot be reached on a new image."
    )

    kind: str
    dropout: float = 0.0
    tau: float = 0.5

    def fitted(self, training: t.Sequence[Scan], prompting: t.Any) -> PlacePrompt:
        """With the settings."""
        return dataclasses.replace(self, dropout=prompting.spatial_dropout, tau=prompting.tau)

    def left_out(self, draw: Draw, turn: int, key: str) -> bool:
        """A share `dropout` of the samples, so that the model also learns the first pass."""
        return bool(self.dropout) and bool(draw("spatial_dropout", turn, key).random() < self.dropout)

    def of(self, scan: Scan, mask_HW: np.ndarray) -> Place:
        """From the mask as it is now."""
        return OF_MASK[self.kind](mask_HW)

    def shown(self, variant: str, part: t.Sequence[Scan], draw: Draw) -> Shown:
        """`oracle` looks at the mask; all others but `none` wait for the first pass."""
        if variant == "oracle":
            return self.of
        value = self.absent if variant == "none" else self.when_unknown()
        return lambda scan, mask_HW: value

    def when_unknown(self) -> FirstPlace:
        """From the first pass."""
        return FirstPlace(kind=self.kind, tau=self.tau)

    def written(self, value: t.Any) -> str:
        """Three decimals, with spaces between them."""
        return " ".join(f"{share:.3f}" for share in value)

    def from_user(self, given: t.Mapping[str, str]) -> Place | None:
        """The numbers. Raises: DataError."""
        text = super().from_user(given)
        if not text:
            return None
        count = 2 if self.kind == "point" else 4
        try:
            place = tuple(map(float, text.split()))
        except ValueError:
            place = ()
        ordered = count == 2 or (len(place) == 4 and place[0] < place[2] and place[1] < place[3])
        if len(place) != count or not all(0 <= share <= 1 for share in place) or not ordered:
            raise DataError(
                f"{self.column}: '{text}' is no {self.kind}. {count} numbers from 0 to 1 are needed, with spaces "
                f"between them: {'x y' if count == 2 else 'left top right bottom'}, in shares of the image's edges"
            )
        return place

    def mirrored(self, value: t.Any) -> t.Any:
        """The same place in the mirrored image; the first pass sees that anyway."""
        if not isinstance(value, tuple) or not value:
            return value
        if len(value) == 2:
            return 1 - value[0], value[1]
        left, top, right, bottom = value
        return 1 - right, top, 1 - left, bottom

    def state(self) -> dict[str, t.Any]:
        """The threshold of the first pass."""
        return {"tau": self.tau}

    def restored(self, state: t.Mapping[str, t.Any]) -> PlacePrompt:
        """With that of an export."""
        return dataclasses.replace(self, tau=state["tau"])
