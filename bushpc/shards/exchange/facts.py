"""Patient, label, pixel size, fold and attributes of found scans: from the table, folder, file name or format.

scans + table ─gather→ facts by scan, problems

A problem names the row and what to do. Nothing is guessed: a label that is not bushpc's own needs `labels=`.
"""

from __future__ import annotations

import re
import typing as t
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from bushpc.errors import DataError, unknown_name
from bushpc.sample import UNLABELLED, pixel_size
from bushpc.shards import tree
from bushpc.shards.exchange.scans import Cohort, Found
from bushpc.shards.exchange.settings import ALL, ALL_LABELS, FOLDER, NAME, NONE, ImportSettings, pattern
from bushpc.shards.exchange.tables import Row, Table, read_table

# Columns that are taken unless the user says otherwise: other columns of a hospital's table may identify a patient.
DESCRIPTORS = (
    *("age", "tissue_composition", "signs", "symptoms", "shape", "margin", "boundary", "orientation", "echogenicity"),
    *("posterior_features", "halo", "calcifications", "skin_thickening", "interpretation", "birads", "verification"),
    *("diagnosis", "histology", "device", "side"),
)
CATEGORIES = ("birads",)  # numbers that are names
FACTS = ("key", "patient", "label", "pixel_mm", "fold")  # columns of these names need no word
EMPTY = ("", "na", "n/a", "nan", "none", "null")
MOST_VALUES = 10


class Facts(t.NamedTuple):
    """What is known of a scan. label: None where nothing states one."""

    patient: str
    label: str | None
    pixel_mm: float | None
    fold: int | None
    attributes: dict[str, str | float | None]


def gather(cohort: Cohort, settings: ImportSettings, folder: Path) -> list[Facts | None]:
    """The facts of every scan of the cohort; None where there are problems, which are noted in the cohort."""
    name = settings.table or cohort.table
    table = read_table(folder, name) if name else None
    if table:
        _check_columns(settings, table)
    names = _names(cohort.scans)
    image = settings.image or (_image_column(table, names) if table else None)
    rows = _rows_by_scan(cohort, settings, table, names, image) if table and image else {}
    attributes = _Attributes(settings, table, cohort, image)
    labels = _Labels(settings)
    unstated: list[str] = []
    found: list[Facts | None] = []
    for number, scan in enumerate(cohort.scans):
        row = rows.get(number)
        where = f"{table.name}, row {row.number}" if table and row else scan.name
        if table and row is None:
            cohort.incomplete(f"{scan.image} has no row in {table.name}", settings)
            found.append(None)
            continue
        patient = _said(settings.patients, "patient", scan, row)
        if settings.patients == NONE:
            patient = ""
        elif not patient:
            unstated.append(where)
        label = labels.of(_said(settings.label, "label", scan, row), where)
        numbers, faults = _numbers(settings, scan, row, where)
        cohort.problems += faults
        found.append(Facts(str(patient or ""), label, *numbers, attributes.of(scan, row)))
    if settings.patients is None and len(unstated) == len([each for each in found if each]) > 0:
        cohort.problems.append(_no_patients(folder, table))
    elif unstated:
        cohort.problems.append(
            f"the patient is not stated for {_some(unstated)}: fill it in; or, if no patient is known, say "
            "patients=none"
        )
    cohort.problems += labels.problems()
    cohort.notes += attributes.notes
    return found


def _no_patients(folder: Path, table: Table | None) -> str:
    lying = [path.name for pattern in ("*.csv", "*.xlsx") for path in tree.glob(folder, pattern)]
    columns = f" (one of {', '.join(table.columns)})" if table else ""
    columns = columns or (f" (table={lying[0]} lies in the folder)" if lying else "")
    return (
        "patients= is missing. Scans of one patient must not train and validate at once, so say where the patient is: "
        f"patients=COLUMN of the table{columns}, patients=folder, or patients='name:^(P[0-9]+)_' for a part of the "
        "image's name; or say patients=none if it is not known: each scan then counts as a patient, and results may be "
        "too good"
    )


