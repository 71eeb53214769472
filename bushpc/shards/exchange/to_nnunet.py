"""Shards → nnU-Net's raw format, and its splits: `bushpc shards export format=nnunet`.

    OUT/raw/Dataset001_<name>/imagesTr/<case>_0000.png
                              labelsTr/<case>.png            0 is background
                              dataset.json
                              cases.csv                      key, patient, label, pixel_mm, fold, attributes
    OUT/preprocessed/Dataset001_<name>/splits_final.json     where nnU-Net looks for it

nnU-Net calls a scan a case. Its labels have one value a pixel, while mask classes may overlap (a cup lies in its disc).
Where they do, every combination of classes that occurs is a value, and each class is a region: several values.
"""

from __future__ import annotations

import csv
import io
import json
import typing as t
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bushpc.files import write_atomically
from bushpc.shards.exchange.packed import Scans, case_of

ENDING = ".png"
GREY = ["grey"]
TABLE = "cases.csv"
COLUMNS = ("key", "patient", "label", "pixel_mm", "fold")


def dataset_name(dataset: str) -> str:
    """The folder's name; nnU-Net requires a number in it."""
    return f"Dataset001_{dataset}"


def describe(
    channels: Sequence[str], labels: Mapping[str, t.Any], cases: int, more: Mapping[str, t.Any] | None = None
) -> str:
    """The text of a dataset.json."""
    described = {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "numTraining": cases,
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    return json.dumps({**described, **(more or {})}, indent=1, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Values:
    """How masks are written. value_of: bits of a pixel → its value. regions: classes overlap."""

    labels: dict[str, int | list[int]]
    value_of: np.ndarray
    regions: bool

    @property
    def order(self) -> dict[str, list[int]]:
        """The entry of dataset.json that says which value a predicted region gets; later ones lie on top."""
        if not self.regions:
            return {}
        # Of a region inside another, the value is that of the fewest classes: none of those inside it.
        bits = {int(value): number.bit_count() for number, value in enumerate(self.value_of.tolist()) if value}
        return {"regions_class_order": [min(values, key=bits.__getitem__) for values in self._lists()]}

    def _lists(self) -> list[list[int]]:
        return [value for value in self.labels.values() if isinstance(value, list)]


def values_of(classes: Sequence[str], pixels: Mapping[int, int]) -> Values:
    """pixels: bits of a pixel → how many there are of them in the whole dataset."""
    found = sorted(bits for bits in pixels if bits)
    value_of = np.zeros(256, np.uint8)
    if all(bits.bit_count() == 1 for bits in found):
        for k in range(len(classes)):
            value_of[1 << k] = k + 1
        return Values(labels={name: k + 1 for k, name in enumerate(classes)}, value_of=value_of, regions=False)
    for number, bits in enumerate(found, 1):
        value_of[bits] = number
    area = {k: sum(count for bits, count in pixels.items() if bits >> k & 1) for k in range(len(classes))}
    # nnU-Net paints regions in the order of dataset.json, so the enclosing ones come first.
    labels: dict[str, int | list[int]] = {
        classes[k]: [int(value_of[bits]) for bits in found if bits >> k & 1]
        for k in sorted(area, key=lambda k: -area[k])
    }
    return Values(labels=labels, value_of=value_of, regions=True)


def write(scans: Scans, folder: Path) -> None:
    """Write all scans below `folder`, which is empty."""
    name = dataset_name(scans.manifest.dataset)
    raw, preprocessed = folder / "raw" / name, folder / "preprocessed" / name
    for part in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        part.mkdir(parents=True)
    classes = scans.manifest.mask_classes
    values = values_of(classes, _pixels(scans) if len(classes) > 1 else {1: 1})
    grey = scans.all_grey()
    for record, png, mask_HW in scans:
        case = case_of(record.key)
        (raw / "imagesTr" / f"{case}_0000{ENDING}").write_bytes(png if grey else _in_colour(png))
        Image.fromarray(values.value_of[mask_HW]).save(raw / "labelsTr" / f"{case}{ENDING}")
    card = scans.card
    more = {
        **values.order,
        "name": scans.manifest.dataset,
        "description": card.title,
        "reference": card.where,
        "licence": card.licence,
        "mask_classes": classes,
    }
    channels = GREY if grey else scans.manifest.channels
    write_atomically(raw / "dataset.json", describe(channels, values.labels, len(scans.manifest.records), more))
    write_atomically(raw / TABLE, _table(scans))
    if scans.folds:
        write_atomically(preprocessed / "splits_final.json", json.dumps(_splits(scans.folds), indent=1))


def _pixels(scans: Scans) -> Counter[int]:
    count: Counter[int] = Counter()
    for mask_HW in scans.masks():
        for bits, pixels in enumerate(np.bincount(mask_HW.ravel(), minlength=256).tolist()):
            if pixels:
                count[bits] += pixels
    return count


def _in_colour(png: bytes) -> bytes:
    """A PNG of three or four channels: nnU-Net wants the same number in every image."""
    with Image.open(io.BytesIO(png)) as image:
        if image.mode != "L":
            return png
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        return buffer.getvalue()


def _table(scans: Scans) -> str:
    """What nnU-Net has no place for."""
    records = scans.manifest.records
    attributes = sorted({name for record in records for name in record.attributes} - set(COLUMNS))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*COLUMNS, *attributes])
    for record in records:
        row = [record.key, scans.patient(record), record.label, record.pixel_mm, scans.folds.get(record.key)]
        writer.writerow(["" if cell is None else cell for cell in [*row, *map(record.attributes.get, attributes)]])
    return stream.getvalue()


def _splits(folds: Mapping[str, int]) -> list[dict[str, list[str]]]:
    fold_of = {case_of(key): fold for key, fold in folds.items()}
    return [
        {
            "train": [case for case, other in fold_of.items() if other != fold],
            "val": [case for case, other in fold_of.items() if other == fold],
        }
        for fold in range(max(folds.values()) + 1)
    ]
