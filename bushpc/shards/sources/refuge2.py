"""REFUGE2 (Fang et al. 2022): colour fundus photographs with optic disc and cup, in the publisher's three splits.

    {train,val,test}/images/<key>.jpg + {train,val,test}/mask/<key>.{bmp,png} → image, disc and cup as bits
    Train/REFUGE1-{train,val,test}/, Validation/, Test/, as the publisher's page ships it, with REFUGE2's own 800 images

shards/refuge2/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.sample import UNLABELLED, Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

CUP, RIM, BACKGROUND = 0, 128, 255  # grey levels of a mask; the disc is rim plus cup
DISC_BIT, CUP_BIT = 0, 1  # indices in the card's mask_classes
SPLITS = ("test", "val", "train")  # indexed by published fold, as users of the download arrange it


class Split(t.NamedTuple):
    """A split of the publisher's own tree: its name, folder, published fold, and what its keys begin with."""

    name: str
    folder: str
    fold: int
    prefix: str = ""


# REFUGE2 is trained on all of REFUGE1. Its own images are numbered from 1 again, so their keys need a prefix.
PUBLISHED = (
    Split("refuge2-test", "Test", 0, "refuge2-test-"),
    Split("refuge2-val", "Validation", 1, "refuge2-val-"),
    Split("test", "Train/REFUGE1-test", 2),
    Split("val", "Train/REFUGE1-val", 2),
    Split("train", "Train/REFUGE1-train", 2),
)
MASK_FOLDERS = "disc"  # Disc_Cup_Masks, Disc_Masks, Disc_Mask
GLAUCOMA = {"g": "yes", "n": "no"}  # by the first letter of a training image's name


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Pair images and masks in each split. Raises: DataError naming every file without a counterpart."""
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    items, problems, files, published = [], [], [], {}
    for split, images, masks in _splits(folder, card):
        problems += [f"{image} has no mask" for key, image in images.items() if key not in masks]
        problems += [f"{mask} is the mask of no image" for key, mask in masks.items() if key not in images]
        for name in images.keys() & masks.keys():
            key = f"{split.prefix}{name}"
            attributes = {"split": split.name, "glaucoma": GLAUCOMA.get(name[0]) if split.name == "train" else None}
            scan = readers.ScanFiles(
                folder=folder, image=images[name], masks=(masks[name],), patient=key, attributes=attributes
            )
            items.append(Item(key=key, label=UNLABELLED, recipe=scan))
            published[key] = split.fold
        files += [*images.values(), *masks.values()]
    readers.raise_if_any(folder, problems)
    return Plan(items, readers.hash_files(folder, files), published if set(published.values()) == {0, 1, 2} else None)


def load(item: Item) -> Sample:
    """Decode image and mask. Raises: DataError naming the file, including for a mask with another encoding."""
    scan: readers.ScanFiles = item.recipe
    [mask] = scan.masks
    image_HWC = readers.read_image(scan.folder, scan.image)
    level_HW = readers.read_levels(scan.folder, mask, (CUP, RIM, BACKGROUND))
    readers.check_size(scan.image, image_HWC.shape[:2], mask, level_HW)
    if level_HW[0, 0] != BACKGROUND:
        raise DataError(
            f"{scan.folder / mask}: its corner has value {level_HW[0, 0]}; it must be background ({BACKGROUND}). "
            f"Some copies of the dataset have inverted masks: download the publisher's."
        )
    if (level_HW == CUP).any() and not (level_HW == RIM).any():
        raise DataError(
            f"{scan.folder / mask} has a cup ({CUP}) without the rest of the disc ({RIM}). A mask of the disc alone "
            "looks like that, and its disc would be packed as a cup."
        )
    disc_HW, cup_HW = (level_HW != BACKGROUND).astype(np.uint8), (level_HW == CUP).astype(np.uint8)
    return readers.sample_of(item, image_HWC, disc_HW << DISC_BIT | cup_HW << CUP_BIT)


def _splits(folder: Path, card: Card) -> t.Iterator[tuple[Split, dict[str, str], dict[str, str]]]:
    """Each split with its images and masks, name → file. Raises: DataError for two files of one name in a split."""
    if any((folder / split.folder).is_dir() for split in PUBLISHED):
        for split in PUBLISHED:
            files = _pictures(folder, f"{split.folder}/**/*")
            are_masks = [any(part.lower().startswith(MASK_FOLDERS) for part in Path(file).parts) for file in files]
            images = [file for file, is_mask in zip(files, are_masks, strict=True) if not is_mask]
            yield split, _by_name(folder, images), _by_name(folder, sorted(set(files) - set(images)))
    else:
        for fold, name in enumerate(SPLITS):
            images, masks = (_pictures(folder, f"{name}/{card.layout[part]}/*") for part in ("images", "masks"))
            yield Split(name, name, fold), _by_name(folder, images), _by_name(folder, masks)


def _pictures(folder: Path, pattern: str) -> list[str]:
    paths = tree.glob(folder, pattern)
    suffixes = (".jpg", ".jpeg", ".bmp", ".png")
    return [path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in suffixes]


def _by_name(folder: Path, files: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for file in files:
        if (other := named.setdefault(Path(file).stem, file)) != file:
            raise DataError(f"{folder}: {other} and {file} have one name: keep one of them.")
    return named
