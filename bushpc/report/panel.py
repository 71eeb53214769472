"""Shards, predictions, their uncertainty and Grad-CAM maps → pictures on the page.

The only part of the report that looks outside the run directory. Shards may have been moved or packed anew since,
so whatever cannot be shown becomes a sentence on the page and never an error: the numbers do not depend on it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import typing as t
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from bushpc.errors import DataError
from bushpc.report.figures import DEVIATION_COLOURS, MOST_DEVIATION
from bushpc.report.results import Arm, Run, of_class
from bushpc.report.stats import STRATA
from bushpc.report.study import Study
from bushpc.runs.layout import CellDir
from bushpc.shards.manifest import Manifest, read_image, read_mask

RANKS = ("best", "median", "worst")
MOST_ARMS = 8  # side by side

_PER_RANK = 3
_PER_STRATUM = 2
_MOST_MAPS = 6
_EDGE = 400  # longest side of a picture on the page, in pixels
_SMALL_EDGE = 260  # of one among many
_CONTOUR = (255, 214, 10)
_FALSE_POSITIVE = (58, 134, 255)
_FALSE_NEGATIVE = (255, 59, 48)
_OPACITY = 0.75
_HEAT = 0.55  # weight of the heat map where it is hottest


class View(t.NamedTuple):
    """What one arm makes of an image, or of one mask class of it.

    picture: data URI, None where it is missing. said: what is known of it, as its Dice. deviation: whether it is a map
    of the standard deviation.
    """

    label: str
    picture: str | None
    said: str
    deviation: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One validation image on the page. contour: data URI of the image with its ground truth.

    views: of each mask class the errors, then the deviation where the model samples; not named where there is but one.
    """

    rank: str
    key: str
    fold: int
    dice: float
    spatial_prompt: str
    attribute_prompt: str
    contour: str
    views: list[View]


class Panel(t.NamedTuple):
    """cases: what can be shown. problems: sentences on what cannot."""

    cases: list[Case]
    problems: list[str]

    @property
    def deviation(self) -> bool:
        """Whether there are maps of the standard deviation."""
        return any(view.deviation for case in self.cases for view in case.views)


class Strip(t.NamedTuple):
    """One image under several arms. contour: data URI of the image with its ground truth."""

    key: str
    fold: int
    contour: str
    views: list[View]


class Strips(t.NamedTuple):
    """strips: what can be shown. problems: sentences on what cannot."""

    strips: list[Strip]
    problems: list[str]

    @property
    def deviation(self) -> bool:
        """Whether there are maps of the standard deviation."""
        return any(view.deviation for strip in self.strips for view in strip.views)


class Shards(t.NamedTuple):
    """The packed images of a study. manifest: None, and `problem` says why, where they cannot be shown."""

    folder: Path
    manifest: Manifest | None
    problem: str


def open_shards(run: Run) -> Shards:
    """The shards that a run was made from, if they are still there and still the same."""
    folder = Path(run.run.shards)
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        return Shards(folder, None, f"The packed images cannot be read here, so no predictions are shown: {error}")
    if manifest.hash != run.run.manifest_sha256:
        said = f"{folder} was packed anew after this run, so its images are not shown beside these results."
        return Shards(folder, None, said)
    return Shards(folder, manifest, "")


def build_panel(arm: Arm, shards: Shards) -> Panel:
    """Best, median and worst cases of an arm's headline prompt source, over all complete folds."""
    if arm.per_image is None:
        return Panel([], ["No fold is complete, so there are no predictions to show."])
    if shards.manifest is None:
        return Panel([], [shards.problem])
    cases, problems = [], []
    for rank, row in choose(arm.rows(arm.headline)):
        try:
            views = [
                view
                for k, name in enumerate(arm.classes or ("",))
                for view in _views(arm, shards, row["key"], row["fold"], k, name, _EDGE)
            ]
            contour = contour_of(*_scan(shards, row["key"]), _EDGE)
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
                views=views,
            )
        )
    return Panel(cases, problems)


