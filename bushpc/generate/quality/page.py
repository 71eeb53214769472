"""Figures of generated images → tables, and one HTML page with the pictures."""

from __future__ import annotations

import typing as t
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bushpc.generate.quality.records import HELD_OUT, SYNTHETIC, TRAINING, ImageSet, Quality
from bushpc.generate.quality.tables import make_tables
from bushpc.report import standalone
from bushpc.report.drawing import contour_of, errors_of
from bushpc.report.standalone import EDGE, Histogram, ScanPicture, histograms
from bushpc.shards.manifest import read_image, read_mask

MOST_PAIRS = 12


class NearestPair(t.NamedTuple):
    """A generated image and its nearest training image. copy: whether they are the same picture."""

    one: ScanPicture
    other: ScanPicture
    caption: str
    copy: bool


class PredictedMask(t.NamedTuple):
    """A generated image as data URIs: with the outline of its mask, and with the errors of the segmenter's mask."""

    key: str
    caption: str
    contour: str
    errors: str


def write_page(quality: Quality, folder: Path, command: Sequence[str]) -> Path:
    """Write `folder`/index.html and a CSV of every table. command: that wrote it, for the page's foot."""
    tables = make_tables(quality)
    return standalone.write_page(
        folder,
        "quality.html.j2",
        command,
        csv_of=tables,
        quality=quality,
        synthetic=len(quality.sets[SYNTHETIC].records),
        held_out=len(quality.sets[HELD_OUT].records),
        training=len(quality.sets[TRAINING].records) if TRAINING in quality.sets else None,
        tables={table.name: table for table in tables},
        histograms=_histograms(quality),
        pairs=_pairs(quality),
        predicted=_predicted(quality),
    )


def _histograms(quality: Quality) -> list[Histogram]:
    """Correlations with the nearest training image, in the same bins for both sets."""
    if TRAINING not in quality.sets:
        return []
    low, high = 0.0, 1.0
    by_name = quality.images.groupby("images", sort=False)["correlation"]
    clipped = {str(name): values.clip(low, high) for name, values in by_name}
    return histograms("Correlation with the nearest training image", clipped, low, high)


def _pairs(quality: Quality) -> list[NearestPair]:
    """The generated images that are nearest to a training image: copies, then by correlation, then by features."""
    if TRAINING not in quality.sets:
        return []
    rows = quality.images[quality.images["images"] == SYNTHETIC]
    pairs = []
    nearest = rows.sort_values(["copy", "correlation"], ascending=False, kind="stable")[:MOST_PAIRS]
    for row in nearest.to_dict("records"):
        caption = f"correlation {row['correlation']:.3f}" + (", mirrored" if row["mirrored"] else "")
        pairs.append(_pair(quality, row, row["nearest"], f"the same picture, {caption}" if row["copy"] else caption))
    if "distance" in rows:
        for row in rows.sort_values("distance", kind="stable")[:MOST_PAIRS].to_dict("records"):
            pairs.append(_pair(quality, row, row["near_features"], f"features {row['distance']:.3f} apart"))
    return pairs


def _pair(quality: Quality, row: dict[str, t.Any], nearest: str, caption: str) -> NearestPair:
    one = _view(quality.sets[SYNTHETIC], row["key"])
    return NearestPair(one, _view(quality.sets[TRAINING], nearest), caption, bool(row["copy"]))


def _view(images: ImageSet, key: str) -> ScanPicture:
    image_HWC, mask_HW = _scan(images, key)
    return ScanPicture(images.name, key, "", contour_of(image_HWC, mask_HW, EDGE))


def _predicted(quality: Quality) -> list[PredictedMask]:
    dice = quality.images[quality.images["images"] == SYNTHETIC].set_index("key")["dice"] if quality.found else {}
    views = []
    for key, found_HW in quality.found.items():
        image_HWC, mask_HW = _scan(quality.sets[SYNTHETIC], key)
        errors = errors_of(image_HWC, mask_HW, 255 * found_HW, 0.5, EDGE)
        views.append(PredictedMask(key, f"Dice {dice[key]:.3f}", contour_of(image_HWC, mask_HW, EDGE), errors))
    return views


def _scan(images: ImageSet, key: str) -> tuple[np.ndarray, np.ndarray]:
    record = next(record for record in images.records if record.key == key)
    return read_image(images.folder, record), read_mask(images.folder, record) & 1
