"""Synthetic scans → a contact sheet for a first look: images with outlined masks and captions below."""

from __future__ import annotations

import io
import textwrap
import typing as t
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bushpc.evaluate.predict_output import overlay
from bushpc.files import write_atomically

COLUMNS, MOST = 6, 24
CELL_INCHES = 2.2
CAPTION_WIDTH = 38  # characters of 6 points that fit under an image


class Shown(t.NamedTuple):
    """One scan of the sheet. image_HWC, mask_HW: uint8, mask 1 inside the lesion."""

    image_HWC: np.ndarray
    mask_HW: np.ndarray
    caption: str


def write_sheet(scans: t.Sequence[Shown], path: Path, title: str) -> None:
    """Write the first MOST of `scans` to a PNG, atomically."""
    shown = scans[:MOST]
    rows = -(-len(shown) // COLUMNS)
    # Without pyplot, no backend is selected and no global state is left.
    figure = Figure(figsize=(COLUMNS * CELL_INCHES, rows * (CELL_INCHES + 0.45) + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for place in range(rows * COLUMNS):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        axes.set_axis_off()
        if place < len(shown):
            scan = shown[place]
            axes.imshow(overlay(scan.image_HWC, scan.mask_HW))
            axes.set_title("\n".join(textwrap.wrap(scan.caption, CAPTION_WIDTH)), fontsize=6, y=0, va="top", pad=-3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    write_atomically(path, stream.getvalue())
