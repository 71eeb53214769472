"""What a user knows about images beforehand: a CSV → sentences and pixel size of each image, for `bushpc predict`."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bushpc.conditions.sentences import NO_PROMPT, OPPOSITE, attribute_prompt
from bushpc.data.images import PixelSize, pixel_size
from bushpc.errors import DataError

NAMING = ("file", "key")
ATTRIBUTES = ("shape", "margin", "birads")
TELLING = ("spatial_prompt", "attribute_prompt", *ATTRIBUTES, "pixel_mm")
MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of an image. A sentence that is not given is "": a spatial one then comes from the first pass."""

    spatial_prompt: str = NO_PROMPT
    attribute_prompt: str = NO_PROMPT
    pixel_mm: PixelSize | None = None


def read_prompt_table(path: Path, files: Iterable[PurePosixPath]) -> dict[PurePosixPath, Known]:
    """File → what the CSV says of it, for those that it names.

    Column `file` is a path as in `files`, or `key` one without its suffix. Further columns, as far as needed:
    spatial_prompt; attribute_prompt, or shape, margin and birads to be worded as in training; pixel_mm. Others are
    left alone, empty cells are unknown.
    Raises: DataError for a table that lacks columns, or names files that are not there, or one of them twice.
    """
    rows = _read(path)
    by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
    naming = next(name for name in NAMING if name in rows[0][1])
    for file in files:
        by_name[str(file if naming == "file" else file.with_suffix(""))].append(file)
    table: dict[PurePosixPath, Known] = {}
    problems = []
    for line, row in rows:
        found = by_name.get(row[naming], [])
        if len(found) != 1:
            why = f"is one of {', '.join(map(str, found))}: use a column `file`" if found else "is not in the input"
            problems.append(f"line {line}: {naming} '{row[naming]}' {why}")
        elif found[0] in table:
            problems.append(f"line {line}: {naming} '{row[naming]}' a second time")
        else:
            try:
                table[found[0]] = _known(row)
            except (DataError, ValueError) as error:
                problems.append(f"line {line}: pixel_mm '{row['pixel_mm']}': {error}")
    if problems:
        more = [f"… and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
        raise DataError(
            "\n  ".join([f"{path} does not fit the input; nothing was predicted:", *problems[:MOST_SHOWN], *more])
        )
    return table


def mirrored(spatial_prompt: str) -> str:
    """The sentence for the left-right mirrored image: inner and outer change places."""
    return re.sub(r"\b(inner|outer)\b", lambda word: OPPOSITE[word[0]], spatial_prompt)


def _read(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, column → cell) of each row that is not empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
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
    if not any(name in header for name in NAMING) or not any(name in header for name in TELLING):
        raise DataError(
            f"{path} has the columns {', '.join(header) or 'none'}: needed are one of {' or '.join(NAMING)}, and some "
            f"of {', '.join(TELLING)}"
        )
    if not rows:
        raise DataError(f"{path} has no rows: leave the prompts out if there are none")
    return rows


def _known(row: dict[str, str]) -> Known:
    attributes = {name: row[name] for name in ATTRIBUTES if row.get(name)}
    return Known(
        spatial_prompt=row.get("spatial_prompt", NO_PROMPT),
        attribute_prompt=row.get("attribute_prompt") or attribute_prompt(attributes),
        pixel_mm=pixel_size(float(row["pixel_mm"])) if row.get("pixel_mm") else None,
    )
