"""BUSI (Al-Dhabyani et al. 2020): one folder per class, masks next to their images.

    <class>/<class> (<n>).png ─with _mask, _mask_1 and _mask_2→ image, united mask

shards/busi/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.shards import pairs, readers
from bushpc.shards.sources import Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

NAMES = pairs.Names(
    image=r"{label} \((?P<scan>\d+)\)\.png",
    mask=r"{label} \((?P<scan>\d+)\)_mask(_\d+)?\.png",
    like="'{label} (1).png' or '{label} (1)_mask.png'",
)
load = readers.load_scan


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair the images of every class folder with their masks. With `excerpt`, class folders may be missing.

    Raises: DataError naming every missing or unknown class folder, and every file without a counterpart.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    return pairs.class_folders(folder, card, NAMES, excerpt=excerpt)
