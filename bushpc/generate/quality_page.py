"""Figures of generated images → tables, and one HTML page with the pictures."""

from __future__ import annotations

import typing as t
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bushpc.generate.quality import CORRELATION, FEATURES, HELD_OUT, SYNTHETIC, TRAINING, Part, Quality
from bushpc.metrics.image import Estimate
from bushpc.report import standalone
from bushpc.report.panel import contour_of, draw
from bushpc.report.standalone import EDGE, Histogram, Picture, histograms, labels_with
from bushpc.report.stats import Interval
from bushpc.report.tables import Column, Number, Row, Table
from bushpc.shards.manifest import read_image, read_mask

MOST_PAIRS = 12


class Pair(t.NamedTuple):
    """A generated image beside the training image nearest to it. copy: whether they are one picture."""

    one: Picture
    other: Picture
    said: str
    copy: bool


class Found(t.NamedTuple):
    """A generated image as data URIs: with the outline of its mask, and with the errors of the one that was found."""

    key: str
    said: str
    contour: str
    errors: str


def write_page(quality: Quality, folder: Path, command: Sequence[str]) -> Path:
    """Write `folder`/index.html and a CSV of every table. command: what made it, for the page's foot."""
    made = make_tables(quality)
    return standalone.write_page(
        folder,
        "quality.html.j2",
        command,
        csv_of=made,
        quality=quality,
        synthetic=len(quality.parts[SYNTHETIC].records),
        held_out=len(quality.parts[HELD_OUT].records),
        training=len(quality.parts[TRAINING].records) if TRAINING in quality.parts else None,
        tables={table.name: table for table in made},
        histograms=_histograms(quality),
        pairs=_pairs(quality),
        found=_found(quality),
    )


def make_tables(quality: Quality) -> list[Table]:
    """Those that have rows, in the order of the page."""
    made = (_counts(quality), _distances(quality), _nearness(quality), _agreement(quality), _diversity(quality))
    return [table for table in made if table.rows]


def _counts(quality: Quality) -> Table:
    labels = labels_with(lambda label: any(part.labels[label] for part in quality.parts.values()))
    columns = (
        Column(key="images", header="Images", numeric=False),
        Column(key="number", header="Number"),
        *(Column(key=label, header=label.capitalize()) for label in labels),
    )
    return Table(
        name="counts",
        caption="Images with a lesion that are compared",
        columns=columns,
        rows=tuple(
            Row(values=(name, len(part.records), *(part.labels[label] for label in labels)))
            for name, part in quality.parts.items()
        ),
    )


def _distances(quality: Quality) -> Table:
    names = (quality.features.frechet, quality.features.kernel) if quality.features else ("", "")
    columns = (
        *_set_columns(),
        Column(key="against", header="Against held out"),
        *_estimate_columns("frechet", names[0]),
        *_estimate_columns("kernel", names[1]),
    )
    return Table(
        name="distances",
        caption=f"{names[0]} and {names[1]} to the real images held out, features of {quality.features.name}"
        if quality.features
        else "",
        columns=columns,
        rows=tuple(
            Row(
                values=(
                    each.images,
                    each.number,
                    each.against,
                    *_estimate(each.frechet, 2),
                    *_estimate(each.kernel, 4),
                ),
                group=each.label,
            )
            for each in quality.distances
        ),
        notes=(
            f"{names[0]} is biased upwards, the more the fewer images there are, and no figure of so few compares with "
            "one of tens of thousands. Compare with the training part's row, which is what real images get at that "
            "number.",
            f"{names[1]} is the unbiased estimate over all pairs, and may come out below 0.",
            "Intervals are of chance alone: the jackknife, leaving out patients.",
        ),
    )


def _nearness(quality: Quality) -> Table:
    title = {
        CORRELATION: "Correlation of local contrast: 1 if identical",
        FEATURES: f"Distance of the features of {quality.features.name}" if quality.features else "",
    }
    columns = (
        *_set_columns(),
        Column(key="median", header="Median"),
        Column(key="twentieth", header="Nearest 5 % from"),
        Column(key="nearest", header="Nearest"),
        Column(key="copies", header="Same picture"),
        Column(key="beyond", header="Nearer than any held out"),
        Column(key="p", header="p"),
    )
    return Table(
        name="nearness",
        caption="Each image's nearest training image",
        columns=columns,
        rows=tuple(
            Row(
                values=(
                    each.images,
                    each.number,
                    *(Number(value, decimals=3) for value in (each.median, each.twentieth, each.nearest)),
                    each.copies,
                    Number(each.beyond, decimals=0),
                    Number(each.p, is_p=True),
                ),
                group=title[each.by],
            )
            for each in quality.nearness
        ),
        notes=(
            "Real images that the generator has not seen show how near a new image comes to the training images by "
            "itself.",
            "p: of as many generated images being nearer than any of those by chance (Rosenbaum's test); where few are "
            "held out, only many such images make it small.",
        ),
    )


