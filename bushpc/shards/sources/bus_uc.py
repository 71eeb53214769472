"""BUS-UC (Iqbal & Sharif 2024): a folder of images and one of masks in each class folder.

    <Class>/images/<name>.png + <Class>/masks/<name>.png → image, mask

shards/bus_uc/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import numpy as np

from bushpc.sample import Sample
from bushpc.shards import pairs, readers
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAMES = pairs.Names(
    image=r"images/(?P<scan>[^/]+)\.png",
    mask=r"masks/(?P<scan>[^/]+)\.png",
    like="images/001.png or masks/001.png",
)
MOST_OFF = 1  # pixels in each direction


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair the images of both class folders with their masks. With `excerpt`, a class folder may be missing.

    Raises: DataError naming every missing or unknown class folder, and every file without a counterpart.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    return pairs.class_folders(folder, card, NAMES, excerpt=excerpt, others="All")


def load(item: Item) -> Sample:
    """Decode the image and its mask, which may be one pixel larger or smaller. Raises: DataError naming the file."""
    scan: readers.ScanFiles = item.recipe
    [mask] = scan.masks
    image_HWC, mask_HW = readers.read_image(scan.folder, scan.image), readers.read_mask(scan.folder, mask)
    height, width = image_HWC.shape[:2]
    if max(abs(mask_HW.shape[0] - height), abs(mask_HW.shape[1] - width)) <= MOST_OFF:
        mask_HW = np.pad(mask_HW, ((0, MOST_OFF), (0, MOST_OFF)))[:height, :width]
    readers.check_size(scan.image, image_HWC.shape[:2], mask, mask_HW)
    return readers.sample_of(item, image_HWC, mask_HW)
