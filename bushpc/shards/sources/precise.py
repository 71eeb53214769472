"""The union that the SAM multi-task paper trains on: BUSI, BrEaST and BUS-BRA as one dataset.

    busi/ + breast/ + bus_bra/ ─each read by its source→ samples; keys and patients are prefixed with the dataset

Oddities are resolved by each dataset's source.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bushpc.sample import Sample
from bushpc.shards import readers, sources, tree
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.sources import Item, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sample of another dataset: the dataset's name and its source's item."""

    dataset: str
    item: Item


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """List all samples of the datasets in the card's layout. With `excerpt`, datasets may be missing.

    Raises: DataError for a dataset whose folder is missing, and whatever its source raises.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    missing = [part for part in card.layout if not (folder / part).is_dir()]
    if not excerpt:
        readers.raise_if_any(folder, [f"the folder {part}/ is missing: {card.layout[part]}" for part in missing])
    items: list[Item] = []
    files: dict[str, str] = {}
    for dataset in card.layout:
        if dataset in missing:
            continue
        own_card = Card.load(PROJECT_SHARDS / dataset)
        own_folder = tree.descend(folder / dataset, own_card.files)  # as unpacked: bus_bra/BUSBRA
        found = sources.source(dataset).plan(own_folder, own_card, excerpt=excerpt)
        files |= {f"{dataset}/{file}": sha256 for file, sha256 in found.sources.items()}
        items += [
            Item(key=_named(dataset, item.key), label=item.label, recipe=Recipe(dataset=dataset, item=item))
            for item in found.items
        ]
    return Plan(items, files)


def load(item: Item) -> Sample:
    """Decode the sample with its dataset's source, and prefix its names."""
    recipe: Recipe = item.recipe
    sample = sources.source(recipe.dataset).load(recipe.item)
    return dataclasses.replace(
        sample,
        key=item.key,
        patient=_named(recipe.dataset, sample.patient),
        attributes={**sample.attributes, "dataset": recipe.dataset},
        sources=tuple(f"{recipe.dataset}/{file}" for file in sample.sources),
    )


def _named(dataset: str, name: str) -> str:
    """Joined with a hyphen: WebDataset ends a key at the first dot."""
    return f"{dataset}-{name}"