def _agreement(quality: Quality) -> Table:
    return Table(
        name="agreement",
        caption=f"Masks that {quality.asked.segmenter} finds, against the masks that the images have",
        columns=(
            *_set_columns(),
            *_estimate_columns("dice", "Dice"),
            Column(key="missed", header="Nothing of it found"),
        ),
        rows=tuple(
            Row(
                values=(each.images, each.number, *_estimate(each.dice, 4), Number(each.missed, decimals=3)),
                group=each.label,
            )
            for each in quality.agreement
        ),
        notes=(
            "Intervals by the bootstrap over patients. Above the Dice of real images, lesions are easier than real "
            "ones; below it, they are not where the mask says, or look like none that the segmenter knows.",
        ),
    )


def _diversity(quality: Quality) -> Table:
    columns = (
        *_set_columns(),
        *_estimate_columns("ms_ssim", "MS-SSIM"),
        *(_estimate_columns("distance", "Distance of features") if quality.features else ()),
        Column(key="repeated", header="Same picture as another"),
    )
    return Table(
        name="diversity",
        caption="Mean over pairs of images of different patients",
        columns=columns,
        rows=tuple(
            Row(
                values=(
                    each.images,
                    each.number,
                    *_estimate(each.ms_ssim, 4),
                    *(_estimate(each.distance, 3) if quality.features else ()),
                    each.repeated,
                ),
                group=each.label,
            )
            for each in quality.diversity
        ),
        notes=("Less varied images than real ones are more similar (higher MS-SSIM) and nearer to each other.",),
    )


def _set_columns() -> tuple[Column, Column]:
    return Column(key="images", header="Images", numeric=False), Column(key="number", header="Number")


def _estimate_columns(key: str, title: str) -> tuple[Column, ...]:
    return (
        Column(key=key, header="value", over=title),
        Column(key=f"{key}_low", header="95 % from", over=title),
        Column(key=f"{key}_high", header="to", over=title),
    )


def _estimate(estimate: Estimate | Interval | None, decimals: int) -> tuple[Number, Number, Number]:
    value, low, high = estimate or (None, None, None)
    return Number(value, decimals=decimals), Number(low, decimals=decimals), Number(high, decimals=decimals)


# --- pictures ---------------------------------------------------------------------------------------------------


def _histograms(quality: Quality) -> list[Histogram]:
    """Correlations with the nearest training image, in the same bins for both sets."""
    if TRAINING not in quality.parts:
        return []
    low, high = 0.0, 1.0
    by_name = quality.images.groupby("images", sort=False)["correlation"]
    clipped = {str(name): values.clip(low, high) for name, values in by_name}
    return histograms("Correlation with the nearest training image", clipped, low, high)


def _pairs(quality: Quality) -> list[Pair]:
    """The generated images that are nearest to a training image: copies, then by correlation, then by features."""
    if TRAINING not in quality.parts:
        return []
    rows = quality.images[quality.images["images"] == SYNTHETIC]
    pairs = []
    nearest = rows.sort_values(["copy", "correlation"], ascending=False, kind="stable")[:MOST_PAIRS]
    for row in nearest.to_dict("records"):
        said = f"correlation {row['correlation']:.3f}" + (", mirrored" if row["mirrored"] else "")
        pairs.append(_pair(quality, row, row["nearest"], f"the same picture, {said}" if row["copy"] else said))
    if "distance" in rows:
        for row in rows.sort_values("distance", kind="stable")[:MOST_PAIRS].to_dict("records"):
            pairs.append(_pair(quality, row, row["near_features"], f"features {row['distance']:.3f} apart"))
    return pairs


def _pair(quality: Quality, row: dict[str, t.Any], nearest: str, said: str) -> Pair:
    one = _view(quality.parts[SYNTHETIC], row["key"])
    return Pair(one, _view(quality.parts[TRAINING], nearest), said, bool(row["copy"]))


def _view(part: Part, key: str) -> Picture:
    image_HWC, mask_HW = _scan(part, key)
    return Picture(part.name, key, "", contour_of(image_HWC, mask_HW, EDGE))


def _found(quality: Quality) -> list[Found]:
    dice = quality.images[quality.images["images"] == SYNTHETIC].set_index("key")["dice"] if quality.found else {}
    views = []
    for key, found_HW in quality.found.items():
        image_HWC, mask_HW = _scan(quality.parts[SYNTHETIC], key)
        errors = draw(image_HWC, mask_HW, 255 * found_HW, 0.5, EDGE)
        views.append(Found(key, f"Dice {dice[key]:.3f}", contour_of(image_HWC, mask_HW, EDGE), errors))
    return views


def _scan(part: Part, key: str) -> tuple[np.ndarray, np.ndarray]:
    record = next(record for record in part.records if record.key == key)
    return read_image(part.folder, record), read_mask(part.folder, record) & 1
