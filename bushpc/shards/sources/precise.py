"""The union that the SAM multi-task paper trains on: BUSI, BrEaST and BUS-BRA as one dataset.

    busi/ + breast/ + bus_bra/ ─each by its own source→ samples, keys and patients named after their dataset

Nothing odd is resolved here: each dataset's source does that.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bushpc.sample import Sample
from bushpc.shards import raw, sources
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.sources import Item, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sample of another dataset: which, and what that dataset's source knows it by."""

    dataset: str
    item: Item


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """All samples of the datasets that the card's layout names; with `excerpt`, a dataset may be absent.

    Raises: DataError for a dataset whose folder is missing, and whatever its own source raises.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    missing = [part for part in card.layout if not (folder / part).is_dir()]
    if not excerpt:
        raw.refuse(folder, [f"the folder {part}/ is missing: {card.layout[part]}" for part in missing])
    items: list[Item] = []
    files: dict[str, str] = {}
    for dataset in card.layout:
        if dataset in missing:
            continue
        found = sources.source(dataset).plan(folder / dataset, Card.load(PROJECT_SHARDS / dataset), excerpt=excerpt)
        files |= {f"{dataset}/{file}": sha256 for file, sha256 in found.sources.items()}
        items += [
            Item(key=_named(dataset, item.key), label=item.label, recipe=Recipe(dataset=dataset, item=item))
            for item in found.items
        ]
    return Plan(items, files)


def load(item: Item) -> Sample:
    """The sample as its own source decodes it, under its new name."""
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
    """With a hyphen, as a dot in a key would end it for readers of the tars."""
    return f"{dataset}-{name}"