def build_gallery(study: Study, shards: Shards) -> Strips:
    """The same images under every arm, errors in colour, of the first of several mask classes: two of each lesion size,
    drawn by a hash of their keys, so that nobody chose them and no score did.
    """
    arms = [arm for arm in study.arms if arm.per_image is not None][:MOST_ARMS]
    if not arms:
        return Strips([], ["No fold is complete, so there are no predictions to show."])
    rows = {arm.name: arm.rows(arm.headline).set_index("key") for arm in arms}
    common = set.intersection(*(set(frame.index) for frame in rows.values()))
    first = rows[arms[0].name]
    keys = []
    for stratum in STRATA:
        inside = first[first["length_px"].between(stratum.low, stratum.high)].index
        keys += by_hash(key for key in inside if key in common)[:_PER_STRATUM]
    if not keys:
        return Strips([], ["The arms have no validation image in common, so none is shown side by side."])

    def views(arm: Arm, key: str, fold: int) -> list[View]:
        errors, *deviation = _views(arm, shards, key, fold, 0, arm.label, _SMALL_EDGE)
        dice = rows[arm.name].loc[key, of_class("dice", arm.classes[0]) if arm.classes else "dice"]
        return [errors._replace(said="" if pd.isna(dice) else f"Dice {dice:.4f}"), *deviation]

    return _strips(arms, shards, [(key, int(first.loc[key, "fold"])) for key in keys], views)


def build_maps(study: Study, shards: Shards) -> Strips | None:
    """Grad-CAM maps of the same images under every arm, as in XBusNet's Figure 3; None where no arm has any."""
    found = [(arm, maps) for arm in study.arms if (maps := _maps(arm))][:MOST_ARMS]
    if not found:
        return None
    arms = [arm for arm, _ in found]
    common = set.intersection(*(set(maps) for _, maps in found))
    keys = by_hash(common)[:_MOST_MAPS]
    if not keys:
        return Strips([], ["The arms have no Grad-CAM map of the same image, so none is shown side by side."])

    def views(arm: Arm, key: str, fold: int) -> list[View]:
        image_HWC, _ = _scan(shards, key)
        return [View(arm.label, heat(image_HWC, _read_gray(_folder(arm, fold).explain, key)), "")]

    return _strips(arms, shards, [(key, found[0][1][key]) for key in keys], views)


def _views(arm: Arm, shards: Shards, key: str, fold: int, k: int, label: str, edge: int) -> list[View]:
    """The errors of the arm's headline prompt source in mask class k, and their deviation, where there is a map of it.

    Raises: DataError.
    """
    folder = _folder(arm, fold).predictions / arm.headline / (arm.classes[k] if k else "")
    prob_HW = _read_gray(folder, key)
    image_HWC, mask_HW = _scan(shards, key)
    found = [View(label, draw(image_HWC, mask_HW >> k & 1, prob_HW, arm.threshold, edge), "")]
    if (folder / "uncertainty" / f"{key}.png").is_file():
        map_HW = _read_gray(folder / "uncertainty", key)
        most = f"at most {map_HW.max() / 255 * MOST_DEVIATION:.2f}"
        named = f"{label}, SD" if label else "SD"
        found.append(View(named, deviation(map_HW, _size(mask_HW, edge)), most, deviation=True))
    return found


def _strips(
    arms: list[Arm], shards: Shards, images: list[tuple[str, int]], of_arm: t.Callable[[Arm, str, int], list[View]]
) -> Strips:
    """images: key and fold of each."""
    if shards.manifest is None:
        return Strips([], [shards.problem])
    strips, problems = [], []
    for key, fold in images:
        try:
            image_HWC, mask_HW = _scan(shards, key)
        except DataError as error:
            problems.append(f"{key} of fold {fold} cannot be shown: {error}")
            continue
        views = []
        for arm in arms:
            try:
                views += of_arm(arm, key, fold)
            except DataError as error:
                views.append(View(arm.label, None, "not there"))
                problems.append(f"{key} of fold {fold} cannot be shown for {arm.label}: {error}")
        strips.append(Strip(key, fold, contour_of(image_HWC, mask_HW, _SMALL_EDGE), views))
    return Strips(strips, problems)


def by_hash(keys: t.Iterable[str]) -> list[str]:
    """In an order that has nothing to do with what they are; the evaluator draws the images that it explains alike."""
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())


def _maps(arm: Arm) -> dict[str, int]:
    """Key → fold of every Grad-CAM map of the arm's complete cells."""
    return {path.stem: cell.fold for cell in arm.complete_cells for path in cell.folder.explain.glob("*.png")}


def _folder(arm: Arm, fold: int) -> CellDir:
    return next(cell.folder for cell in arm.cells if cell.fold == fold)