def _said(source: str | None, key: str, scan: Found, row: Row | None) -> str:
    """A fact by what the user says, else as the format or its own table states it; "" where nothing does."""
    if source == FOLDER:
        return PurePosixPath(scan.image).parent.name
    if compiled := pattern(key, source):
        matched = compiled.search(PurePosixPath(scan.name).name)
        return matched[1] or "" if matched else ""
    if source and source != NONE:
        return _cell(row, source)
    own = str(scan.given.get(key) or "")
    return own or _cell(row, key)


def _cell(row: Row | None, column: str) -> str:
    text = row.cells.get(column, "") if row else ""
    return "" if text.lower() in EMPTY else text


def _numbers(
    settings: ImportSettings, scan: Found, row: Row | None, where: str
) -> tuple[tuple[float | None, int | None], list[str]]:
    """Pixel size and fold."""
    faults = []
    pixel_mm, fold = scan.given.get("pixel_mm"), scan.given.get("fold")
    text = _number_or_cell(settings.pixel_mm, row) or _cell(row, "pixel_mm")
    if text:
        try:
            pixel_mm = pixel_size(float(text)).x
        except (ValueError, DataError):
            faults.append(f"{where}: the pixel size '{text}' is not a plausible number of millimetres")
    text = _cell(row, settings.fold or "fold")
    if text and not text.isdecimal():
        faults.append(f"{where}: the fold '{text}' is not a whole number from 0")
    elif text:
        fold = int(text)
    return (pixel_mm, fold), faults


def _number_or_cell(source: str | None, row: Row | None) -> str:
    if source is None:
        return ""
    return source if re.fullmatch(r"[\d.]+(e-?\d+)?", source) else _cell(row, source)


class _Labels:
    """Values of the data → labels of bushpc. Values that are none are counted and become one problem."""

    def __init__(self, settings: ImportSettings) -> None:
        self.settings = settings
        self.known = {label: label for label in ALL_LABELS}
        self.known |= {value.lower(): label for value, label in settings.labels.items()}
        self.unknown: Counter[str] = Counter()
        self.empty: list[str] = []

    def of(self, value: str, where: str) -> str | None:
        if not value:
            if self.settings.label:
                self.empty.append(where)
            return None
        label = self.known.get(value.lower())
        self.unknown[value] += label is None
        return label

    def problems(self) -> list[str]:
        found = []
        unknown = +self.unknown
        if unknown:
            listed = ", ".join(f"{value} ({count})" for value, count in unknown.most_common(MOST_VALUES))
            more = f" and {len(unknown) - MOST_VALUES} more" if len(unknown) > MOST_VALUES else ""
            example = ",".join(f"{value}:{ALL_LABELS[i % 2]}" for i, value in enumerate([*unknown][:2]))
            found.append(
                f"labels that bushpc does not know: {listed}{more}. Say what each means, for example labels={example}; "
                f"allowed are {', '.join(ALL_LABELS)}"
            )
        if self.empty:
            found.append(f"the label is empty for {_some(self.empty)}: fill it in, or write {UNLABELLED} there")
        return found


class _Attributes:
    """Columns → attributes by their snake_case names."""

    def __init__(self, settings: ImportSettings, table: Table | None, cohort: Cohort, image: str | None) -> None:
        self.notes: list[str] = []
        self.names: dict[str, str] = {}
        columns = table.columns if table else []
        roles = {image, settings.mask, settings.patients, settings.label, settings.pixel_mm, settings.fold}
        own = bool(cohort.table and not settings.table)
        free = [column for column in columns if column not in roles | set(FACTS)]
        snake = {column: re.sub(r"\W+", "_", column.strip()).strip("_").lower() for column in free}
        if settings.attributes is None and not own:
            self.names = {column: name for column, name in snake.items() if _plain(name) in DESCRIPTORS}
            self.names = {column: _plain(name) for column, name in self.names.items()}
            if left := [column for column in free if column not in self.names]:
                self.notes.append(
                    f"columns that are not imported, as they might identify a patient: {', '.join(left)}. "
                    "attributes=COLUMN,COLUMN:name imports those that you choose, attributes=all imports all"
                )
        elif own or ALL in (settings.attributes or {}):
            self.names = snake
        else:
            self.names = dict(settings.attributes or {})
        self.numeric = {
            column
            for column, name in self.names.items()
            if table and name not in CATEGORIES and _all_numbers([_cell(row, column) for row in table.rows], own)
        }

    def of(self, scan: Found, row: Row | None) -> dict[str, str | float | None]:
        found: dict[str, str | float | None] = dict(scan.given.get("attributes") or {})
        for column, name in self.names.items():
            text = _cell(row, column)
            found[name] = None if not text else float(text) if column in self.numeric else text
        return found


