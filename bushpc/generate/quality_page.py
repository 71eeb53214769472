"""Figures of generated images → tables, and one HTML page with the pictures."""

from __future__ import annotations

import typing as t
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bushpc.generate.quality import HELD_OUT, SYNTHETIC, TRAINING, Part, Quality
from bushpc.generate.quality_tables import make_tables
from bushpc.report import standalone
from bushpc.report.drawing import contour_of, errors_of
from bushpc.report.standalone import EDGE, Histogram, ScanPicture, histograms
from bushpc.shards.manifest import read_image, read_mask

MOST_PAIRS = 12


class Pair(t.NamedTuple):
    """A generated image beside the training image nearest to it. copy: whether they are one picture."""

    one: ScanPicture
    other: ScanPicture
    said: str
    copy: bool


class Found(t.NamedTuple):
    """A generated image as data URIs: with the outline of its mask, and with the errors of the one that was found."""

    key: str
    said: str
    contour: str
    errors: str


def write_page(quality: Quality, folder: Path, command: Sequence[str]) -> Path:
    """Write `folder`/index.html and a CSV of every table. command: what made it, for the page's foot."""
    made = make_tables(quality)
    return standalone.write_page(
        folder,
        "quality.html.j2",
        command,
        csv_of=made,
        quality=quality,
        synthetic=len(quality.parts[SYNTHETIC].records),
        held_out=len(quality.parts[HELD_OUT].records),
        training=len(quality.parts[TRAINING].records) if TRAINING in quality.parts else None,
        tables={table.name: table for table in made},
        histograms=_histograms(quality),
        pairs=_pairs(quality),
        found=_found(quality),
    )


def _histograms(quality: Quality) -> list[Histogram]:
    """Correlations with the nearest training image, in the same bins for both sets."""
    if TRAINING not in quality.parts:
        return []
    low, high = 0.0, 1.0
    by_name = quality.images.groupby("images", sort=False)["correlation"]
    clipped = {str(name): values.clip(low, high) for name, values in by_name}
    return histograms("Correlation with the nearest training image", clipped, low, high)


def _pairs(quality: Quality) -> list[Pair]:
    """The generated images that are nearest to a training image: copies, then by correlation, then by features."""
    if TRAINING not in quality.parts:
        return []
    rows = quality.images[quality.images["images"] == SYNTHETIC]
    pairs = []
    nearest = rows.sort_values(["copy", "correlation"], ascending=False, kind="stable")[:MOST_PAIRS]
    for row in nearest.to_dict("records"):
        said = f"correlation {row['correlation']:.3f}" + (", mirrored" if row["mirrored"] else "")
        pairs.append(_pair(quality, row, row["nearest"], f"the same picture, {said}" if row["copy"] else said))
    if "distance" in rows:
        for row in rows.sort_values("distance", kind="stable")[:MOST_PAIRS].to_dict("records"):
            pairs.append(_pair(quality, row, row["near_features"], f"features {row['distance']:.3f} apart"))
    return pairs


def _pair(quality: Quality, row: dict[str, t.Any], nearest: str, said: str) -> Pair:
    one = _view(quality.parts[SYNTHETIC], row["key"])
    return Pair(one, _view(quality.parts[TRAINING], nearest), said, bool(row["copy"]))


def _view(part: Part, key: str) -> ScanPicture:
    image_HWC, mask_HW = _scan(part, key)
    return ScanPicture(part.name, key, "", contour_of(image_HWC, mask_HW, EDGE))


def _found(quality: Quality) -> list[Found]:
    dice = quality.images[quality.images["images"] == SYNTHETIC].set_index("key")["dice"] if quality.found else {}
    views = []
    for key, found_HW in quality.found.items():
        image_HWC, mask_HW = _scan(quality.parts[SYNTHETIC], key)
        errors = errors_of(image_HWC, mask_HW, 255 * found_HW, 0.5, EDGE)
        views.append(Found(key, f"Dice {dice[key]:.3f}", contour_of(image_HWC, mask_HW, EDGE), errors))
    return views


def _scan(part: Part, key: str) -> tuple[np.ndarray, np.ndarray]:
    record = next(record for record in part.records if record.key == key)
    return read_image(part.folder, record), read_mask(part.folder, record) & 1
