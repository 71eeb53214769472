"""A cohort as COCO JSON: images, annotations with polygons or run-length masks, categories.

annotations.json + images → scans; `bushpc shards export` also writes key, patient, label, fold and attributes into it

COCO keeps instances. bushpc keeps one mask per class, so instances of one class are united.
"""

from __future__ import annotations

import importlib.util
import json
import os
import typing as t
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.errors import ConfigError, DataError
from bushpc.files import is_inside
from bushpc.shards import images, readers, tree
from bushpc.shards.card import MOST_MASK_CLASSES
from bushpc.shards.exchange.scans import Cohort, Found, class_names, image_label, stem
from bushpc.shards.exchange.settings import ImportSettings

FACTS = ("key", "patient", "label", "pixel_mm", "fold", "attributes")
LEAST_POLYGON = 6  # numbers: three corners


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The instances of an image. parts: class number and segmentation of each, as in the file."""

    height: int
    width: int
    parts: tuple[tuple[int, t.Any], ...]
    files: tuple[str, ...] = ()

    def read(self, folder: Path, image: str, height: int, width: int, *, lesion: bool) -> np.ndarray:
        mask_HW = np.zeros((self.height, self.width), np.uint8)
        readers.check_size(image, (height, width), "in the COCO file", mask_HW)
        for k, segmentation in self.parts:
            mask_HW |= decode(segmentation, self.height, self.width) << k
        return mask_HW

    def is_empty(self, folder: Path) -> bool:
        return not any(decode(segmentation, self.height, self.width).any() for _, segmentation in self.parts)

    def overlap(self) -> int:
        """Pixels that several instances of one class have in common."""
        count_KHW: dict[int, np.ndarray] = {}
        for k, segmentation in self.parts:
            plane_HW = count_KHW.setdefault(k, np.zeros((self.height, self.width), np.uint16))
            plane_HW += decode(segmentation, self.height, self.width)
        return sum(int((plane_HW > 1).sum()) for plane_HW in count_KHW.values())


def decode(segmentation: t.Any, height: int, width: int) -> np.ndarray:
    """A segmentation as uint8 0 or 1, (height, width). Raises: DataError if it is neither polygons nor run lengths."""
    from pycocotools import mask as coco_mask

    try:
        if isinstance(segmentation, list):
            if not all(_is_near(polygon, height, width) for polygon in segmentation):
                raise DataError("a polygon's corner lies far outside the image")
            if not segmentation or any(len(polygon) < LEAST_POLYGON or len(polygon) % 2 for polygon in segmentation):
                raise DataError("a polygon needs three corners or more, as x and y in turn")
            runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        else:
            size, counts = segmentation["size"], segmentation["counts"]
            if list(size) != [height, width]:
                raise DataError(f"its run lengths are for {size[1]}x{size[0]} pixels, the image has {width}x{height}")
            lengths = _lengths(counts) if isinstance(counts, str) else list(counts)
            if sum(lengths) != height * width or min(lengths, default=0) < 0:
                raise DataError(f"its run lengths cover {sum(lengths)} pixels, the image has {height * width}")
            runs = coco_mask.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
        return np.ascontiguousarray(coco_mask.decode(runs))
    except DataError:
        raise
    except Exception as error:  # of any wrong type or structure
        raise DataError(f"its segmentation is neither polygons nor run lengths ({error})") from error


def _is_near(polygon: t.Sequence[float], height: int, width: int) -> bool:
    """Whether all corners lie within an image's length of it: pycocotools takes memory for each pixel of an edge."""
    most = max(height, width)
    return all(-most <= value <= 2 * most for value in polygon)


def _lengths(text: str) -> list[int]:
    """Run lengths of COCO's compressed text: base 32, least digit first; from the third on, differences to the last but
    one.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 0x1F) << shift
        shift += 5
        if not digit & 0x20:
            if digit & 0x10:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def find(folder: Path, settings: ImportSettings) -> Cohort:
    """The images of the file. Raises: DataError for a file that is no COCO; ConfigError without pycocotools."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ConfigError("COCO masks need pycocotools: pip install 'bushpc[exchange]'")
    name = settings.annotations or annotation_file(folder)
    content = _read(folder / name)
    names = {each["id"]: str(each["name"]) for each in content["categories"]}
    if settings.classes:
        names = {number: each for number, each in names.items() if each in settings.classes}
    labels = image_label(names.values(), settings)
    classes = list(names.values())
    cohort = Cohort(scans=[], files=[name], mask_classes=["lesion"] if labels else class_names(classes))
    if len(cohort.mask_classes) > MOST_MASK_CLASSES or not classes:
        raise DataError(
            f"{folder / name} has {len(classes)} categories; allowed: 1 to {MOST_MASK_CLASSES}. Choose some with "
            "classes=NAME:1,NAME:2"
        )
    parts = _parts(content, names, cohort, name, united=labels is not None)
    overlapping: list[str] = []
    seen: dict[str, t.Any] = {}
    for entry in content["images"]:
        file = str(entry["file_name"]).replace("\\", "/")
        place = _place(folder, name, file, settings.images)
        if place is None:
            cohort.incomplete(f"{name} lists {file}, which does not exist", settings)
            continue
        if place in seen:
            cohort.problems.append(f"{name} lists {file} twice, as images {seen[place]} and {entry['id']}")
            continue
        seen[place] = entry["id"]
        if not 0 < entry["height"] * entry["width"] <= images.MOST_PIXELS:
            cohort.problems.append(f"{file} is {entry['width']}x{entry['height']} pixels, says {name}")
            continue
        own = parts.get(entry["id"], [])
        mask = Instances(height=entry["height"], width=entry["width"], parts=tuple((k, seg) for k, seg, _ in own))
        given = {fact: entry[fact] for fact in FACTS if entry.get(fact) is not None}
        found = {labels[category] for _, _, category in own} if labels else set()
        if len(found) > 1 and "label" not in given:
            cohort.problems.append(
                f"{file} has annotations of {' and '.join(sorted(found))}, but an image has one label: give the labels "
                "in a table, or choose categories with classes="
            )
        elif found:
            given.setdefault("label", found.pop())
        try:
            if len(own) > 1 and (pixels := mask.overlap()):
                overlapping.append(f"{file} ({pixels} pixels)")
        except DataError as error:
            cohort.problems.append(f"{file}: {error}")
            continue
        cohort.scans.append(Found(name=stem(file), image=place, mask=mask, given=given))
    if overlapping:
        cohort.notes.append(
            f"instances of one class overlap in {len(overlapping)} images: {', '.join(overlapping[:5])}. bushpc keeps "
            "one mask per class, their union"
        )
    if labels:
        meaning = ", ".join(f"{each} is {label}" for each, label in labels.items())
        cohort.notes.append(f"categories are taken as labels of the images: {meaning}")
    return cohort