def _plain(name: str) -> str:
    """`bi_rads` is `birads`."""
    return "birads" if name.replace("_", "") == "birads" else name


def _all_numbers(texts: Sequence[str], own: bool) -> bool:
    """own: the table is an export's, in which numbers have a decimal point and categories may be digits."""
    given = [text for text in texts if text]
    number = r"-?\d+\.\d+(e[-+]\d+)?" if own else r"-?\d+(\.\d+)?"
    return bool(given) and all(re.fullmatch(number, text) for text in given)


def _check_columns(settings: ImportSettings, table: Table) -> None:
    """Raises: DataError for a column that the table does not have."""
    words: dict[str, str | None] = {name: getattr(settings, name) for name in ("image", "mask", "fold")}
    for name in ("patients", "label"):
        value = getattr(settings, name)
        words[name] = None if value in (NONE, FOLDER) or (value or "").startswith(NAME) else value
    if settings.pixel_mm and not _number_or_cell(settings.pixel_mm, None):
        words["pixel_mm"] = settings.pixel_mm
    given = [(word, column) for word, column in words.items() if column]
    given += [("attributes", column) for column in settings.attributes or {} if column not in (ALL, NONE)]
    for word, column in given:
        if column not in table.columns:
            raise DataError(f"{word}={column}: {unknown_name('column', column, table.columns)}")


def _rows_by_scan(
    cohort: Cohort,
    settings: ImportSettings,
    table: Table,
    names: Mapping[str, Mapping[str, list[int]]],
    column: str,
) -> dict[int, Row]:
    """Which row is about which scan. Rows about none, two rows about one image, and unclear names are problems."""
    found: dict[int, Row] = {}
    for row in table.rows:
        cell = row.cells.get(column, "").replace("\\", "/").removeprefix("./")
        where = f"{table.name}, row {row.number}"
        images = names.get(cell) or names.get(PurePosixPath(cell).name) or {}
        if not cell:
            cohort.incomplete(f"{where}: {column} is empty", settings)
        elif not images:
            cohort.incomplete(f"{where}: there is no image {cell}", settings)
        elif len(images) > 1:
            cohort.problems.append(
                f"{where}: {cell} can be {' or '.join(sorted(images)[:3])}: write the path in {column}"
            )
        else:
            for number in next(iter(images.values())):
                if number in found:
                    image = cohort.scans[number].image
                    cohort.problems.append(f"{where}: {image} already has row {found[number].number}")
                    break
                found[number] = row
    return found


def _names(scans: Sequence[Found]) -> dict[str, dict[str, list[int]]]:
    """Name in a table → image → numbers of its scans. A name is the path or its last part, with or without ending."""
    names: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, scan in enumerate(scans):
        paths = {scan.image, scan.name, str(scan.given.get("key") or scan.name)}
        for name in {form for path in paths for form in (path, PurePosixPath(path).name)}:
            names[name][scan.image].append(number)
    return names


def _image_column(table: Table, names: Mapping[str, t.Any]) -> str:
    """The column that names most images. Raises: DataError if none names any."""

    def hits(column: str) -> int:
        cells = (row.cells.get(column, "").replace("\\", "/") for row in table.rows)
        return sum(cell in names or PurePosixPath(cell).name in names for cell in cells if cell)

    if not table.columns or not table.rows:
        raise DataError(f"{table.name} has no rows.")
    best = max(table.columns, key=hits)
    if not hits(best):
        raise DataError(
            f"{table.name}: no column names the images (such as {next(iter(names), 'a.png')}). Its columns: "
            f"{', '.join(table.columns)}. Say which one it is with image=COLUMN."
        )
    return best


def _some(places: Sequence[str]) -> str:
    shown = ", ".join(places[:MOST_VALUES])
    return f"{len(places)} scans ({shown}{', …' if len(places) > MOST_VALUES else ''})"
