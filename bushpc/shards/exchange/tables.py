"""Tables of facts about images: CSV and workbooks as texts, whatever a spreadsheet program made of them."""

from __future__ import annotations

import typing as t
from collections import Counter
from pathlib import Path

from bushpc.errors import DataError
from bushpc.files import decoded, delimiter_of
from bushpc.shards import readers


class Row(t.NamedTuple):
    number: int
    cells: dict[str, str]


class Table(t.NamedTuple):
    """A table that states facts of images. columns: its header."""

    name: str
    columns: list[str]
    rows: list[Row]


def read_table(folder: Path, name: str) -> Table:
    """A CSV or a workbook's first sheet as texts. Raises: DataError."""
    path = folder / name
    if path.suffix.lower() in (".xlsx", ".xlsm"):
        rows = [
            Row(number, {column: _text(value) for column, value in cells.items() if column})
            for number, cells in readers.spreadsheet_rows(path, ())
        ]
        columns = list(rows[0].cells) if rows else []
        return Table(name, columns, rows)
    header = _header(path)
    return Table(name, header, [Row(*row) for row in readers.csv_rows(path, header)])


def _header(path: Path) -> list[str]:
    """Names of the columns; a column without a name, such as pandas' index, is left out."""
    try:
        text = decoded(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"table={path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"table={path} cannot be read as CSV ({error}): save it as UTF-8 CSV or .xlsx.") from error
    first = text.partition("\n")[0]
    names = [name.strip().strip('"') for name in first.split(delimiter_of(text))]
    named = [name for name in names if name]
    if twice := [name for name, count in Counter(named).items() if count > 1]:
        raise DataError(f"table={path} has two columns {', '.join(twice)}: rename one of each.")
    return named


def _text(value: t.Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
