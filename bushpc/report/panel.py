"""Shards and predictions → pictures of the best, median and worst cases.

The only part of the report that looks outside the run directory. Shards may have been moved or packed anew since,
so whatever cannot be shown becomes a sentence on the page and never an error: the numbers do not depend on it.
"""

from __future__ import annotations

import base64
import io
import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from bushpc.errors import DataError
from bushpc.report.results import RunResults
from bushpc.shards.manifest import Manifest, read_image, read_mask

RANKS = ("best", "median", "worst")

_PER_RANK = 3
_EDGE = 400  # longest side of a picture on the page, in pixels
_CONTOUR = (255, 214, 10)
_FALSE_POSITIVE = (58, 134, 255)
_FALSE_NEGATIVE = (255, 59, 48)
_OPACITY = 0.75


@dataclass(frozen=True, kw_only=True)
class Case:
    """One validation image on the page. contour, overlay: data URIs."""

    rank: str
    key: str
    fold: int
    dice: float
    spatial_prompt: str
    attribute_prompt: str
    contour: str
    overlay: str


class Panel(t.NamedTuple):
    """cases: what can be shown. problems: sentences on what cannot."""

    cases: list[Case]
    problems: list[str]


def build_panel(results: RunResults) -> Panel:
    """The cases of the headline prompt source, over all complete folds."""
    if results.per_image is None:
        return Panel([], ["No fold is complete, so there are no predictions to show."])
    folder = Path(results.run["shards"])
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        return Panel([], [f"The packed images cannot be read here, so no predictions are shown: {error}"])
    if manifest.hash != results.run["manifest_sha256"]:
        return Panel(
            [], [f"{folder} was packed anew after this run, so its images are not shown beside these results."]
        )
    cells = {cell.fold: cell.name for cell in results.complete_cells}
    cases, problems = [], []
    for rank, row in choose(results.per_image[results.per_image["prompts"] == results.headline]):
        folder_of_cell = results.path / "cells" / cells[row["fold"]] / "predictions" / results.headline
        try:
            prob_HW = _read_prediction(folder_of_cell, row["key"])
            record = manifest.record(row["key"])
            contour, overlay = draw(read_image(folder, record), read_mask(folder, record), prob_HW, results.threshold)
        except DataError as error:
            problems.append(f"{rank} case {row['key']} of fold {row['fold']} cannot be shown: {error}")
            continue
        cases.append(
            Case(
                rank=rank,
                key=row["key"],
                fold=row["fold"],
                dice=row["dice"],
                spatial_prompt=row["spatial_prompt"],
                attribute_prompt=row["attribute_prompt"],
                contour=contour,
                overlay=overlay,
            )
        )
    return Panel(cases, problems)


def choose(rows: pd.DataFrame) -> list[tuple[str, dict[str, t.Any]]]:
    """Up to three rows a rank by Dice, best to worst within each; equal Dice goes by key, no image stands twice."""
    order: list[dict[str, t.Any]] = rows.sort_values(["dice", "key"], ascending=[False, True]).to_dict("records")  # type: ignore[assignment]
    each = min(_PER_RANK, max(1, len(order) // len(RANKS)))
    middle = max(0, (len(order) - each) // 2)
    chosen: list[tuple[str, dict[str, t.Any]]] = []
    seen: set[str] = set()
    for rank, start in (("best", 0), ("worst", len(order) - each), ("median", middle)):
        for row in order[max(0, start) : start + each]:
            if row["key"] not in seen:
                seen.add(row["key"])
                chosen.append((rank, row))
    return sorted(chosen, key=lambda case: RANKS.index(case[0]))


def _read_prediction(folder: Path, key: str) -> np.ndarray:
    """uint8 (height, width), probability x 255 at the network's resolution. Raises: DataError."""
    path = folder / f"{key}.png"
    if not path.resolve().is_relative_to(folder.resolve()):  # a key such as ../../x must not lead out of the run
        raise DataError("its key is not a file name.")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise DataError(f"its prediction {path.name} is missing or damaged ({type(error).__name__}).") from error


def draw(image_HWC: np.ndarray, mask_HW: np.ndarray, prob_HW: np.ndarray, threshold: float) -> tuple[str, str]:
    """(image with ground-truth contour, image with errors in colour) as data URIs, at the image's own aspect.

    The prediction was made on an image squeezed to a square, so it is stretched back before it is laid over.
    """
    height, width = mask_HW.shape
    scale = _EDGE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS))
    truth = (
        np.asarray(Image.fromarray((mask_HW > 0).astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127
    )
    found = np.asarray(Image.fromarray(prob_HW).resize(size, Image.Resampling.BILINEAR)) >= threshold * 255
    edge = ndimage.binary_dilation(truth) & ~ndimage.binary_erosion(truth, iterations=1)
    contour, overlay = image.copy(), image.astype(float)
    contour[edge] = _CONTOUR
    for wrong, colour in ((found & ~truth, _FALSE_POSITIVE), (truth & ~found, _FALSE_NEGATIVE)):
        overlay[wrong] = (1 - _OPACITY) * overlay[wrong] + _OPACITY * np.array(colour)
    return _jpeg(contour), _jpeg(overlay.astype(np.uint8))


def _jpeg(image_HWC: np.ndarray) -> str:
    """JPEG without chroma subsampling: a fifth of the PNG, and the thin coloured edges stay sharp."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
