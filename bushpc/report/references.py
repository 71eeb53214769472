"""What a run used → BibTeX: its datasets from their cards, its models from their papers, libraries and tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bushpc.config import places
from bushpc.errors import DataError
from bushpc.report.published import find_published, tables_of
from bushpc.report.scope import ReportScope
from bushpc.report.summary import Summary
from bushpc.shards.card import Card

FILE = Path(__file__).with_name("references.bib")
# Beginning of a model's name → entries of the file. Models of a paper have it in `published` or in their page.
OF_MODELS = {
    "unet": ("unet", "smp"),
    "smp": ("smp", "timm"),
    "attention_unet": ("monai",),
    "basic_unet": ("monai",),
    "swin_unetr": ("monai",),
    "efficientnet": ("efficientnet",),
    "nnunet": ("nnunet",),
}


def bibtex(scope: ReportScope, summary: Summary) -> str:
    """The entries, each once. Where only a citation is known, it stands in `note`, as card or paper's file has it."""
    used = ["pytorch", "claim"]
    used += [
        key for arm in scope.arms for start, keys in OF_MODELS.items() if arm.model.startswith(start) for key in keys
    ]
    if summary.comparisons:
        used += ["wilcoxon", "nadeau_bengio", "holm"]
    known = entries()
    return "\n\n".join([*_datasets(scope), *_papers(scope), *(known[key] for key in dict.fromkeys(used))]) + "\n"


def entries() -> dict[str, str]:
    """Every entry of the file by its key."""
    parts = re.split(r"\n\s*\n", FILE.read_text(encoding="utf-8").strip())
    return {part.partition("{")[2].partition(",")[0]: part for part in parts}


def datasets(scope: ReportScope) -> dict[str, Card]:
    """The cards of all datasets that the runs read, by name; those that cannot be read are left out."""
    found = {}
    folders = {run.record.data: Path(run.record.shards) for run in scope.runs}
    for name in dict.fromkeys([*folders, *scope.external]):
        for folder in (folders.get(name), places.shipped_shards() / name):
            try:
                if folder is not None and name not in found:
                    found[name] = Card.load(folder)
            except DataError:  # the shards are gone; the shipped card follows
                continue
    return found


def _datasets(scope: ReportScope) -> Iterator[str]:
    for name, card in datasets(scope).items():
        if card.citation and card.where:
            yield _misc(f"data_{name}", card.title, f"{' '.join(card.citation.split())}. Licence: {card.licence}")


def _papers(scope: ReportScope) -> Iterator[str]:
    """Papers whose figures stand in the report, and those of the models."""
    found: dict[str, None] = {}
    for arm in scope.arms:
        own = not any(arm.model.startswith(start) for start in OF_MODELS)
        for kind in ("overall", "ablation", "strata", "by_class"):
            shown = find_published(arm.run.data, arm.model, kind)
            tables = [shown] if shown else tables_of(arm.model, kind)[:1] if own else []
            found |= {table.citation: None for table in tables}
    for number, citation in enumerate(found, 1):
        title = re.search("“(.+)”", citation)
        yield _misc(f"published{number}", title.group(1) if title else citation, citation)


def _misc(key: str, title: str, note: str) -> str:
    plain = {"“": "``", "”": "''", "&": r"\&", "%": r"\%", "\u2013": "--", "_": r"\_"}

    def text(given: str) -> str:
        return "".join(plain.get(letter, letter) for letter in given.replace("{", "").replace("}", ""))

    doi = re.search(r"doi:\s*(10\.\S+?)[.,;)]?(?:\s|$)", note)
    fields = {"title": f"{{{text(title)}}}", "note": text(note), **({"doi": doi.group(1)} if doi else {})}
    return f"@misc{{{key}, " + ", ".join(f"{name} = {{{value}}}" for name, value in fields.items()) + "}"
