"""Masks as COCO instances, in run-length encoding: `bushpc shards export format=coco`, and `bushpc predict --as coco`.

    OUT/annotations.json    images with key, patient, label, fold, pixel_mm and attributes; one annotation per instance
    OUT/images/<key>.png

An instance is an 8-connected part of one mask class. COCO's polygons run along pixel edges and lose pixels of most
masks; run lengths hold every pixel, and `iscrowd` stays 0, as COCO's evaluation ignores crowds.
"""

from __future__ import annotations

import json
import typing as t
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from bushpc.errors import ConfigError
from bushpc.files import write_atomically
from bushpc.shards.exchange.packed import Scans, case_of

FILE_NAME = "annotations.json"
IMAGES = "images"
AROUND = np.ones((3, 3))

Entry = dict[str, t.Any]


def require_pycocotools() -> None:
    """Raises: ConfigError without the library."""
    from importlib.util import find_spec

    if find_spec("pycocotools") is None:
        raise ConfigError(
            "COCO needs pycocotools: pip install -c constraints.txt -e '.[exchange]', or choose another format"
        )


def categories(classes: Sequence[str]) -> list[Entry]:
    """Mask class k has the number k + 1."""
    return [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(classes)]


def instances(mask_HW: np.ndarray, classes: int, image_id: int, first_id: int) -> list[Entry]:
    """The annotations of one mask, whose bit k is class k, numbered from `first_id`."""
    from pycocotools import mask as coco

    found: list[Entry] = []
    for k in range(classes):
        parts, count = ndimage.label(mask_HW >> k & 1, structure=AROUND)
        for part in range(1, count + 1):
            runs = coco.encode(np.asfortranarray(parts == part, dtype=np.uint8))
            found.append(
                {
                    **{"id": first_id + len(found), "image_id": image_id, "category_id": k + 1},
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode("ascii")},
                    **{"area": int(coco.area(runs)), "bbox": coco.toBbox(runs).tolist(), "iscrowd": 0},
                }
            )
    return found


def text(classes: Sequence[str], images: Iterable[Entry], annotations: Iterable[Entry], **more: t.Any) -> str:
    """The content of a COCO file, an image or annotation a line."""
    parts: dict[str, t.Any] = {**more, "categories": categories(classes)}
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in parts.items()]
    for name, entries in (("images", images), ("annotations", annotations)):
        rows = ",\n ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        lines.append(f'"{name}": [\n {rows}\n]' if rows else f'"{name}": []')
    return "{" + ",\n".join(lines) + "}\n"


def write(scans: Scans, folder: Path) -> None:
    """Write all scans to `folder`, which is empty."""
    (folder / IMAGES).mkdir()
    classes = scans.manifest.mask_classes
    images: list[Entry] = []
    annotations: list[Entry] = []
    for number, (record, png, mask_HW) in enumerate(scans, 1):
        file = f"{case_of(record.key)}.png"
        (folder / IMAGES / file).write_bytes(png)
        images.append(
            {
                **{"id": number, "file_name": file, "width": record.width, "height": record.height, "license": 1},
                **{"key": record.key, "patient": scans.patient(record), "label": record.label},
                "fold": scans.folds.get(record.key),
                **{"pixel_mm": record.pixel_mm, "attributes": record.attributes},
            }
        )
        annotations += instances(mask_HW, len(classes), number, len(annotations) + 1)
    card = scans.card
    about = {"description": card.title, "url": card.where, "contributor": card.citation}
    licences = [{"id": 1, "name": card.licence, "url": ""}]
    write_atomically(folder / FILE_NAME, text(classes, images, annotations, info=about, licenses=licences))