def annotation_file(folder: Path) -> str:
    """The COCO file of a folder, relative to it. Raises: DataError if there is none, or several."""
    paths = [*tree.glob(folder, "*.json"), *tree.glob(folder, "annotations/*.json")]
    found = [path.relative_to(folder).as_posix() for path in dict.fromkeys(paths) if is_coco(path)]
    if len(found) != 1:
        listed = (
            f"several COCO files ({', '.join(found)})" if found else "no COCO file (*.json with images, annotations)"
        )
        raise DataError(f"{folder} has {listed}: say which one with annotations=FILE")
    return found[0]


def is_coco(path: Path) -> bool:
    """Whether a JSON file has COCO's lists."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _read(path: Path) -> dict[str, t.Any]:
    """The file's content, with the keys of its entries checked. Raises: DataError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"annotations={path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({error}).") from error
    needed: dict[str, dict[str, type]] = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "annotations": {"image_id": int, "category_id": int},
        "categories": {"id": int, "name": str},
    }
    if not isinstance(content, dict):
        raise DataError(f"{path} is no COCO file: it must be an object with {', '.join(needed)}.")
    for part, keys in needed.items():
        entries = content.get(part)
        if not isinstance(entries, list):
            raise DataError(f"{path} is no COCO file: it has no list '{part}'.")
        for number, entry in enumerate(entries):
            wrong = [key for key, kind in keys.items() if not isinstance(entry, dict) or not _is(entry.get(key), kind)]
            if wrong:
                raise DataError(f"{path}: {part}[{number}] has no valid {', '.join(wrong)}.")
    for part in ("images", "categories"):
        ids = [entry["id"] for entry in content[part]]
        if len(set(ids)) != len(ids):
            raise DataError(f"{path}: two {part} have the id {next(one for one in ids if ids.count(one) > 1)}.")
    return content


def _is(value: t.Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _parts(
    content: dict[str, t.Any], names: dict[int, str], cohort: Cohort, file: str, *, united: bool
) -> dict[int, list[tuple[int, t.Any, str]]]:
    """Class number, segmentation and category of the annotations, by image. united: all are one class."""
    order = {number: 0 if united else k for k, number in enumerate(names)}
    every = {each["id"] for each in content["categories"]}
    images = {each["id"] for each in content["images"]}
    parts: dict[int, list[tuple[int, t.Any, str]]] = defaultdict(list)
    boxes: list[t.Any] = []
    for number, entry in enumerate(content["annotations"]):
        image, category, shape = entry["image_id"], entry["category_id"], entry.get("segmentation")
        if image not in images or category not in every:
            what = f"image {image}" if image not in images else f"category {category}"
            cohort.problems.append(f"{file}: annotations[{number}] is of {what}, which the file does not have")
        elif category in names and not shape:
            boxes.append(entry.get("id", number))
        elif category in names:
            parts[image].append((order[category], shape, names[category]))
    if boxes:
        cohort.problems.append(f"{file}: {len(boxes)} annotations have no segmentation: {_listed(boxes)}")
    return parts


def _listed(ids: Sequence[t.Any]) -> str:
    return ", ".join(map(str, ids[:10])) + (", …" if len(ids) > 10 else "")


def _place(folder: Path, annotations: str, file: str, images: str | None) -> str | None:
    """The image relative to the raw folder: below `images`, beside the annotations, or in a folder images/."""
    beside = (folder / annotations).parent
    bases = [folder / images] if images else [beside, beside / "images", folder, folder / "images"]
    for base in bases:
        if (base / file).is_file():
            place = os.path.relpath(base / file, folder)
            if not is_inside(place):  # somebody else's file may name any picture of this machine
                raise DataError(f"{folder / annotations} lists {file}, which lies outside {folder}: move it inside")
            return place
    return None
