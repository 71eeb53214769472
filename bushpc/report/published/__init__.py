"""Figures that papers print, one yaml per paper and dataset, shown beside our own and marked as the paper's."""

from __future__ import annotations

import typing as t
from pathlib import Path

import yaml


class PublishedTable(t.NamedTuple):
    """One table of a paper.

    name: the paper, and the table's number there. citation: the paper.
    decimals: how many the paper prints.
    rows: the paper's row name → its figures, shaped as in the yaml.
    """

    name: str
    citation: str
    decimals: int
    rows: dict[str, dict[str, t.Any]]

    @property
    def heading(self) -> str:
        """How its rows are introduced where they stand beside ours."""
        return f"{self.name} (figures as printed there)"


def find_published(data: str, model: str, kind: str) -> PublishedTable | None:
    """The paper's table of this kind (overall, strata, fold_wise, ablation), if one fits the dataset and model."""
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        paper = yaml.safe_load(path.read_text(encoding="utf-8"))
        table = paper.get(kind)
        if paper["data"] == data and table and any(_is_variant(model, name) for name in table["models"]):
            return PublishedTable(
                f"{paper['short']}, {table['table']}", paper["citation"], table["decimals"], table["rows"]
            )
    return None


def _is_variant(model: str, family: str) -> bool:
    return model == family or model.startswith(f"{family}_")
