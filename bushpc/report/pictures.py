"""Shards, predictions, their uncertainty and Grad-CAM maps → pictures on the page.

Pictures are the only part of the report that needs files outside the run folder. Shards may have been moved or repacked
since, so pictures that cannot be shown become a sentence on the page and never an error: no number depends on them.
"""

from __future__ import annotations

import hashlib
import typing as t
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bushpc.errors import DataError
from bushpc.report.drawing import EDGE, SMALL_EDGE, contour_of, deviation_of, errors_of, heat_of, size_of
from bushpc.report.figures import MOST_DEVIATION
from bushpc.report.per_image import of_class
from bushpc.report.results import Arm, Run
from bushpc.report.scope import ReportScope
from bushpc.report.stats import STRATA
from bushpc.runs.layout import CellDir
from bushpc.shards.manifest import Manifest, read_image, read_mask

RANKS = ("best", "median", "worst")
MOST_ARMS = 8  # side by side

_PER_RANK = 3
_PER_STRATUM = 2
_MOST_MAPS = 6


class ArmPicture(t.NamedTuple):
    """An arm's prediction for an image, or for one mask class of it.

    uri: the picture as a data URI, None if it is missing. caption: for example its Dice. deviation: whether it is a map
    of the standard deviation.
    """

    label: str
    uri: str | None
    caption: str
    deviation: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One validation image on the page. contour: data URI of the image with its ground truth.

    pictures: of each mask class the errors, then the deviation if the model samples; a single class is not named.
    """

    rank: str
    key: str
    fold: int
    dice: float
    spatial_prompt: str
    attribute_prompt: str
    contour: str
    pictures: list[ArmPicture]


class Cases(t.NamedTuple):
    """cases: what can be shown. problems: sentences on what cannot."""

    cases: list[Case]
    problems: list[str]

    @property
    def deviation(self) -> bool:
        """Whether there are maps of the standard deviation."""
        return _have_deviation(self.cases)


class ImageRow(t.NamedTuple):
    """One image under several arms. contour: data URI of the image with its ground truth."""

    key: str
    fold: int
    contour: str
    pictures: list[ArmPicture]


class ImageRows(t.NamedTuple):
    """rows: what can be shown. problems: sentences on what cannot."""

    rows: list[ImageRow]
    problems: list[str]

    @property
    def deviation(self) -> bool:
        """Whether there are maps of the standard deviation."""
        return _have_deviation(self.rows)


def _have_deviation(images: Iterable[Case | ImageRow]) -> bool:
    return any(picture.deviation for image in images for picture in image.pictures)


class Shards(t.NamedTuple):
    """The packed images of a run. manifest: None, and `problem` says why, where they cannot be shown."""

    folder: Path
    manifest: Manifest | None
    problem: str


def open_shards(run: Run) -> Shards:
    """The shards that a run was made from, if they are still there and still the same."""
    folder = Path(run.record.shards)
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        return Shards(folder, None, f"The packed images cannot be read here, so no predictions are shown: {error}")
    if manifest.hash != run.record.manifest_sha256:
        problem = f"{folder} was repacked after this run, so its images are not shown with these results."
        return Shards(folder, None, problem)
    return Shards(folder, manifest, "")


def case_pictures(arm: Arm, shards: Shards) -> Cases:
    """Best, median and worst cases of an arm's headline prompt source, over all complete folds."""
    if arm.per_image is None:
        return Cases([], ["No fold is complete, so there are no predictions to show."])
    if shards.manifest is None:
        return Cases([], [shards.problem])
    cases, problems = [], []
    for rank, row in choose(arm.rows(arm.headline)):
        try:
            pictures = [
                picture
                for k, name in enumerate(arm.classes or ("",))
                for picture in _prediction(arm, shards, row["key"], row["fold"], k, name, EDGE)
            ]
            contour = contour_of(*_scan(shards, row["key"]), EDGE)
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
                pictures=pictures,
            )
        )
    return Cases(cases, problems)


