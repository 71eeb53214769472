"""STU-Hospital (Zhuang et al. 2019): 42 small scans with masks of other sizes, without labels.

    Test_Image_<n>.png + mask_<n>.png ─resized, thresholded→ sample

shards/stu/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import numpy as np
from PIL import Image

from bushpc.sample import UNLABELLED, Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAME = re.compile(r"(?P<kind>[Tt]est_Image|mask)_(?P<number>\d+)\.png")


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks by number. Raises: DataError naming every file without a counterpart."""
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    part = tree.part(folder, card.layout["images"])
    images: dict[int, str] = {}
    masks: dict[int, str] = {}
    for path in tree.glob(folder, f"{part}/*.png"):
        if match := NAME.fullmatch(path.name):
            pictures = masks if match["kind"] == "mask" else images
            pictures[int(match["number"])] = f"{part}/{path.name}"
    problems = [f"{image} has no mask" for number, image in images.items() if number not in masks]
    problems += [f"{mask} is the mask of no image" for number, mask in masks.items() if number not in images]
    readers.raise_if_any(folder, problems)
    items = []
    for number, image in images.items():
        key = f"stu_{number:02d}"
        scan = readers.ScanFiles(folder=folder, image=image, masks=(masks[number],), patient=key)
        items.append(Item(key=key, label=UNLABELLED, recipe=scan))
    return Plan(items, readers.hash_files(folder, [*images.values(), *masks.values()]))


def load(item: Item) -> Sample:
    """Decode the image, and its mask resized to the image. Raises: DataError naming the file."""
    scan: readers.ScanFiles = item.recipe
    image_HWC = readers.read_image(scan.folder, scan.image)
    [mask] = scan.masks
    height, width = image_HWC.shape[:2]
    grey = Image.fromarray(readers.read_image(scan.folder, mask)).convert("L")
    if readers.mask_threshold() is not None or np.asarray(grey).max() < readers.HALF:
        grey = Image.fromarray(readers.read_mask(scan.folder, mask) * np.uint8(255))
    # Average first, then threshold: the mask's edges are anti-aliased, and up to 4 mask pixels per side fall on one.
    resized = grey if grey.size == (width, height) else grey.resize((width, height), Image.Resampling.BILINEAR)
    return Sample(
        key=item.key,
        patient=scan.patient,
        label=item.label,
        image_HWC=image_HWC,
        mask_HW=(np.asarray(resized) > 127).astype(np.uint8),
        sources=(scan.image, mask),
    )
