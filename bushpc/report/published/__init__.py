"""Figures that papers print, one yaml per paper and dataset, shown beside our own and marked as the paper's.

The form of these files:
  citation, short   the paper, in full and as tables say it
  data              the dataset, as `data=` names it
  image_size        edge of the squares that the paper resizes images to; left out if it doesn't say
  overall | by_class | strata | fold_wise | ablation | external
                    the paper's tables, each with
    table           its number there
    models          the models, and with them their variants (`xbusnet_…`), whose runs it is shown for
    decimals        how many the paper prints; one number, or metric → number
    percent         metrics that the paper prints in percent; ours are fractions, so they are shown as such
    rows            the paper's name → figures by metric (metrics/registry.py; `parameters`): a mean, or [mean, SD].
                    By class, by stratum and of other datasets (external) these stand one level below the class,
                    stratum or dataset.
                    Of an ablation also the settings that make the row, as the grid states them (model.lfe: true …),
                    or `row`, the grid's own name for it, or a list of its names.
  generators        distances of trained generators: `table`, and `rows`: the paper's name → fid and kid
"""

from __future__ import annotations

import functools
import typing as t
from pathlib import Path

import yaml

from bushpc.metrics.registry import METRICS

PARAMETERS = "parameters"


class PublishedTable(t.NamedTuple):
    """One table of a paper.

    data: the dataset that its figures are of.
    name: the paper, and the table's number there. citation: the paper.
    note, image_size: as in the yaml.
    decimals: by metric, how many its figures are shown with. percent: whether some are printed in percent.
    metrics: that it prints, in its order; `parameters` among them.
    rows: the paper's row name → its figures, shaped as in the yaml, percent as fractions.
    """

    data: str
    name: str
    citation: str
    note: str
    image_size: int | None
    decimals: dict[str, int]
    percent: bool
    metrics: tuple[str, ...]
    rows: dict[str, dict[str, t.Any]]

    @property
    def heading(self) -> str:
        """How its rows are introduced where they stand beside ours."""
        return f"{self.name} ({self.printed})"

    @property
    def printed(self) -> str:
        """How far its figures are the paper's own words."""
        return "figures as printed there" + (", percent as fractions" if self.percent else "")


class GeneratorRow(t.NamedTuple):
    """FID and KID that a paper prints of a generator. heading: paper and table."""

    label: str
    fid: float
    kid: float
    heading: str
    citation: str


def generator_rows(data: str) -> list[GeneratorRow]:
    """The rows of every paper's table of generators trained on a dataset."""
    return [
        GeneratorRow(name, row["fid"], row["kid"], f"{paper['short']}, {table['table']}", paper["citation"])
        for paper in _papers()
        if paper["data"] == data and (table := paper.get("generators"))
        for name, row in table["rows"].items()
    ]


def grid_sentence(paper: PublishedTable) -> str:
    """On which grid its metrics of masks are taken. None of these papers says it."""
    resized = f"resizes images to {paper.image_size} x {paper.image_size} pixels and " if paper.image_size else ""
    return f"The paper {resized}does not say on which grid its metrics are taken."


PAPERS = (  # begin files' names
    *("xbusnet", "hybrid_attention", "vit_diffusion", "sam_multitask"),
    *("tumor_generator", "tumor_downstream"),
)
_OF_METHODS = ("overall", "by_class", "strata", "external")  # tables of metrics with one row per method


def names_in(paper: str) -> tuple[str, ...]:
    """Every name that a paper's tables of methods have for a row, whatever the dataset. paper: one of PAPERS."""
    tables = _tables_in(paper, (*_OF_METHODS, "generators"))
    return tuple(dict.fromkeys(name for table in tables for name in table["rows"]))


def prints_metrics(paper: str) -> bool:
    """Whether a paper's tables of methods have the metrics of predictions, not of generated scans alone."""
    return bool(_tables_in(paper, _OF_METHODS))


def _tables_in(paper: str, kinds: t.Iterable[str]) -> list[t.Any]:
    return [content[kind] for content in _papers() if _is_of(content, paper) for kind in kinds if kind in content]


def paper_table(paper: str, data: str, kind: str) -> PublishedTable | None:
    """A paper's table of this kind for the dataset, if it has one. paper: one of PAPERS."""
    found = (content for content in _papers() if _is_of(content, paper) and content["data"] == data)
    return next((_table(content, content[kind]) for content in found if kind in content), None)


def find_published(data: str, model: str, kind: str) -> PublishedTable | None:
    """The paper's table of this kind (overall, by_class, strata …) that fits the dataset and model, if there is one."""
    return next((table for table in tables_of(model, kind) if table.data == data), None)


def tables_of(model: str, kind: str) -> list[PublishedTable]:
    """Every paper's table of this kind for the model, whatever its dataset: what the paper's table looks like."""
    found = []
    for paper in _papers():
        table = paper.get(kind)
        if table and any(_is_variant(model, name) for name in table["models"]):
            found.append(_table(paper, table))
    return found


@functools.cache
def _papers() -> list[dict[str, t.Any]]:
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return [{"file": path.stem, **yaml.safe_load(path.read_text(encoding="utf-8"))} for path in files]


def _is_of(content: dict[str, t.Any], paper: str) -> bool:
    return bool(content["file"] == f"{paper}_{content['data']}")


def _table(paper: dict[str, t.Any], table: dict[str, t.Any]) -> PublishedTable:
    percent = table.get("percent", ())
    metrics = tuple(dict.fromkeys(name for row in table["rows"].values() for name in _figures_of(row)))
    decimals = table["decimals"]
    printed = {name: decimals if isinstance(decimals, int) else decimals.get(name, 0) for name in metrics}
    return PublishedTable(
        data=paper["data"],
        name=f"{paper['short']}, {table['table']}",
        citation=paper["citation"],
        note=" ".join(table.get("note", "").split()),
        image_size=paper.get("image_size"),
        decimals={name: digits + (2 if name in percent else 0) for name, digits in printed.items()},
        percent=bool(percent),
        metrics=metrics,
        rows={name: _as_fractions(row, percent) for name, row in table["rows"].items()},
    )


def _figures_of(row: dict[str, t.Any]) -> t.Iterator[str]:
    """The metrics of a row, which of a table by class or stratum stand one level below."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _figures_of(value)
        elif name in METRICS or name == PARAMETERS:
            yield name


def _as_fractions(row: dict[str, t.Any], percent: t.Collection[str]) -> dict[str, t.Any]:
    def fraction(value: t.Any) -> t.Any:
        # Rounded, for 94.37 / 100 is not 0.9437 in binary.
        return [fraction(part) for part in value] if isinstance(value, list) else round(value / 100, 9)

    return {
        name: _as_fractions(value, percent)
        if isinstance(value, dict)
        else fraction(value)
        if name in percent and value is not None
        else value
        for name, value in row.items()
    }


def _is_variant(model: str, family: str) -> bool:
    return model == family or model.startswith(f"{family}_")
