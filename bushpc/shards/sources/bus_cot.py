"""BUS-CoT (Yu et al. 2026): a folder per image with the image and its lesions' masks, and a JSON file of records.

    BUS-Expert_dataset.json record → BUS-Expert/<id>/<id>@raw.png + <id>@mask*.png → image, united mask

shards/bus_cot/card.yaml lists the oddities of the published files and how they are handled (`notes`).
"""

from __future__ import annotations

import json
import typing as t
from collections import defaultdict
from pathlib import Path

from bushpc.errors import DataError
from bushpc.sample import UNLABELLED
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

RAW = "@raw.png"
load = readers.load_scan


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read the records and check every file they name. `excerpt` skips records without their image or masks.

    Raises: DataError naming the JSON file, every missing file, every image without a record, and invalid records.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    table = card.layout["records"]
    images, masks = _pictures(folder, card.layout["images"])
    items, problems, files = [], [], [table]
    for name, record in _records(folder / table).items():
        raw = Path(_text(record, "image_file", "raw_image") or f"{name}{RAW}").name
        image, own_masks = images.pop(raw, None), masks.pop(raw.removesuffix(RAW), [])
        patient = _text(record, "patient_id")
        if excerpt and not (image and own_masks):
            continue
        faults = [] if patient else ["it has no patient_id"]
        faults += [f"{raw} is missing"] if not image else [f"{raw} has no mask"] if not own_masks else []
        problems += [f"{table}, record {name}: {fault}" for fault in faults]
        if not image:
            continue
        pathology = _text(record, "pathology_histology", "pathology")
        label = (pathology or "").lower()
        attributes = {
            "origin": _text(record, "dataset"),
            "birads": _text(_first(record.get("us_report")), "BIRADS"),
            "pathology": pathology,
        }
        scan = readers.ScanFiles(
            folder=folder, image=image, masks=tuple(own_masks), patient=f"bus_cot_{patient}", attributes=attributes
        )
        items.append(Item(key=f"bus_cot_{name}", label=label if label in card.counts else UNLABELLED, recipe=scan))
        files += [image, *own_masks]
    unknown = [*images.values(), *(file for own_masks in masks.values() for file in own_masks)]
    problems += [f"{file} has no record in {table}" for file in unknown]
    readers.raise_if_any(folder, problems)
    return Plan(items, readers.hash_files(folder, files))


def _pictures(folder: Path, part: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """All images by name, and the masks by what stands before the @."""
    images, masks = {}, defaultdict(list)
    for path in tree.glob(folder, f"{part}/**/*@*.png"):
        file = path.relative_to(folder).as_posix()
        if path.name.endswith(RAW):
            images[path.name] = file
        elif (start_kind := path.stem.split("@"))[1].startswith("mask"):
            masks[start_kind[0]].append(file)
    return images, masks


def _records(path: Path) -> dict[str, dict[str, t.Any]]:
    """The records by image id. Raises: DataError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: the folder must contain this file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(record, dict) for record in content.values()):
        raise DataError(f"{path} must hold an object with one record for each image.")
    return content


def _text(record: t.Any, *keys: str) -> str | None:
    """The value that lies at `keys`, as text; None if there is none or it is empty."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return None if record is None else str(record).strip() or None


def _first(reports: t.Any) -> t.Any:
    """The report of the first lesion: reports are numbered, where there are several."""
    inner = next(iter(reports.values()), None) if isinstance(reports, dict) else None
    return inner if isinstance(inner, dict) else reports
