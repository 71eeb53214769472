"""Scans with their masks and remarks → one HTML page to look through them: filters, sorting, search, a large view.

    rows ─write_gallery→ index.html      `bushpc shards show`, `shards audit` and the dry run of `shards import`

The page is one file without external resources, usable from the keyboard, and opens from a mail or a USB stick. So it
holds all pictures, made as large as fits into MOST_BYTES. A link can name a scan (`#scan=ID`) or set filters
(`#label=malignant&fold=2`).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import typing as t
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bushpc.errors import ConfigError, DataError
from bushpc.report import standalone
from bushpc.report.thumbnails import Thumbnail, thumbnail_of
from bushpc.shards.progress import Show

# Longer side of the pictures in pixels: the largest with which the page stays below MOST_BYTES.
EDGES = (1024, 768, 640, 512, 384, 320, 256, 192, 128, 96)
MOST_BYTES = 48_000_000
_TRIED = 24  # scans that are encoded to estimate the page's size
_AT_A_TIME = 64  # pictures wait to be written, so memory does not grow with the dataset

Value = str | int | float | None
ImageAndMask = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark on a scan. kind: what the page can filter by. grave: shown as a warning. other: id of a related scan."""

    kind: str
    text: str = ""
    grave: bool = False
    other: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scan on the page.

    id: unique on the page, used in links. key: what the page calls it.
    load: image_HWC (uint8) and mask_HW (uint8, bit k is class k; None if there is none). It is called in threads; the
        text of a DataError is shown in place of the picture.
    fields: name → value, as shown; None where there is none. All rows have the same names.
    """

    id: str
    key: str
    load: Callable[[], ImageAndMask]
    fields: Mapping[str, Value]
    notes: Sequence[Note] = field(default=())


def write_gallery(
    page: Path,
    rows: Sequence[Row],
    *,
    title: str,
    kicker: str,
    command: Sequence[str],
    filters: Sequence[str],
    classes: Sequence[str] = ("lesion",),
    figures: Mapping[str, Value] | None = None,
    remarks: Sequence[str] = (),
    problems: Sequence[str] = (),
    links: Mapping[str, str] | None = None,
    edge: int | None = None,
    progress: Show | None = None,
) -> Path:
    """Write `page`, whole; returns it.

    kicker: the kind of page, above its title. filters: names of the fields that get a filter. figures: shown at the
    top, by name. remarks, problems: paragraphs at the top. links: text → relative link, at the top.
    edge: longer side of the pictures in pixels; by default the largest of EDGES with which the page stays below
        MOST_BYTES.
    Raises: ConfigError for no rows, OSError.
    """
    if not rows:
        raise ConfigError(f"{title}: there are no scans to show")
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids), "ids are unique"
    edge = edge or _fitting_edge(rows, len(classes))
    names = list(rows[0].fields)
    content = {
        "fields": names,
        "filters": list(filters),
        "classes": list(classes),
        "scans": [
            _content(row, picture, names)
            for row, picture in zip(rows, _pictures(rows, classes, edge, progress), strict=True)
        ],
    }
    # "<" could end the script element.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    templates = standalone.environment()
    script = templates.get_template("gallery.js").render()
    return standalone.write_page(
        page.parent,
        "gallery.html.j2",
        command,
        file=page.name,
        title=title,
        kicker=kicker,
        figures=figures or {},
        remarks=remarks,
        problems=problems,
        links=links or {},
        classes=classes,
        edge=edge,
        data=data,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _content(row: Row, picture: Thumbnail | str, names: list[str]) -> dict[str, t.Any]:
    notes = [{"kind": note.kind, "text": note.text, "grave": note.grave, "other": note.other} for note in row.notes]
    content = {"id": row.id, "key": row.key, "values": [row.fields[name] for name in names], "notes": notes}
    if isinstance(picture, str):
        return {**content, "problem": picture}
    return {
        **content,
        "width": picture.width,
        "height": picture.height,
        "picture": picture.webp,
        "outlines": picture.outlines,
    }


def _pictures(
    rows: Sequence[Row], classes: Sequence[str], edge: int, progress: Show | None
) -> Iterator[Thumbnail | str]:
    """The picture of each row, in order; of one that cannot be read, the reason."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # decoding and encoding release the GIL
        done = 0
        for start in range(0, len(rows), _AT_A_TIME):
            part = rows[start : start + _AT_A_TIME]
            for picture in pool.map(_picture, part, itertools.repeat(len(classes)), itertools.repeat(edge)):
                done += 1
                if progress:
                    progress(done, len(rows))
                yield picture


def _picture(row: Row, classes: int, edge: int) -> Thumbnail | str:
    try:
        return thumbnail_of(*row.load(), classes, edge)
    except DataError as error:
        return str(error).splitlines()[0]


def _fitting_edge(rows: Sequence[Row], classes: int) -> int:
    """The largest edge with which the page stays below MOST_BYTES, by pictures of some of the rows."""
    tried = rows[:: -(-len(rows) // _TRIED)]
    share = len(tried) / len(rows)
    for edge in EDGES:
        made = [picture for row in tried if isinstance(picture := _picture(row, classes, edge), Thumbnail)]
        if sum(len(picture.webp) + sum(map(len, picture.outlines)) for picture in made) <= share * MOST_BYTES:
            return edge
    return EDGES[-1]
