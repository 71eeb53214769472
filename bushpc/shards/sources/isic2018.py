"""ISIC 2018, task 1 (Codella et al. 2019): dermoscopic photographs with the lesion's outline, and no labels.

    …_Training_Input/ISIC_0000000.jpg + …_Training_GroundTruth/ISIC_0000000_segmentation.png → sample

What is odd about the published files, and what is done about it, is listed under `notes` in
shards/isic2018/card.yaml.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.sample import UNLABELLED, Sample
from bushpc.shards import raw
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

SUFFIX = "_segmentation.png"
SKIN, LESION = 0, 255


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks by number. Raises: DataError naming every file without a counterpart."""
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    parts = card.layout["images"], card.layout["masks"]
    # Both folders hold texts besides, and the images' may hold a superpixel picture for each.
    images = {path.stem: f"{parts[0]}/{path.name}" for path in sorted((folder / parts[0]).glob("ISIC_*.jpg"))}
    masks = {
        path.name.removesuffix(SUFFIX): f"{parts[1]}/{path.name}"
        for path in sorted((folder / parts[1]).glob(f"ISIC_*{SUFFIX}"))
    }
    problems = [f"{image} has no mask" for key, image in images.items() if key not in masks]
    problems += [f"{mask} is the mask of no image" for key, mask in masks.items() if key not in images]
    raw.refuse(folder, problems)
    items = [
        Item(
            key=key,
            label=UNLABELLED,
            recipe=raw.Scan(folder=folder, image=image, masks=(masks[key],), patient=key),
        )
        for key, image in images.items()
    ]
    return Plan(items, raw.hashes(folder, [*images.values(), *masks.values()]))


def load(item: Item) -> Sample:
    """Decode image and mask. Raises: DataError naming the file."""
    scan: raw.Scan = item.recipe
    [mask] = scan.masks
    image_HWC = raw.read_image(scan.folder, scan.image)
    level_HW = raw.read_levels(scan.folder, mask, (SKIN, LESION))
    raw.check_size(scan.image, image_HWC, mask, level_HW)
    return Sample(
        key=item.key,
        patient=scan.patient,
        label=item.label,
        image_HWC=image_HWC,
        mask_HW=level_HW // LESION,
        sources=(scan.image, mask),
    )
