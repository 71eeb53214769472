"""`bushpc shards list`: what each dataset is, where to get it, and whether it is packed here.

    cards + manifests in the shards folder → entries → table, lines or JSON

A dataset counts as packed if its manifest is intact and its tars match the manifest.
"""

from __future__ import annotations

import json
import typing as t
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bushpc.config import places
from bushpc.errors import DataError
from bushpc.shards import manifest as manifests
from bushpc.shards import sources
from bushpc.shards.card import FILE_NAME, PROJECT_SHARDS, Card
from bushpc.shards.manifest import Manifest

if t.TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dataset of the list.

    name, title, what, licence, where, counts, verified: as on its card.
    packed: `no`, `whole`, `excerpt` or `damaged`. scans: packed scans by label. manifest: its hash as hex, or None.
    fault: describes the damage; otherwise empty.
    """

    name: str
    title: str
    what: str
    licence: str
    where: str
    counts: dict[str, int]
    verified: bool
    packed: str
    scans: dict[str, int]
    manifest: str | None
    fault: str = ""


def list_datasets(folder: str | Path | None = None, *, deep: bool = False) -> list[Entry]:
    """All datasets that can be packed, sorted by name. `folder` holds the packed ones; None is
    where `bushpc pack` puts them.

    deep: compare every tar's SHA-256 with the manifest, not just its presence and size.
    Raises: DataError for a card that cannot be read. A damaged dataset becomes an entry that says so.
    """
    folder = Path(folder or places.home() / "shards")
    return [_entry(name, folder / name, deep) for name in sorted({*sources.names(), *_imported(folder)})]


def to_json(entries: Sequence[Entry]) -> str:
    """The list as JSON."""
    return json.dumps([asdict(entry) for entry in entries], indent=1, ensure_ascii=False)


def listing_table(entries: Sequence[Entry]) -> Table:
    """The list for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for header in ("data=", "what", "images", "licence", "where", "run on real files", "packed here"):
        table.add_column(header, overflow="fold", no_wrap=header == "data=")
    for entry in entries:
        table.add_row(*map(Text, (entry.name, entry.title, *_facts(entry))))
    return table


def plain_lines(entry: Entry) -> str:
    """An entry as plain text, for a log."""
    images, licence, where, verified, packed = _facts(entry)
    return (
        f"{entry.name}: {entry.title}\n    images: {images}\n    licence: {licence}\n    where: {where}\n"
        f"    run on real files: {verified}\n    packed here: {packed}"
    )


def _imported(folder: Path) -> list[str]:
    """The cohorts that `bushpc shards import` put into the shards folder."""
    names = [path.parent.name for path in folder.glob(f"*/{FILE_NAME}")]
    return [name for name in names if name not in sources.names() and Card.load(folder / name).imported]


def _entry(name: str, folder: Path, deep: bool) -> Entry:
    card = Card.load(PROJECT_SHARDS / name if name in sources.names() else folder)
    packed, fault, manifest = "no", "", None
    if (folder / manifests.FILE_NAME).exists():
        try:
            manifest = Manifest.load(folder)
            manifests.verify(folder, manifest, deep)
            packed = "excerpt" if manifest.excerpt else "whole"
        except DataError as error:
            packed, fault = "damaged", str(error)
    return Entry(
        name=name,
        title=card.title,
        what=card.what,
        licence=card.licence,
        where=card.where,
        counts=card.counts,
        verified=card.verified,
        packed=packed,
        scans=dict(Counter(record.label for record in manifest.records)) if manifest else {},
        manifest=manifest.hash if manifest else None,
        fault=fault,
    )


def _facts(entry: Entry) -> tuple[str, str, str, str, str]:
    """Images, licence, where, verified and packed as texts."""
    return (
        _by_label(entry.counts) or "as many as its parameters say",
        entry.licence,
        entry.where or "made here",
        "synthetic" if not entry.where else "yes" if entry.verified else "not yet",
        {"no": "no", "damaged": f"damaged: {entry.fault}"}.get(
            entry.packed, f"{entry.packed}: {_by_label(entry.scans)}; manifest {(entry.manifest or '')[:12]}"
        ),
    )


def _by_label(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {label}" for label, count in counts.items())
