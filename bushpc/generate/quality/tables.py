"""Figures of generated images → tables, declared column by column."""

from __future__ import annotations

import functools
import typing as t
from collections.abc import Iterable
from dataclasses import dataclass

from bushpc.generate.quality.records import CORRELATION, FEATURES, Quality
from bushpc.metrics.image import Estimate
from bushpc.report.standalone import labels_with
from bushpc.report.stats import Interval
from bushpc.report.table import Column, Number, RowData, Table


@dataclass(frozen=True, kw_only=True)
class Measured(RowData):
    """A row of figures of one set of images: a Distance, Nearness, Agreement or Diversity."""

    figures: t.Any


@dataclass(frozen=True, kw_only=True)
class Counted(RowData):
    """How many images a set has. labels: by label."""

    name: str
    number: int
    labels: t.Mapping[str, int]


def make_tables(quality: Quality) -> list[Table]:
    """All tables that have rows, in the order of the page."""
    tables = (_counts(quality), _distances(quality), _nearness(quality), _agreement(quality), _diversity(quality))
    return [table for table in tables if table.rows]


def _counts(quality: Quality) -> Table:
    rows = [
        Counted(name=name, number=len(images.records), labels=images.labels) for name, images in quality.sets.items()
    ]
    columns = (
        Column(key="images", header="Images", numeric=False, of=lambda row: row.name),
        Column(key="number", header="Number", of=lambda row: row.number),
        *(
            Column(key=label, header=label.capitalize(), of=functools.partial(_count, label))
            for label in labels_with(lambda label: any(row.labels[label] for row in rows))
        ),
    )
    return Table.of("counts", "Images with a lesion that are compared", columns, rows)


def _count(label: str, row: Counted) -> int:
    return row.labels[label]


def _distances(quality: Quality) -> Table:
    frechet, kernel = (quality.features.frechet, quality.features.kernel) if quality.features else ("", "")
    caption = f"{frechet} and {kernel} to the real images held out, features of " if quality.features else ""
    columns = (
        *_SET,
        Column(key="against", header="Against held out", of=lambda row: row.figures.against),
        *_estimate_columns("frechet", frechet, 2),
        *_estimate_columns("kernel", kernel, 4),
    )
    notes = (
        f"{frechet} is biased upwards, the more the fewer images there are, and no figure of so few compares with "
        "one of tens of thousands. Compare with the training part's row, which is what real images get at that "
        "number.",
        f"{kernel} is the unbiased estimate over all pairs, and may come out below 0.",
        "Intervals are of chance alone: the jackknife, leaving out patients.",
    )
    name = quality.features.name if quality.features else ""
    return Table.of("distances", caption + name, columns, _by_label(quality.distances), notes)


def _nearness(quality: Quality) -> Table:
    title = {
        CORRELATION: "Correlation of local contrast: 1 if identical",
        FEATURES: f"Distance of the features of {quality.features.name}" if quality.features else "",
    }
    columns = (
        *_SET,
        Column(key="median", header="Median", of=lambda row: Number(row.figures.median, decimals=3)),
        Column(key="twentieth", header="Nearest 5 % from", of=lambda row: Number(row.figures.twentieth, decimals=3)),
        Column(key="nearest", header="Nearest", of=lambda row: Number(row.figures.nearest, decimals=3)),
        Column(key="copies", header="Same picture", of=lambda row: row.figures.copies),
        Column(key="beyond", header="Nearer than any held out", of=lambda row: Number(row.figures.beyond, decimals=0)),
        Column(key="p", header="p", of=lambda row: Number(row.figures.p, is_p=True)),
    )
    notes = (
        "Real images that the generator has not seen show how near a new image comes to the training images by itself.",
        "p: of as many generated images being nearer than any of those by chance (Rosenbaum's test); where few are "
        "held out, only many such images make it small.",
    )
    rows = [Measured(figures=each, group=title[each.by]) for each in quality.nearness]
    return Table.of("nearness", "Each image's nearest training image", columns, rows, notes)


def _agreement(quality: Quality) -> Table:
    columns = (
        *_SET,
        *_estimate_columns("dice", "Dice", 4),
        Column(key="missed", header="Nothing of it found", of=lambda row: Number(row.figures.missed, decimals=3)),
    )
    note = (
        "Intervals by the bootstrap over patients. Above the Dice of real images, lesions are easier than real "
        "ones; below it, they are not where the mask says, or look like none that the segmenter knows."
    )
    caption = f"Masks that {quality.request.segmenter} finds, against the masks that the images have"
    return Table.of("agreement", caption, columns, _by_label(quality.agreement), [note])


def _diversity(quality: Quality) -> Table:
    columns = (
        *_SET,
        *_estimate_columns("ms_ssim", "MS-SSIM", 4),
        *_estimate_columns("distance", "Distance of features", 3, only_if=quality.features is not None),
        Column(key="repeated", header="Same picture as another", of=lambda row: row.figures.repeated),
    )
    note = "Less varied images than real ones are more similar (higher MS-SSIM) and nearer to each other."
    caption = "Mean over pairs of images of different patients"
    return Table.of("diversity", caption, columns, _by_label(quality.diversity), [note])


def _by_label(figures: Iterable[t.Any]) -> list[Measured]:
    return [Measured(figures=each, group=each.label) for each in figures]


_SET = (
    Column(key="images", header="Images", numeric=False, of=lambda row: row.figures.images),
    Column(key="number", header="Number", of=lambda row: row.figures.number),
)


def _estimate_columns(field: str, title: str, decimals: int, *, only_if: bool = True) -> tuple[Column, ...]:
    """The value and the interval of a field of the figures."""
    return tuple(
        Column(
            key=key, header=header, over=title, only_if=only_if, of=functools.partial(_estimate, field, side, decimals)
        )
        for side, (key, header) in enumerate(((field, "value"), (f"{field}_low", "95 % from"), (f"{field}_high", "to")))
    )


def _estimate(field: str, side: int, decimals: int, row: Measured) -> Number:
    estimate: Estimate | Interval | None = getattr(row.figures, field)
    return Number(estimate[side] if estimate else None, decimals=decimals)
