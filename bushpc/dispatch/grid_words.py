"""Words of `bushpc grid` about its rows: `rows=[a,b]` runs some of them, `rows.a.train.lr=1e-3` changes one of them."""

from __future__ import annotations

import dataclasses
import typing as t
from collections.abc import Sequence

import yaml

from bushpc.config import YAML_FAILS
from bushpc.dispatch.grid_file import Grid, GridRow, QuotedRow, Unambiguous, settings_of
from bushpc.errors import ConfigError, unknown_name

LEFT_OUT = "left out of this run by rows="
ROWS = "rows"
OF_ROW = f"{ROWS}."


def of_rows(grid: Grid, words: Sequence[str]) -> Grid:
    """The grid as these words want its rows and generators. Raises: ConfigError for those that it doesn't have."""
    for word in words:
        if word.startswith(OF_ROW):
            grid = _with_setting(grid, word)
    chosen = [word.partition("=")[2] for word in words if word.partition("=")[0] == ROWS]
    return _only_rows(grid, chosen[-1]) if chosen else grid


def is_of_rows(word: str) -> bool:
    """Whether a word is about rows, and no setting of the whole grid."""
    key = word.partition("=")[0]
    return key == ROWS or key.startswith(OF_ROW)


def _with_setting(grid: Grid, word: str) -> Grid:
    key, _, text = word.partition("=")
    name, _, setting = key.removeprefix(OF_ROW).partition(".")
    known = [row.name for row in (*grid.generators, *grid.rows)]
    if name not in known or not setting:
        raise ConfigError(
            f"{word}: {unknown_name('row', name, known, f'For example {OF_ROW}{known[0]}.train.lr=1e-3')}"
        )
    try:
        value = yaml.load(text, Loader=Unambiguous)
    except YAML_FAILS as error:
        raise ConfigError(f"{word}: the value cannot be read ({error})") from error
    settings = settings_of({setting: value}, word)
    rows, generators = (tuple(_set(row, name, settings) for row in some) for some in (grid.rows, grid.generators))
    return dataclasses.replace(grid, rows=rows, generators=generators)


def _set(row: GridRow, name: str, settings: dict[str, t.Any]) -> GridRow:
    return dataclasses.replace(row, settings=row.settings | settings) if row.name == name else row


def _only_rows(grid: Grid, chosen: str) -> Grid:
    """The grid with these rows alone, as a list in brackets; of a paper's grid the others are only quoted.

    Raises: ConfigError for rows that it doesn't have.
    """
    names = [name.strip() for name in chosen.strip("[]").split(",") if name.strip()]
    known = [row.name for row in grid.rows]
    for name in names:
        if name not in known:
            raise ConfigError(f"rows={chosen}: {unknown_name(f'row of grid={grid.name}', name, known)}")
    if not names:
        raise ConfigError(f"rows={chosen}: name one row at least. Valid: {', '.join(known)}")
    kept = [row for row in grid.rows if row.name in names]
    baseline = grid.baseline if grid.baseline in names else kept[0].name
    generators = tuple(each for each in grid.generators if any(row.scans == each.name for row in kept))
    quoted = _with_left_out(grid, names)
    return dataclasses.replace(grid, rows=tuple(kept), baseline=baseline, quoted=quoted, generators=generators)


def _with_left_out(grid: Grid, names: Sequence[str]) -> tuple[QuotedRow, ...]:
    """The quoted rows and those that `rows=` leaves out, in the order of the paper; none for a grid without paper."""
    lines: list[QuotedRow] = []
    below: str | None = None
    ends: list[GridRow | None] = [*grid.rows, None]
    for row in reversed(ends):
        if row is not None and row.name in names:
            below = row.name
        elif row is not None and row.printed_as:
            lines.append(QuotedRow(label=row.label, printed_as=row.printed_as, reason=LEFT_OUT, before=below))
        above = [line for line in grid.quoted if line.before == (row.name if row else None)]
        lines += [dataclasses.replace(line, before=below) for line in reversed(above)]
    return tuple(reversed(lines))
