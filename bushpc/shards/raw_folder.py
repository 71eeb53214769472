"""Before any work: is the raw folder the one that the card describes, is it complete, and how are its files read?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path

from bushpc.errors import ConfigError, DataError
from bushpc.shards import pictures, readers, sources, tree
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.progress import Show
from bushpc.shards.sources import Load


def require_folder(src: str | Path | None, card: Card) -> Path | None:
    if card.made_here:
        return None if src is None else Path(src)  # the source itself rejects a src
    if src is None:
        raise ConfigError(
            f"data={card.name} needs src=FOLDER: {card.title} as downloaded from {card.where} ({card.licence}). "
            f"shards/{card.name}/card.yaml describes the folder's content."
        )
    if not Path(src).is_dir():
        raise DataError(f"src={src} is not a folder. {card.title} is available from {card.where}.")
    return Path(src)


def check_belongs(src: Path, card: Card) -> None:
    """Raises: DataError if the folder has none of the card's files, or matches another dataset's card completely.

    The message says which dataset the folder looks like, and where the right folder may be: a common mistake is to
    give its parent or a subfolder.
    """
    share = _share_of_files(src, card, deep=True)
    if share == 1 or not card.files:
        return
    cards = [Card.load(path.parent) for path in sorted(PROJECT_SHARDS.glob("*/card.yaml"))]
    others = [other.name for other in cards if other.name != card.name and _share_of_files(src, other) == 1]
    if not share or others:
        place = _right_folder(src, card)
        elsewhere = None if place else _other_dataset(src, cards)
        raise DataError(
            f"{src} is not the folder of {card.name}: "
            + (f"it looks like data={others[0]}." if others else f"it has no file {' or '.join(card.files)}.")
            + (f" src={place} looks like {card.name}." if place else "")
            + (f" {elsewhere[0]} looks like data={elsewhere[1]}." if elsewhere and not others else "")
            + f" shards/{card.name}/card.yaml describes the folder's content."
        )


def _right_folder(src: Path, card: Card) -> Path | None:
    """The folder near `src` that has all of the card's files, else one that has most kinds of them."""
    whole = tree.find(src, lambda place: _share_of_files(place, card) == 1)
    return whole or tree.find(src, lambda place: _share_of_files(place, card) > 1 / 2)


def _other_dataset(src: Path, cards: list[Card]) -> tuple[Path, str] | None:
    """A folder near `src` that is another dataset's, and its name."""
    for card in cards:
        if card.files and (place := tree.find(src, functools.partial(_is_whole, card))):
            return place, card.name
    return None


def _is_whole(card: Card, folder: Path) -> bool:
    return _share_of_files(folder, card) == 1


def _share_of_files(folder: Path, card: Card, *, deep: bool = False) -> float:
    """Share of the card's file patterns that match a file in the folder, in the layout that fits best.

    0 for a card without patterns. deep: also try layouts that are searched for in the whole tree. Looking for the right
    folder does without: such a layout fits every folder above its files, and each look would walk the tree again.
    """
    layouts = [each for each in card.every_layout if deep or not any(file.startswith("**") for file in each.files)]
    return max(share_of_layout(folder, each) for each in layouts)


def share_of_layout(folder: Path, card: Card) -> float:
    return sum(bool(tree.glob(folder, pattern)) for pattern in card.files) / max(len(card.files), 1)


def check_counts(src: Path, card: Card, plan: sources.Plan) -> None:
    found = {pattern: len(tree.glob(src, pattern)) for pattern in card.files}
    off = [
        f"{found[pattern]} files match {pattern}, {count} expected"
        for pattern, count in card.files.items()
        if found[pattern] != count
    ]
    labels = [item.label for item in plan.items]
    off += [
        f"{labels.count(label)} samples are {label}, {count} expected"
        for label, count in card.counts.items()
        if labels.count(label) != count
    ]
    if off:
        raise DataError(
            f"{src} does not match the card of {card.name}:\n  "
            + "\n  ".join(off)
            + "\nDownload it again; or, if the folder is deliberately a part of the dataset, add excerpt=true."
        )


def how_to_read(
    items: list[sources.Item], load: Load, how: readers.Reading, grey_max: float | None, report: Show
) -> readers.Reading:
    """Find the range of deep pictures, and whether the masks' lesions are 1 instead of 255; reports either."""
    images = [image for item in items if (image := sources.image_of(item))]
    ranges, warnings = pictures.survey(images, grey_max)
    for kind, range_ in ranges.items():
        report(0, len(items), f"{kind} pictures of more than 8 bits: {range_} become black to white")
    for warning in warnings:
        report(0, len(items), f"warning: {warning}; grey_max=N sets another white")
    if grey_max is not None and not ranges:
        report(0, len(items), "grey_max= has no effect: all pictures have 8 bits")
    how = dataclasses.replace(how, ranges=ranges)
    if how.mask_threshold is None and (faint := _faint_mask(items, load, how)):
        loose = dataclasses.replace(how, mask_threshold=1, levels={})
        with readers.reading(loose):
            for item in items:
                with contextlib.suppress(Exception):  # whatever is wrong with an item, packing reports it
                    load(item)
        if max(loose.levels.values()) > 1:
            raise faint
        report(0, len(items), "no mask has a level above 1, so lesion is 1 (mask_threshold=1)")
        how = dataclasses.replace(how, mask_threshold=1)
    return how


def _faint_mask(items: list[sources.Item], load: Load, how: readers.Reading) -> readers.FaintMask | None:
    """What is wrong with the first lesion's mask, if it is faint. One in a set of bright masks fails in packing."""
    first = next((item for item in items if item.label != "normal"), None)
    try:
        with readers.reading(how):
            load(first) if first else None
    except readers.FaintMask as error:
        return error
    except Exception:  # packing reports it
        return None
    return None
