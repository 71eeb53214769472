"""A table, declared column by column: each `Column` says how its value is read from a row's data.

row data, columns → `Table` → `render`
"""

from __future__ import annotations

import itertools
import typing as t
from dataclasses import dataclass, field, replace

Better = t.Literal["high", "low"]


@dataclass(frozen=True)
class Number:
    """A figure and how many decimals are shown. None is shown as a dash, and is empty in CSV.

    is_p: a p value; if the decimals would round it to zero, it is shown as less than the smallest they can show.
    competes: may be the best of its group.
    """

    value: float | None
    sd: float | None = None
    decimals: int = 4
    is_p: bool = False
    competes: bool = True

    def __str__(self) -> str:
        if self.value is None:
            return "—"
        if self.is_p and self.value < 10**-self.decimals:
            return f"< {10**-self.decimals:.{self.decimals}f}"
        text = f"{self.value:.{self.decimals}f}"
        return text if self.sd is None else f"{text} ± {self.sd:.{self.decimals}f}"


NOTHING = Number(None)
Value = str | bool | int | Number


def shown(value: Value) -> str:
    """The text of a value; switches are ticks or dashes, as in the papers' ablation tables."""
    if isinstance(value, bool):
        return "✓" if value else "\u2013"
    return str(value)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    key: its name in CSV. header: as shown. over: second header line; neighbours with the same text share it.
    of: reads the column's value from the data of a row. only_if: whether the table has this column.
    better: which value of each group of rows is set in bold, if any.
    ranked: whether its values compete within a row, in rows that say which is better. quoted: figures from a paper.
    """

    key: str
    header: str
    of: t.Callable[[t.Any], Value]
    only_if: bool = True
    over: str = ""
    better: Better | None = None
    numeric: bool = True
    ranked: bool = True
    quoted: bool = False


@dataclass(frozen=True, kw_only=True)
class RowData:
    """Base of the data that a table has one row for; columns read its fields.

    group: heading of the rows around it. ranked: may be the best of its group. strong: a summary of other rows, set
    apart from them. quoted: figures from a paper, in another tone.
    better: in tables with a metric per row, which of the row's values is set in bold, separately under each heading.
    """

    group: str = ""
    ranked: bool = True
    strong: bool = False
    quoted: bool = False
    better: Better | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row as it is rendered: one value per column, and the marks of its `RowData`."""

    values: tuple[Value, ...]
    group: str
    ranked: bool
    strong: bool
    quoted: bool
    better: Better | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """name: file stem and LaTeX label. caption: one sentence. notes: how to read it, one sentence each."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        name: str,
        caption: str,
        columns: t.Iterable[Column],
        data: t.Iterable[RowData],
        notes: t.Iterable[str] = (),
    ) -> Table:
        """A table with one row for each of `data`. Columns whose `only_if` is false are left out."""
        kept = tuple(column for column in columns if column.only_if)
        rows = tuple(
            Row(
                values=tuple(column.of(each) for column in kept),
                group=each.group,
                ranked=each.ranked,
                strong=each.strong,
                quoted=each.quoted,
                better=each.better,
            )
            for each in data
        )
        return cls(name=name, caption=caption, columns=kept, rows=rows, notes=tuple(notes))

    def head(self, most: int) -> Table:
        """Its first rows."""
        return replace(self, rows=self.rows[:most])

    def cut(self, most: int) -> list[str]:
        """The sentence about the rows that `head` leaves out, if there are any."""
        rows = len(self.rows)
        return [f"The first {most} of {rows} rows; all are in {self.name}.csv."] if rows > most else []

    def groups(self) -> list[tuple[str, list[Row]]]:
        """Rows under their headings, in order."""
        return [(group, list(rows)) for group, rows in itertools.groupby(self.rows, key=lambda row: row.group)]

    def overs(self) -> list[tuple[str, int]]:
        """The second header line as (text, columns spanned)."""
        return [(over, len(list(columns))) for over, columns in itertools.groupby(c.over for c in self.columns)]


def best_rows(rows: list[Row], column: Column, index: int) -> set[int]:
    """Positions within a group of its best figure, including ties as shown; empty if fewer than two compete."""
    return _best({i: row.values[index] for i, row in enumerate(rows) if row.ranked}, column.better)


def bold_cells(table: Table, rows: list[Row]) -> set[tuple[int, int]]:
    """(row, column) of the best figures of a group of rows."""
    down = {(i, j) for j, column in enumerate(table.columns) for i in best_rows(rows, column, j)}
    across = set()
    for over in {column.over for column in table.columns}:
        rivals = [j for j, column in enumerate(table.columns) if column.over == over and column.ranked]
        across |= {(i, j) for i, row in enumerate(rows) for j in _best({j: row.values[j] for j in rivals}, row.better)}
    return down | across


def _best(values: t.Mapping[int, Value], better: Better | None) -> set[int]:
    figures = {
        i: round(value.value, value.decimals)
        for i, value in values.items()
        if isinstance(value, Number) and value.value is not None and value.competes
    }
    if better is None or len(figures) < 2:
        return set()
    best = max(figures.values()) if better == "high" else min(figures.values())
    return {i for i, figure in figures.items() if figure == best}
