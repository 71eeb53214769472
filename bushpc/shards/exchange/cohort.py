"""The dataset source of imported cohorts: like the modules of `bushpc.shards.sources`, but told by the card.

raw folder + `imported:` of the card ─find→ items, problems ─plan→ items ─load→ samples
"""

from __future__ import annotations

import hashlib
import json
import typing as t
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from bushpc.errors import DataError
from bushpc.sample import PixelSize, Regions, Sample
from bushpc.shards import images, readers
from bushpc.shards.card import FILE_NAME, Card
from bushpc.shards.exchange import coco, dicom, facts, folder, nnunet
from bushpc.shards.exchange.scans import Cohort, Found, LabelMap, Mask, MaskFiles, key_of
from bushpc.shards.exchange.settings import ImportSettings
from bushpc.shards.sources import Item, Plan

READERS: dict[str, Callable[[Path, ImportSettings], Cohort]] = {
    "folder": folder.find,
    "nnunet": nnunet.find,
    "coco": coco.find,
    "dicom": dicom.find,
}
NEARLY_SQUARE = 0.01  # a pixel size is one number; sides that differ by more have none


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One scan: its files and facts. channels: 4 for a picture whose channels are no colours and opacity."""

    folder: Path
    image: str
    frame: int
    is_dicom: bool
    channels: int
    mask: Mask | None
    patient: str
    pixel_mm: float | None
    attributes: dict[str, str | float | None]


@dataclass(kw_only=True)
class Survey:
    """What an import would pack, and what is wrong with it.

    problems: stop it. left_out: on the user's wish. notes: what the user should know. files: that the scans depend on.
    """

    items: list[Item]
    folds: dict[str, int]
    mask_classes: list[str]
    channels: list[str] | None
    problems: list[str]
    left_out: list[str]
    notes: list[str]
    files: list[str] = field(default_factory=list)


def kind_of(place: Path) -> str:
    """The layout of a raw folder, by what lies in it."""
    if (place / nnunet.FILE).is_file() and (place / nnunet.IMAGES).is_dir():
        return "nnunet"
    if any(coco.is_coco(path) for pattern in ("*.json", "annotations/*.json") for path in place.glob(pattern)):
        return "coco"
    if not folder.pictures(place) and any(images.is_dicom(path) for path in place.rglob("*")):
        return "dicom"
    return "folder"


def find(place: Path, settings: ImportSettings) -> Survey:
    """List the scans of a raw folder. Raises: DataError for a folder that is not of this layout."""
    cohort = READERS[settings.kind](place, settings)
    known = facts.gather(cohort, settings, place)
    items: list[Item] = []
    folds: dict[str, int] = {}
    owners: dict[str, str] = {}
    for scan, fact in zip(cohort.scans, known, strict=True):
        if fact is None:
            continue
        key = key_of(str(scan.given.get("key") or scan.name))
        if key in owners:
            cohort.problems.append(f"two images have one name: {owners[key]} and {scan.image} would both be '{key}'")
            continue
        owners[key] = scan.image
        label = _label(place, scan, fact, cohort, settings)
        if label is None:
            continue
        recipe = Recipe(
            folder=place,
            image=scan.image,
            frame=scan.frame,
            is_dicom=settings.kind == "dicom",
            channels=scan.channels,
            mask=scan.mask,
            patient=fact.patient or key,
            pixel_mm=fact.pixel_mm,
            attributes=fact.attributes,
        )
        items.append(Item(key=key, label=label, recipe=recipe))
        if fact.fold is not None:
            folds[key] = fact.fold
    _check_folds(items, folds, cohort)
    if not any((items, cohort.problems)):
        cohort.problems.append("no scan is left to import")
    _note_labels(items, cohort)
    table = settings.table or cohort.table
    files = [*cohort.files, *([table] if table else []), *(item.recipe.image for item in items)]
    files += [file for item in items if item.recipe.mask for file in item.recipe.mask.files]
    return Survey(
        items=items,
        folds=folds,
        mask_classes=cohort.mask_classes,
        channels=cohort.channels,
        problems=list(dict.fromkeys(cohort.problems)),
        left_out=cohort.left_out,
        notes=cohort.notes,
        files=files,
    )


def plan(place: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """As the sources of datasets do. Raises: DataError listing all problems."""
    assert place is not None, "the packer refuses a missing src"
    survey = find(place, ImportSettings.of_card(card.imported, Path(card.name) / FILE_NAME))
    readers.raise_if_any(place, survey.problems)
    return planned(place, survey)


def planned(place: Path, survey: Survey) -> Plan:
    """The plan. Another mapping of the same files is another dataset, so the facts are hashed like a file."""
    facts_of = {
        item.key: [item.label, item.recipe.patient, item.recipe.pixel_mm, item.recipe.attributes]
        for item in survey.items
    }
    text = json.dumps([survey.mask_classes, survey.channels, facts_of], sort_keys=True)
    hashes = readers.hash_files(place, survey.files) | {"imported": hashlib.sha256(text.encode()).hexdigest()}
    return Plan(survey.items, hashes, survey.folds or None)


def load(item: Item) -> Sample:
    """Decode the image and its mask. Raises: DataError naming the files."""
    recipe: Recipe = item.recipe
    image_HWC, scale = _read_image(recipe)
    height, width = image_HWC.shape[:2]
    lesion = item.label != "normal"
    mask_HW = np.zeros((height, width), np.uint8)
    if recipe.mask is not None:
        try:
            mask_HW = recipe.mask.read(recipe.folder, recipe.image, height, width, lesion=lesion)
        except DataError as error:
            named = recipe.image in str(error)
            raise error if named else type(error)(f"{recipe.image}: {error}") from error
    pixel_mm = recipe.pixel_mm or _one_number(scale.pixel_mm(mask_HW) if isinstance(scale, Regions) else scale)
    return Sample(
        key=item.key,
        patient=recipe.patient,
        label=item.label,
        image_HWC=image_HWC,
        mask_HW=mask_HW,
        attributes=dict(recipe.attributes),
        pixel_mm=pixel_mm,
        sources=(recipe.image, *(recipe.mask.files if recipe.mask else ())),
    )


def _read_image(recipe: Recipe) -> tuple[np.ndarray, PixelSize | Regions | None]:
    path = recipe.folder / recipe.image
    if recipe.is_dicom:
        try:
            picture = images.open_picture(path)
            return picture.read(recipe.frame), picture.scale
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    if recipe.channels == 3:
        return readers.read_image(recipe.folder, recipe.image), None
    with Image.open(path) as image:
        pixels_HWC = np.array(image)
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.shape[2:] != (recipe.channels,):
        raise DataError(f"{path} must have {recipe.channels} channels of 8 bits, as the dataset states.")
    return pixels_HWC, None


def _one_number(size: PixelSize | None) -> float | None:
    square = size is not None and abs(size.x - size.y) <= NEARLY_SQUARE * size.x
    return round(size.x, 6) if size is not None and square else None


def _label(place: Path, scan: Found, fact: facts.Facts, cohort: Cohort, settings: ImportSettings) -> str | None:
    """The scan's label. Where none is stated, an empty mask is a normal scan, and any other `unlabelled`."""
    if scan.mask is None and fact.label != "normal":
        if settings.without_mask == "normal" and fact.label is None:
            return "normal"
        problem = f"{scan.image} has no mask ({scan.looked_for}); without_mask=normal takes such images as normal scans"
        if fact.label is not None:
            problem = f"{scan.image} is {fact.label} and has no mask ({scan.looked_for})"
        cohort.incomplete(problem, settings)
        return None
    if fact.label is not None:
        return fact.label
    assert scan.mask is not None, "asked above"
    try:
        return "normal" if _is_empty(place, scan.mask) else "unlabelled"
    except DataError as error:
        cohort.problems.append(str(error))
        return None