def side_by_side(scope: ReportScope, shards: Shards) -> ImageRows:
    """The same images under every arm, with the errors of the first mask class in colour.

    Two images of each lesion size, selected by a hash of their keys, so neither a person nor a score chose them.
    """
    arms = [arm for arm in scope.arms if arm.per_image is not None][:MOST_ARMS]
    if not arms:
        return ImageRows([], ["No fold is complete, so there are no predictions to show."])
    rows = {arm.name: arm.rows(arm.headline).set_index("key") for arm in arms}
    common = set.intersection(*(set(frame.index) for frame in rows.values()))
    first = rows[arms[0].name]
    keys = []
    for stratum in STRATA:
        inside = first[first["length_px"].between(stratum.low, stratum.high)].index
        keys += by_hash(key for key in inside if key in common)[:_PER_STRATUM]
    if not keys:
        return ImageRows([], ["The arms have no validation image in common, so none is shown side by side."])

    def pictures_of(arm: Arm, key: str, fold: int) -> list[ArmPicture]:
        errors, *deviation = _prediction(arm, shards, key, fold, 0, arm.label, SMALL_EDGE)
        dice = rows[arm.name].loc[key, of_class("dice", arm.classes[0]) if arm.classes else "dice"]
        return [errors._replace(caption="" if pd.isna(dice) else f"Dice {dice:.4f}"), *deviation]

    return _image_rows(arms, shards, [(key, int(first.loc[key, "fold"])) for key in keys], pictures_of)


def heat_maps(scope: ReportScope, shards: Shards) -> ImageRows | None:
    """Grad-CAM maps of the same images under every arm, as in XBusNet's Figure 3; None if no arm has any."""
    found = [(arm, maps) for arm in scope.arms if (maps := _maps(arm))][:MOST_ARMS]
    if not found:
        return None
    arms = [arm for arm, _ in found]
    common = set.intersection(*(set(maps) for _, maps in found))
    keys = by_hash(common)[:_MOST_MAPS]
    if not keys:
        return ImageRows([], ["The arms have no Grad-CAM map of the same image, so none is shown side by side."])

    def pictures_of(arm: Arm, key: str, fold: int) -> list[ArmPicture]:
        image_HWC, _ = _scan(shards, key)
        return [ArmPicture(arm.label, heat_of(image_HWC, _read_gray(_folder(arm, fold).explain, key)), "")]

    return _image_rows(arms, shards, [(key, found[0][1][key]) for key in keys], pictures_of)


def _prediction(arm: Arm, shards: Shards, key: str, fold: int, k: int, label: str, edge: int) -> list[ArmPicture]:
    """The errors of the arm's headline prompt source in mask class k, and the deviation if there is a map of it.

    Raises: DataError.
    """
    folder = _folder(arm, fold).predictions / arm.headline / (arm.classes[k] if k else "")
    prob_HW = _read_gray(folder, key)
    image_HWC, mask_HW = _scan(shards, key)
    found = [ArmPicture(label, errors_of(image_HWC, mask_HW >> k & 1, prob_HW, arm.threshold, edge), "")]
    if (folder / "uncertainty" / f"{key}.png").is_file():
        map_HW = _read_gray(folder / "uncertainty", key)
        most = f"at most {map_HW.max() / 255 * MOST_DEVIATION:.2f}"
        named = f"{label}, SD" if label else "SD"
        found.append(ArmPicture(named, deviation_of(map_HW, size_of(mask_HW, edge)), most, deviation=True))
    return found


def predicted_mask(arm: Arm, key: str, fold: int, shape: tuple[int, ...]) -> np.ndarray:
    """bool (height, width): where the arm's headline prompt source finds the first mask class. Raises: DataError."""
    prob = Image.fromarray(_read_gray(_folder(arm, fold).predictions / arm.headline, key))
    return np.asarray(prob.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)) >= arm.threshold * 255


def _image_rows(
    arms: list[Arm],
    shards: Shards,
    images: list[tuple[str, int]],
    of_arm: t.Callable[[Arm, str, int], list[ArmPicture]],
) -> ImageRows:
    """images: key and fold of each."""
    if shards.manifest is None:
        return ImageRows([], [shards.problem])
    rows, problems = [], []
    for key, fold in images:
        try:
            image_HWC, mask_HW = _scan(shards, key)
        except DataError as error:
            problems.append(f"{key} of fold {fold} cannot be shown: {error}")
            continue
        pictures = []
        for arm in arms:
            try:
                pictures += of_arm(arm, key, fold)
            except DataError as error:
                pictures.append(ArmPicture(arm.label, None, "missing"))
                problems.append(f"{key} of fold {fold} cannot be shown for {arm.label}: {error}")
        rows.append(ImageRow(key, fold, contour_of(image_HWC, mask_HW, SMALL_EDGE), pictures))
    return ImageRows(rows, problems)


def by_hash(keys: t.Iterable[str]) -> list[str]:
    """In a fixed pseudo-random order; the evaluator selects the images that it explains in the same way."""
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
    """Up to three rows per rank by Dice, best to worst within each; ties go by key, and no image is repeated."""
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
