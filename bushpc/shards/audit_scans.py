"""The audit of one scan: its statistics, marks drawn on it, and what is remarkable about them."""

from __future__ import annotations

import functools
import typing as t

import numpy as np
from scipy import ndimage

from bushpc.errors import DataError
from bushpc.sample import LABELS, UNLABELLED
from bushpc.shards.audit_findings import (
    COLOUR_SPREAD,
    SMALL_SIDE,
    TINY_SHARE,
    AuditedDataset,
    Finding,
    ScanStats,
    finding_of,
)
from bushpc.shards.duplicates import Fingerprint, fingerprint_of
from bushpc.shards.manifest import Record, read_image, read_mask

# Text and calipers are strokes thinner than 7 pixels, at least 85 grey levels brighter than their surroundings, in
# pieces about as high as wide; bright tissue interfaces are long and flat. This rule finds marks at 1 % of BrEaST's
# lesions, which have none, and at 57 % of those in the BUS-BRA excerpt, four fifths of which have calipers: it misses
# grey ones on bright tissue. With 75 grey levels it would find 69 %, and 4 % in BrEaST.
_STROKE = 7
_STROKE_CONTRAST = 85
_MARK_PIXELS = 8
_MARK_SIDES = (4, 48)
_MARK_ASPECT = 2
_MARK_ROOM = 48  # margin around the mask, in pixels, in which marks are searched
# A mark touches the outline if it is this close: as a share of the longer side, but at least so many pixels.
_NEAR_SHARE, _NEAR_LEAST = 0.006, 3


def inspect(scan: tuple[AuditedDataset, Record]) -> tuple[Fingerprint, ScanStats] | DataError:
    packed, record = scan
    try:
        image_HWC, mask_HW = read_image(packed.folder, record), read_mask(packed.folder, record)
    except DataError as error:
        return error
    channels = [np.ascontiguousarray(image_HWC[..., channel]) for channel in range(image_HWC.shape[2])]
    brightest_HW = functools.reduce(np.maximum, channels)  # np.max over such a short axis takes 20 ms
    coloured_HW = np.zeros_like(brightest_HW, bool)
    if len(channels) == 3:  # four channels are MRI sequences, not colours
        coloured_HW = brightest_HW - functools.reduce(np.minimum, channels) > COLOUR_SPREAD
    inside_HW = mask_HW > 0
    parts_HW, parts = ndimage.label(inside_HW, np.ones((3, 3)))
    edges = (inside_HW[0], inside_HW[-1], inside_HW[:, 0], inside_HW[:, -1])
    facts = ScanStats(
        lesion_share=float(inside_HW.mean()),
        parts=parts,
        smallest=int(np.bincount(parts_HW[inside_HW])[1:].min()) if parts else 0,
        at_border=any(bool(edge.any()) for edge in edges),
        marks=_marks(brightest_HW, coloured_HW, inside_HW) if parts else 0,
        coloured=float(coloured_HW.mean()),
        constant=all(channel.min() == channel.max() for channel in channels),
    )
    return fingerprint_of(image_HWC), facts


def _marks(brightest_HW: np.ndarray, coloured_HW: np.ndarray, inside_HW: np.ndarray) -> int:
    """Number of marks that touch the outline of the mask, which must not be empty."""
    (place,) = ndimage.find_objects(inside_HW.astype(np.uint8))
    around = tuple(slice(max(side.start - _MARK_ROOM, 0), side.stop + _MARK_ROOM) for side in place)
    bright_HW = brightest_HW[around]
    stroke_HW = bright_HW - ndimage.grey_opening(bright_HW, size=(_STROKE, _STROKE)) >= _STROKE_CONTRAST
    marks_HW, _ = ndimage.label(stroke_HW | coloured_HW[around], np.ones((3, 3)))
    near = max(_NEAR_LEAST, round(_NEAR_SHARE * max(inside_HW.shape)))
    inside_HW = inside_HW[around]
    outline_HW = inside_HW & ~ndimage.binary_erosion(inside_HW, border_value=1)
    touched = np.unique(marks_HW[ndimage.binary_dilation(outline_HW, np.ones((3, 3)), iterations=near)])
    pixels, places = np.bincount(marks_HW.ravel()), ndimage.find_objects(marks_HW)
    count = 0
    for mark in touched[touched > 0]:
        sides = sorted(side.stop - side.start for side in places[mark - 1])
        fits = _MARK_SIDES[0] <= sides[0] and sides[1] <= min(_MARK_SIDES[1], _MARK_ASPECT * sides[0])
        count += bool(fits and pixels[mark] >= _MARK_PIXELS)
    return count


def findings_of(packed: AuditedDataset, record: Record, facts: ScanStats) -> t.Iterator[Finding]:
    def found(kind: str, said: str) -> Finding:
        return finding_of(kind, packed, record, said)

    normal = record.label == "normal"
    if record.label not in (*LABELS, UNLABELLED):
        yield found("unknown_label", f"label '{record.label}'")
    if not facts.parts and not normal:
        yield found("empty_mask", f"{record.label}, but the mask is empty")
    if facts.parts and normal:
        yield found("normal_with_mask", f"{facts.lesion_share:.2%} of the image")
    if 0 < facts.lesion_share < TINY_SHARE:
        yield found("tiny_mask", f"{record.lesion_pixels} pixels, {facts.lesion_share:.3%} of the image")
    if facts.parts > 1:
        yield found("parts", f"{facts.parts} parts, the smallest of {facts.smallest} pixels")
    if facts.at_border:
        yield found("border", "the mask reaches the outermost pixels")
    if facts.marks:
        yield found("marks", f"{facts.marks} at the outline")
    if facts.coloured:
        yield found("colour", f"{facts.coloured:.2%} of the pixels")
    if facts.constant:
        yield found("constant", "all pixels are equal")
    if min(record.height, record.width) < SMALL_SIDE:
        yield found("small", f"{record.width}x{record.height} pixels")
