"""One HTML page with its tables and pictures, in one folder: shared by the audit of packed data and the quality page.

tables, pictures → template → index.html, and a CSV of every table
"""

from __future__ import annotations

import shlex
import typing as t
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np

from bushpc.files import write_atomically
from bushpc.report.render import to_csv, to_html
from bushpc.report.table import Table
from bushpc.sample import LABELS, UNLABELLED

EDGE = 260  # longest side of a picture, in pixels
_BINS = 24


class ScanPicture(t.NamedTuple):
    """A scan on the page. uri: the picture as a data URI, None if it cannot be shown."""

    dataset: str
    key: str
    caption: str
    uri: str | None


class Histogram(t.NamedTuple):
    """title: with the unit. bars: number of scans in each of equal bins from low to high."""

    title: str
    dataset: str
    low: float
    high: float
    bars: list[int]


def histograms(title: str, by_dataset: Mapping[str, t.Any], low: float, high: float) -> list[Histogram]:
    """One per dataset, all with the same bins so that they can be compared."""
    counted = {name: np.histogram(values, bins=_BINS, range=(low, high))[0] for name, values in by_dataset.items()}
    return [Histogram(title, name, low, high, bars.tolist()) for name, bars in counted.items()]


def labels_with(any_of: Callable[[str], t.Any]) -> list[str]:
    """Labels that some scan has. any_of: whether there is any scan with this label."""
    return [label for label in (*LABELS, UNLABELLED) if any_of(label)]


def environment() -> jinja2.Environment:
    """All templates of the report, with `table_html`."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bushpc.report", "templates"),
        autoescape=True,  # names, keys and reasons come from users and file names
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["table_html"] = to_html
    return templates


def write_page(
    folder: Path,
    template: str,
    command: Sequence[str],
    *,
    file: str = "index.html",
    csv_of: Iterable[Table] = (),
    **content: t.Any,
) -> Path:
    """Write `folder`/`file` and a CSV of each table; returns the page.

    command: that wrote it, for the foot of the page. csv_of: the tables. content: names in the template.
    Raises: OSError.
    """
    text = environment().get_template(template).render(command=shlex.join(command), **content)
    folder.mkdir(parents=True, exist_ok=True)
    for table in csv_of:
        write_atomically(folder / f"{table.name}.csv", to_csv(table))
    write_atomically(folder / file, text)
    return folder / file
