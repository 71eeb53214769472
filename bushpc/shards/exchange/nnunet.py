"""A raw dataset in nnU-Net's format: imagesTr/<case>_0000.png, labelsTr/<case>.png, dataset.json.

dataset.json names labels and their values; a list of values is a region, so classes may overlap. nnU-Net knows neither
patients nor diagnoses: they come from a table, which `bushpc shards export` writes as cases.csv.
"""

from __future__ import annotations

import typing as t
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from bushpc.errors import DataError
from bushpc.files import read_json
from bushpc.shards import readers, tree
from bushpc.shards.card import CHANNEL_COUNTS, MOST_MASK_CLASSES
from bushpc.shards.exchange.scans import Cohort, Found, LabelMap, class_names, image_label
from bushpc.shards.exchange.settings import ImportSettings

FILE, TABLE = "dataset.json", "cases.csv"
IMAGES, LABELS = "imagesTr", "labelsTr"
FLAT_FORMATS = (".png", ".bmp", ".tif", ".tiff")
COLOURS = ({"r", "g", "b"}, {"red", "green", "blue"}, {"0", "1", "2"})


def find(folder: Path, settings: ImportSettings) -> Cohort:
    """The training cases. Raises: DataError for a dataset.json that states no 2D dataset with labels."""
    path = folder / FILE
    described = read_json(path)
    if described is None:
        place = tree.find(folder, lambda near: (near / FILE).is_file() and (near / IMAGES).is_dir())
        raise DataError(f"{path} does not exist." + (f" src={place} looks like an nnU-Net dataset." if place else ""))
    ending = described.get("file_ending")
    if ending not in FLAT_FORMATS:
        raise DataError(
            f"{path}: file_ending is {ending!r}: bushpc reads 2D pictures ({', '.join(FLAT_FORMATS)}). Volumes (NIfTI "
            "and the like) must be cut into slices first; ultrasound frames can be saved as PNG."
        )
    levels = _levels(path, described)
    channels = [str(name) for _, name in sorted((described.get("channel_names") or {}).items())]
    order = [
        str(name) for name in described.get("mask_classes") or ()
    ]  # `bushpc shards export` states that of the bits
    is_own = sorted(order) == sorted(levels)
    levels = {name: levels[name] for name in order} if is_own else levels
    labels = None if is_own else image_label(levels, settings)
    cohort = Cohort(
        scans=[],
        mask_classes=["lesion"] if labels else list(levels) if is_own else class_names(list(levels)),
        table=TABLE if (folder / TABLE).is_file() else None,
        files=[FILE],
    )
    if len(channels) in CHANNEL_COUNTS and {name.lower() for name in channels} not in COLOURS:
        cohort.channels = channels
    planes = [tuple(level for each in levels.values() for level in each)] if labels else list(levels.values())
    images, masks = _files(folder, IMAGES, ending), _files(folder, LABELS, ending)
    cases: dict[str, list[str]] = defaultdict(list)
    for image in images:
        case, _, number = PurePosixPath(image).name.removesuffix(ending).rpartition("_")
        if not case or not number.isdecimal():
            cohort.problems.append(f"{image}: the name must be <case>_0000{ending}")
        else:
            cases[case].append(image)
    by_case = {PurePosixPath(mask).name.removesuffix(ending): mask for mask in masks}
    for case, files in cases.items():
        if len(files) > 1:
            cohort.problems.append(
                f"case {case} has {len(files)} files ({', '.join(files)}): bushpc reads one picture per case; merge "
                "the channels into one RGB picture"
            )
            continue
        cohort.problems += _volume(folder, files[0])
        mask = LabelMap(files=(by_case[case],), levels=tuple(planes)) if case in by_case else None
        given: dict[str, t.Any] = {"key": case}
        if labels and mask:
            label, problem = _label_of(folder, by_case[case], levels, labels)
            given["label"] = label
            cohort.problems += problem
        cohort.scans.append(
            Found(
                name=case,
                image=files[0],
                mask=mask,
                looked_for=f"{LABELS}/{case}{ending}",
                given=given,
                channels=len(cohort.channels or ()) or 3,
            )
        )
    cohort.problems += [f"{mask} is the mask of no image" for case, mask in by_case.items() if case not in cases]
    _note(cohort, folder, described, labels)
    return cohort


def _note(cohort: Cohort, folder: Path, described: dict[str, t.Any], labels: dict[str, str] | None) -> None:
    """What a user may not expect."""
    stated = described.get("numTraining")
    if isinstance(stated, int) and stated != len(cohort.scans):
        cohort.problems.append(f"{FILE} states numTraining {stated}, and {IMAGES} has {len(cohort.scans)} cases")
    if tests := _files(folder, "imagesTs", described["file_ending"]):
        cohort.notes.append(f"imagesTs ({len(tests)} files) is not imported: bushpc imports cases with labels")
    if labels:
        meaning = ", ".join(f"{name} is {label}" for name, label in labels.items())
        cohort.notes.append(f"classes of the masks are taken as labels of the images: {meaning}")


def _levels(path: Path, described: dict[str, t.Any]) -> dict[str, tuple[int, ...]]:
    """Class → its values in the masks, without the background. Raises: DataError."""
    labels = described.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise DataError(f"{path}: 'labels' must map names to values, such as {{'background': 0, 'lesion': 1}}.")
    found: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(each, int) and 0 <= each <= 255 for each in values):
            raise DataError(f"{path}: labels: {name} is {value!r}; it must be a whole number, or a list of them.")
        if name == "ignore":
            raise DataError(
                f"{path}: labels has 'ignore', and bushpc has no pixels to ignore: every pixel is lesion or not. Set "
                "them to a class, or leave these cases out."
            )
        if values != [0]:
            found[str(name)] = tuple(values)
    if not 1 <= len(found) <= MOST_MASK_CLASSES:
        raise DataError(f"{path}: labels has {len(found)} classes besides the background; allowed: 1 to 8.")
    return found


def _label_of(
    folder: Path, mask: str, levels: dict[str, tuple[int, ...]], labels: dict[str, str]
) -> tuple[str | None, list[str]]:
    """The label that the classes in a mask state."""
    known = {0, *(level for each in levels.values() for level in each)}
    try:
        there = set(np.unique(readers.read_levels(folder, mask, known)).tolist()) - {0}
    except DataError as error:
        return None, [str(error)]
    found = {labels[name] for name, values in levels.items() if there & set(values)}
    if len(found) > 1:
        return None, [
            f"{mask} has pixels of {' and '.join(sorted(found))}, but an image has one label: state it in a table"
        ]
    return (found.pop() if found else "normal"), []


def _files(folder: Path, part: str, ending: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in tree.listed(folder / part) if path.name.endswith(ending)]


def _volume(folder: Path, name: str) -> list[str]:
    """A TIFF of several pages is a volume."""
    try:
        with Image.open(folder / name) as image:
            pages = getattr(image, "n_frames", 1)
    except Exception:  # loading it reports that
        return []
    return [f"{name} is a volume of {pages} slices: bushpc reads 2D pictures"] if pages > 1 else []