def _scan(shards: Shards, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(image HWC, mask HW) at original size; bit k of the mask is class k. Raises: DataError."""
    assert shards.manifest is not None, "asked before"
    record = shards.manifest.record(key)
    return read_image(shards.folder, record)[..., :3], read_mask(shards.folder, record)  # of four channels, three show


def choose(rows: pd.DataFrame) -> list[tuple[str, dict[str, t.Any]]]:
    """Up to three rows a rank by Dice, best to worst within each; equal Dice goes by key, no image stands twice."""
    rows = rows.dropna(subset=["dice"])  # normal scans have none
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


def _read_gray(folder: Path, key: str) -> np.ndarray:
    """uint8 (height, width), probability or heat x 255 at the network's resolution. Raises: DataError."""
    path = folder / f"{key}.png"
    if not path.resolve().is_relative_to(folder.resolve()):  # a key such as ../../x must not lead out of the run
        raise DataError("its key is not a file name.")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise DataError(
            f"its picture {folder.name}/{path.name} is missing or damaged ({type(error).__name__})."
        ) from error


def draw(image_HWC: np.ndarray, mask_HW: np.ndarray, prob_HW: np.ndarray, threshold: float, edge: int = _EDGE) -> str:
    """The image with errors in colour, at its own aspect, as a data URI.

    The prediction was made on an image squeezed to a square, so it is stretched back before it is laid over.
    """
    size = _size(mask_HW, edge)
    truth = _truth(mask_HW, size)
    found = np.asarray(Image.fromarray(prob_HW).resize(size, Image.Resampling.BILINEAR)) >= threshold * 255
    overlay = _resized(image_HWC, size).astype(float)
    for wrong, colour in ((found & ~truth, _FALSE_POSITIVE), (truth & ~found, _FALSE_NEGATIVE)):
        overlay[wrong] = (1 - _OPACITY) * overlay[wrong] + _OPACITY * np.array(colour)
    return _jpeg(overlay.astype(np.uint8))


def contour_of(image_HWC: np.ndarray, mask_HW: np.ndarray, edge: int) -> str:
    """The image with the ground-truth contour of each mask class (bit of the mask), as a data URI."""
    size = _size(mask_HW, edge)
    contour = _resized(image_HWC, size).copy()
    for k in range(int(mask_HW.max()).bit_length()):
        truth = _truth(mask_HW >> k & 1, size)
        contour[ndimage.binary_dilation(truth) & ~ndimage.binary_erosion(truth, iterations=1)] = _CONTOUR
    return _jpeg(contour)


def heat(image_HWC: np.ndarray, cam_HW: np.ndarray) -> str:
    """The image with a Grad-CAM map laid over, hotter being redder and less transparent, as a data URI."""
    size = _size(image_HWC[..., 0], _SMALL_EDGE)
    cam = np.asarray(Image.fromarray(cam_HW).resize(size, Image.Resampling.BILINEAR)) / 255
    colour_HWC = 255 * matplotlib.colormaps["turbo"](cam)[..., :3]
    weight_HW1 = _HEAT * cam[..., None]
    image = _resized(image_HWC, size)
    return _jpeg((image * (1 - weight_HW1) + colour_HWC * weight_HW1).astype(np.uint8))


def deviation(map_HW: np.ndarray, size: tuple[int, int]) -> str:
    """A map of the standard deviation in colours whose scale is the same on every page, as a data URI.

    map_HW: uint8, 255 = MOST_DEVIATION.
    """
    larger = np.asarray(Image.fromarray(map_HW).resize(size, Image.Resampling.BILINEAR)) / 255
    return _jpeg((255 * matplotlib.colormaps[DEVIATION_COLOURS](larger)[..., :3]).astype(np.uint8))


def _size(mask_HW: np.ndarray, edge: int) -> tuple[int, int]:
    """(width, height) with `edge` as the longest."""
    height, width = mask_HW.shape
    scale = edge / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS))


def _truth(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    whole = Image.fromarray((mask_HW > 0).astype(np.uint8) * 255)
    return np.asarray(whole.resize(size, Image.Resampling.BILINEAR)) > 127


def _jpeg(image_HWC: np.ndarray) -> str:
    """JPEG without chroma subsampling: a fifth of the PNG, and the thin coloured edges stay sharp."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
