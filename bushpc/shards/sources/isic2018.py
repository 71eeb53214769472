"""ISIC 2018, task 1 (Codella et al. 2019): dermoscopic photographs with the lesion's outline, without labels.

    …_Training_Input/ISIC_0000000.jpg + …_Training_GroundTruth/ISIC_0000000_segmentation.png → sample

shards/isic2018/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.sample import UNLABELLED, Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

SUFFIX = "_segmentation.png"
SKIN, LESION = 0, 255


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks by number. Raises: DataError naming every file without a counterpart."""
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    parts = [tree.part(folder, card.layout[name]) for name in ("images", "masks")]
    # Both folders also hold text files, and the image folder may hold a superpixel picture for each image.
    images = {path.stem: f"{parts[0]}/{path.name}" for path in tree.glob(folder, f"{parts[0]}/ISIC_*.jpg")}
    masks = {
        path.name.removesuffix(SUFFIX): f"{parts[1]}/{path.name}"
        for path in tree.glob(folder, f"{parts[1]}/ISIC_*{SUFFIX}")
    }
    problems = [f"{image} has no mask" for key, image in images.items() if key not in masks]
    problems += [f"{mask} is the mask of no image" for key, mask in masks.items() if key not in images]
    readers.raise_if_any(folder, problems)
    items = [
        Item(
            key=key,
            label=UNLABELLED,
            recipe=readers.ScanFiles(folder=folder, image=image, masks=(masks[key],), patient=key),
        )
        for key, image in images.items()
    ]
    return Plan(items, readers.hash_files(folder, [*images.values(), *masks.values()]))


def load(item: Item) -> Sample:
    """Decode image and mask. Raises: DataError naming the file."""
    scan: readers.ScanFiles = item.recipe
    [mask] = scan.masks
    image_HWC = readers.read_image(scan.folder, scan.image)
    mask_HW = readers.read_mask(scan.folder, mask, known=(SKIN, LESION))
    readers.check_size(scan.image, image_HWC.shape[:2], mask, mask_HW)
    return readers.sample_of(item, image_HWC, mask_HW)