def _is_empty(place: Path, mask: Mask) -> bool:
    if isinstance(mask, MaskFiles | LabelMap):
        return not any(readers.read_mask_levels(place, name).any() for name in mask.files)
    return t.cast(coco.Instances | dicom.SegMask, mask).is_empty(place)


def _note_labels(items: list[Item], cohort: Cohort) -> None:
    counts = Counter(item.label for item in items)
    if counts["unlabelled"]:
        cohort.notes.append(
            f"{counts['unlabelled']} scans have no label: they train segmentation only. label=COLUMN takes labels from "
            "a table, label=folder from the images' folders"
        )


def _check_folds(items: list[Item], folds: dict[str, int], cohort: Cohort) -> None:
    """Folds that come with the cohort are kept as published ones, if they are whole."""
    if not folds:
        return
    lesions = [item.key for item in items if item.label != "normal"]
    of_patient: dict[str, set[int]] = defaultdict(set)
    for item in items:
        if item.key in folds:
            of_patient[item.recipe.patient].add(folds[item.key])
    split = [patient for patient, numbers in of_patient.items() if len(numbers) > 1]
    missing = [key for key in lesions if key not in folds]
    if split or missing:
        reason = f"{len(split)} patients are in several" if split else f"{len(missing)} lesions have none"
        cohort.notes.append(f"the folds that come with the cohort are not taken over: {reason}")
        folds.clear()
