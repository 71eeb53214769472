"""What a user knows about new images: a CSV → conditions and pixel size of each image, for `bushpc predict`."""

from __future__ import annotations

import csv
import io
import typing as t
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bushpc.conditions.base import Condition
from bushpc.conditions.sentences import AttributePrompt, SpatialPrompt
from bushpc.errors import DataError
from bushpc.files import decoded, delimiter_of
from bushpc.sample import PixelSize, Regions, pixel_size

# Kinds that every table may state, whether the model reads them or not; a model's further kinds come after them.
KINDS: tuple[Condition, ...] = (SpatialPrompt(), AttributePrompt())
NAMING = ("file", "key")
PIXEL_MM = "pixel_mm"
MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of an image. conditions: name of the kind → value; a kind that is not in it is unknown."""

    conditions: Mapping[str, t.Any] = field(default_factory=dict)
    pixel_mm: PixelSize | Regions | None = None

    @classmethod
    def of(
        cls,
        given: Mapping[str, str],
        pixel_mm: PixelSize | Regions | None = None,
        kinds: Sequence[Condition] = KINDS,
    ) -> Known:
        """From what a user states, column → text."""
        values = {kind.name: kind.from_user(given) for kind in kinds}
        return cls(conditions={name: value for name, value in values.items() if value is not None}, pixel_mm=pixel_mm)

    def as_list(self) -> list[t.Any]:
        """What predictions depend on, for a hash. The first part is as older versions have it."""
        of_all = [kind.name for kind in KINDS]
        more = [[name, value] for name, value in sorted(self.conditions.items()) if name not in of_all]
        return [*(self.conditions.get(name, "") for name in of_all), self.pixel_mm, *more]


def kinds_for(model: Sequence[Condition]) -> tuple[Condition, ...]:
    """Those that a table for this model may state. model: the kinds that it is conditioned on."""
    return tuple({kind.name: kind for kind in (*KINDS, *model)}.values())


def read_table(
    path: Path, files: Iterable[PurePosixPath], kinds: Sequence[Condition] = KINDS
) -> dict[PurePosixPath, Known]:
    """File → what the CSV says of it, for those that it names.

    Column `file` is a path as in `files`, or `key` one without its suffix. Further columns, as far as needed:
    spatial_prompt; attribute_prompt, or shape, margin and birads to be worded as in training; pixel_mm. Others are
    left alone, empty cells are unknown.
    Raises: DataError for a table that lacks columns, or names files that are not there, or one of them twice.
    """
    rows = _read(path, [*(column for kind in kinds for column in kind.user_columns), PIXEL_MM])
    by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
    naming = next(name for name in NAMING if name in rows[0][1])
    for file in files:
        by_name[_composed(str(file if naming == "file" else file.with_suffix("")))].append(file)
    table: dict[PurePosixPath, Known] = {}
    problems = []
    for line, row in rows:
        found = by_name.get(_composed(row[naming]), [])
        if len(found) > 1:  # names that differ in their Unicode form alone
            found = [file for file in found if row[naming] in (str(file), str(file.with_suffix("")))] or found
        if len(found) != 1:
            why = f"is one of {', '.join(map(str, found))}: use a column `file`" if found else "is not in the input"
            problems.append(f"line {line}: {naming} '{row[naming]}' {why}")
        elif found[0] in table:
            problems.append(f"line {line}: {naming} '{row[naming]}' a second time")
        else:
            try:
                table[found[0]] = _known(row, kinds)
            except DataError as error:
                problems.append(f"line {line}: {naming} '{row[naming]}': {error}")
    if problems:
        more = [f"… and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
        raise DataError(
            "\n  ".join([f"{path} does not fit the input; nothing was predicted:", *problems[:MOST_SHOWN], *more])
        )
    return table


def _read(path: Path, telling: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, column → cell) of each row that is not empty."""
    try:
        text = decoded(path.read_bytes())
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        rows = [
            (reader.line_num, dict(zip(header, (cell.strip() for cell in row), strict=True)))
            for row in reader
            if any(row)
        ]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path} is no CSV with as many cells in each row as in its first: {error}") from error
    if not any(name in header for name in NAMING) or not any(name in header for name in telling):
        raise DataError(
            f"{path} has the columns {', '.join(header) or 'none'}: needed are one of {' or '.join(NAMING)}, and some "
            f"of {', '.join(telling)}"
        )
    if not rows:
        raise DataError(f"{path} has no rows: leave the prompts out if there are none")
    return rows


def _composed(name: str) -> str:
    """A file name in one Unicode form: macOS writes ü as u and two dots, most programs as one letter."""
    return unicodedata.normalize("NFC", name)


def _known(row: dict[str, str], kinds: Sequence[Condition]) -> Known:
    return Known.of(row, _pixel_mm(row[PIXEL_MM]) if row.get(PIXEL_MM) else None, kinds)


def _pixel_mm(text: str) -> PixelSize:
    try:
        return pixel_size(float(text))
    except (DataError, ValueError) as error:
        raise DataError(f"pixel_mm '{text}': {error}") from error
