"""BUSC (images by Rodrigues 2017, masks by Iqbal & Sharif 2023): small scans with masks, without labels.

    Segmentation/images/<name>.png + Segmentation/masks/<name>.png → image, mask

shards/busc/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.shards import pairs, readers
from bushpc.shards.sources import Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAMES = pairs.Names(
    image=r"images/(?P<scan>[^/]+)\.png",
    mask=r"masks/(?P<scan>[^/]+)\.png",
    like="images/1.png or masks/1.png",
)
OTHERS = ".*"  # the archive also holds the images for classification, without masks
load = readers.load_scan


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks by name. Raises: DataError naming every file without a counterpart."""
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    return pairs.class_folders(folder, card, NAMES, excerpt=excerpt, others=OTHERS)
