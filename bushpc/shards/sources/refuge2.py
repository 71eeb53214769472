"""REFUGE2 (Fang et al. 2022): colour fundus photographs with optic disc and cup, in the publisher's three splits.

    {train,val,test}/images/<key>.jpg + {train,val,test}/mask/<key>.{bmp,png} → image, disc and cup as bits

shards/refuge2/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.sample import UNLABELLED, Sample
from bushpc.shards import readers
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

CUP, RIM, BACKGROUND = 0, 128, 255  # grey levels of a mask; the disc is rim plus cup
DISC_BIT, CUP_BIT = 0, 1  # indices in the card's mask_classes
SPLITS = ("test", "val", "train")  # indexed by published fold
GLAUCOMA = {"g": "yes", "n": "no"}  # by the first letter of a training image's name


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks in each split. Raises: DataError naming every file without a counterpart."""
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    items, problems, files, published = [], [], [], {}
    for fold, split in enumerate(SPLITS):
        images, masks = (_pictures(folder, f"{split}/{card.layout[part]}") for part in ("images", "masks"))
        problems += [f"{image} has no mask" for key, image in images.items() if key not in masks]
        problems += [f"{mask} is the mask of no image" for key, mask in masks.items() if key not in images]
        for key in images.keys() & masks.keys():
            attributes = {"split": split, "glaucoma": GLAUCOMA.get(key[0]) if split == "train" else None}
            scan = readers.ScanFiles(
                folder=folder, image=images[key], masks=(masks[key],), patient=key, attributes=attributes
            )
            items.append(Item(key=key, label=UNLABELLED, recipe=scan))
            published[key] = fold
        files += [*images.values(), *masks.values()]
    readers.raise_if_any(folder, problems)
    return Plan(items, readers.hash_files(folder, files), published if set(published.values()) == {0, 1, 2} else None)


def load(item: Item) -> Sample:
    """Decode image and mask. Raises: DataError naming the file, including for a mask with another encoding."""
    scan: readers.ScanFiles = item.recipe
    [mask] = scan.masks
    image_HWC = readers.read_image(scan.folder, scan.image)
    level_HW = readers.read_levels(scan.folder, mask, (CUP, RIM, BACKGROUND))
    readers.check_size(scan.image, image_HWC, mask, level_HW)
    if level_HW[0, 0] != BACKGROUND:
        raise DataError(
            f"{scan.folder / mask}: its corner has value {level_HW[0, 0]}; it must be background ({BACKGROUND}). "
            f"Some copies of the dataset have inverted masks: download the publisher's."
        )
    disc_HW, cup_HW = (level_HW != BACKGROUND).astype(np.uint8), (level_HW == CUP).astype(np.uint8)
    return Sample(
        key=item.key,
        patient=scan.patient,
        label=item.label,
        image_HWC=image_HWC,
        mask_HW=disc_HW << DISC_BIT | cup_HW << CUP_BIT,
        attributes=dict(scan.attributes),
        sources=(scan.image, mask),
    )


def _pictures(folder: Path, part: str) -> dict[str, str]:
    """The images in a folder: key → file."""
    paths = sorted(path for path in (folder / part).glob("[!.]*") if path.suffix.lower() in (".jpg", ".bmp", ".png"))
    return {path.stem: f"{part}/{path.name}" for path in paths}
