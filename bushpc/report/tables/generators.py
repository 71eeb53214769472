"""The table of generators: distances of generated scans from held-out real ones, beside the paper's."""

from __future__ import annotations

import functools
import json
import typing as t
from dataclasses import dataclass

from bushpc.errors import DataError
from bushpc.report.published import GeneratorRow, generator_rows
from bushpc.report.results import Run
from bushpc.report.scope import ReportScope
from bushpc.report.table import NOTHING, Column, Number, RowData, Table
from bushpc.report.tables.common import why_quoted
from bushpc.runs.layout import RunDir

INCEPTION = "Inception"
LEFT_OUT = (
    "FID and KID are left out, as Inception's weights were not staged when these scans were measured: run "
    "`bushpc weights pull features=inception`, then `bushpc retry RUN` with the quality cells. synthesis.features=RUN "
    "gives distances in the features of a model of your own instead, under their own names."
)


@dataclass(frozen=True, kw_only=True)
class Measured(RowData):
    """A row's generator in one fold, or the paper's row. parts: value and ends of the 95 % interval."""

    label: str
    fold: str = "—"
    number: int | str = "—"
    against: int | str = "—"
    frechet: tuple[Number, Number, Number]
    kernel: tuple[Number, Number, Number]
    copies: int | str = "—"
    state: str = ""


def generators_table(scope: ReportScope) -> Table | None:
    """FID and KID of every row and fold with counts and intervals; None if no generator was measured."""
    rows, features = [], set()
    for run in scope.runs:
        arms = {arm.name: arm.label for arm in scope.arms if arm.run is run.record}
        for each, label in {**arms, **_generators(run)}.items():
            for row, name in _rows(run, each, label):
                rows.append(row)
                features |= {name} if name else set()
    if not rows:
        return None
    [name] = features if len(features) == 1 else [""]
    is_fid = name.startswith(INCEPTION) or not name
    # Where generators only make scans for the rows, their distances are not the table that the grid is for.
    compared = scope.kind == "grid" and not any(map(_generators, scope.runs))
    paper = generator_rows(scope.runs[0].record.data) if compared else []
    rows += [_quoted(row) for row in paper]
    frechet, kernel = ("FID", "KID") if is_fid else ("Fréchet distance", "Kernel distance")
    columns = (
        Column(key="row", header="Generator", numeric=False, of=lambda row: row.label),
        Column(key="fold", header="Fold", numeric=False, of=lambda row: row.fold),
        Column(key="generated", header="Generated", of=lambda row: row.number),
        Column(key="held_out", header="Real, held out", of=lambda row: row.against),
        *_parts("frechet", frechet),
        *_parts("kernel", kernel),
        Column(key="copies", header="Copies of training scans", of=lambda row: row.copies),
    )
    notes = [f"Features: {name}." if name else LEFT_OUT]
    notes.append(
        "Lower is better. Distances are of all generated scans from the held-out part's lesions, with 95 % bootstrap "
        "intervals; the fewer the scans, the higher the Fréchet distance, so rows compare at equal counts only."
    )
    notes += [f"{row.label}, fold {row.fold}: {row.state}." for row in rows if row.state]
    if paper:
        other = "" if is_fid and name else ", in Inception's features, and ours are not"
        notes.append(
            f"The paper's rows were not computed here{other}; it does not say how many scans it generated and "
            f"compared: {paper[0].citation}."
        )
    grid = scope.runs[0].record.grid
    notes += why_quoted((row.label, row.reason) for row in (grid.quoted if grid else []))
    return Table.of("generators", "Generated scans against real ones held out", columns, rows, notes)


def _generators(run: Run) -> dict[str, str]:
    """The generators of a grid that are no rows of it: name → label."""
    return {row.name: row.label for row in run.record.grid.generators} if run.record.grid else {}


def _rows(run: Run, arm: str, label: str) -> t.Iterator[tuple[Measured, str]]:
    for cell in run.record.cells:
        if cell.work != "quality" or (run.record.kind == "grid" and cell.row != arm):
            continue
        file = RunDir(run.path).cell(cell.name).quality
        nothing = (NOTHING, NOTHING, NOTHING)
        if not file.exists():
            yield Measured(label=label, fold=str(cell.fold), frechet=nothing, kernel=nothing, state="not done"), ""
            continue
        try:
            yield _measured(json.loads(file.read_text(encoding="utf-8")), label, str(cell.fold))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{file} is damaged ({type(error).__name__}: {error}): run `bushpc retry` with this cell, or restore it"
            ) from error


def _measured(content: dict[str, t.Any], label: str, fold: str) -> tuple[Measured, str]:
    """The row of a quality.json, and the features that its distances are of."""
    counts = content["counts"]
    found = next((d for d in content["distances"] if (d["label"], d["images"]) == ("all", "synthetic")), None)
    row = Measured(
        label=label,
        fold=fold,
        number=sum(counts["synthetic"].values()),
        against=sum(counts["real, held out"].values()),
        frechet=_estimate(found, "frechet", 2),
        kernel=_estimate(found, "kernel", 4),
        copies=content["copies"],
    )
    return row, content["features"] or ""


def _estimate(found: dict[str, t.Any] | None, name: str, decimals: int) -> tuple[Number, Number, Number]:
    if found is None:
        return NOTHING, NOTHING, NOTHING
    value, low, high = (Number(float(found[name][key]), decimals=decimals) for key in ("value", "low", "high"))
    return value, low, high


def _quoted(row: GeneratorRow) -> Measured:
    return Measured(
        label=row.label,
        group=row.heading,
        quoted=True,
        ranked=False,
        frechet=(Number(row.fid, decimals=3), NOTHING, NOTHING),
        kernel=(Number(row.kid, decimals=3), NOTHING, NOTHING),
    )


def _parts(field: str, title: str) -> t.Iterator[Column]:
    for place, (key, header) in enumerate(((field, "value"), (f"{field}_low", "95 % from"), (f"{field}_high", "to"))):
        yield Column(key=key, header=header, over=title, of=functools.partial(_part, field, place))


def _part(field: str, place: int, row: Measured) -> Number:
    return t.cast(Number, getattr(row, field)[place])
