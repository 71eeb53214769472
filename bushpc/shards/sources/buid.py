"""BUID, the breast ultrasound image database of QAMEBI (Abbasian Ardakani et al. 2023): one folder per class.

    <Class>/<n> <Class> Image.bmp + <n> <Class> Mask.tif → image, mask

shards/buid/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.shards import pairs, readers
from bushpc.shards.sources import Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAMES = pairs.Names(
    image=r"(?P<scan>\d+) {label} Image\.bmp",
    mask=r"(?P<scan>\d+) {label} Mask\.tif",
    like="'1 {label} Image.bmp' or '1 {label} Mask.tif'",
    unread=r"\d+ {label} Lesion\.bmp",  # the image with the lesion cut out or outlined
)
load = readers.load_scan


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair the images of both class folders with their masks. With `excerpt`, a class folder may be missing.

    Raises: DataError naming every missing or unknown class folder, and every file without a counterpart.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    return pairs.class_folders(folder, card, NAMES, excerpt=excerpt)
