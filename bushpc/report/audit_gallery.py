"""Audited datasets → the gallery of all their scans, with the findings as remarks. Reads the shards."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.report.gallery import Note, Row, Value, write_gallery
from bushpc.report.run_gallery import RunResults
from bushpc.shards.audit_findings import KINDS, Audit, AuditedDataset
from bushpc.shards.manifest import Record, read_image, read_mask
from bushpc.shards.progress import Show

SAME_PICTURE = "Same picture as another"
FILTERS = ("dataset", "label", "patient", "fold")
_ScanId = tuple[str, str]


def write_scans(
    audit: Audit,
    page: Path,
    command: Sequence[str],
    *,
    only_findings: bool = False,
    results: RunResults | None = None,
    links: Mapping[str, str] | None = None,
    edge: int | None = None,
    progress: Show | None = None,
) -> Path:
    """Write `page` with every scan of the audited datasets. Raises: ConfigError if there is none; OSError.

    only_findings: leave out scans without a finding, as pictures are most of the work. results: of a run on the
    only one of the datasets. links, edge: as in `write_gallery`.
    """
    notes = _notes(audit)
    scans = [(packed, record) for packed in audit.datasets for record in packed.manifest.records]
    if only_findings:
        scans = [(packed, record) for packed, record in scans if notes[packed.name, record.key]]
    several = len(audit.datasets) > 1
    classes = _classes(audit)
    more = results.fields if results else {}
    attributes = list(dict.fromkeys(name for _, record in scans for name in record.attributes))
    rows = [
        Row(
            id=scan_id(audit, packed.name, record.key),
            key=record.key,
            load=functools.partial(_load, packed, record, results),
            fields={
                **({"dataset": packed.name} if several else {}),
                **_fields(audit, packed, record),
                **{name: by_key.get(record.key) for name, by_key in more.items()},
                **{name: record.attributes.get(name) for name in attributes},
            },
            notes=notes[packed.name, record.key],
        )
        for packed, record in scans
    ]
    return write_gallery(
        page,
        rows,
        title=results.name if results else " and ".join(packed.name for packed in audit.datasets),
        kicker="Scans and predictions" if results else "Scans with findings" if only_findings else "Scans",
        command=command,
        filters=[name for name in FILTERS if any(row.fields.get(name) is not None for row in rows)],
        classes=[*classes, *(results.outlines if results else [])],
        figures={
            "Scans": len(scans),
            "Patients": len({(packed.name, record.patient) for packed, record in scans}),
            "Pairs that are one picture": len(audit.twins),
            "Scans with findings": sum(bool(row.notes) for row in rows),
        },
        problems=[finding.said for finding in audit.findings if not finding.key and not finding.patient],
        links=links,
        edge=edge,
        progress=progress,
    )


def scan_id(audit: Audit, dataset: str, key: str) -> str:
    """What links call a scan: its key; after its dataset, if there are several."""
    return key if len(audit.datasets) == 1 else f"{dataset}/{key}"


def _classes(audit: Audit) -> list[str]:
    """The names of the mask classes; of a class that datasets name differently, all names."""
    classes: dict[int, dict[str, None]] = defaultdict(dict)
    for packed in audit.datasets:
        for k, name in enumerate(packed.manifest.mask_classes):
            classes[k][name] = None
    return [" or ".join(classes[k]) for k in sorted(classes)]


def _fields(audit: Audit, packed: AuditedDataset, record: Record) -> dict[str, Value]:
    facts = audit.facts.get((packed.name, record.key))
    return {
        "label": record.label,
        "patient": record.patient,
        "fold": packed.fold_by_key.get(record.key),
        "lesion, % of image": round(100 * record.lesion_pixels / (record.height * record.width), 2),
        "lesion length, pixels": record.lesion_length,
        "parts of the mask": facts.parts if facts else None,
        "width": record.width,
        "height": record.height,
        "pixel, mm": record.pixel_mm,
    }


def _notes(audit: Audit) -> dict[_ScanId, list[Note]]:
    """The remarks on each scan: copies, findings, and findings on its patient."""
    notes: dict[_ScanId, list[Note]] = defaultdict(list)
    for pair in audit.twins:
        one, other = (pair.dataset, pair.key), (pair.other_dataset, pair.other_key)
        for this, that in ((one, other), (other, one)):
            text = f"{that[1]}: {pair.says()}."
            notes[this].append(Note(kind=SAME_PICTURE, text=text, grave=pair.grave, other=scan_id(audit, *that)))
    scans_of: dict[_ScanId, list[str]] = defaultdict(list)
    for packed in audit.datasets:
        for record in packed.manifest.records:
            scans_of[packed.name, record.patient].append(record.key)
    for finding in audit.findings:
        kind = KINDS[finding.kind]
        keys = [finding.key] if finding.key else scans_of[finding.dataset, finding.patient] if finding.patient else []
        for key in keys:
            notes[finding.dataset, key].append(Note(kind=kind.title, text=f"{finding.said}.", grave=kind.grave))
    return notes


def _load(packed: AuditedDataset, record: Record, results: RunResults | None) -> tuple[np.ndarray, np.ndarray | None]:
    """A damaged mask is among the findings; the image is worth looking at all the same."""
    image_HWC = read_image(packed.folder, record)
    try:
        mask_HW = read_mask(packed.folder, record)
    except DataError:
        return image_HWC, None
    if results:
        mask_HW = results.add_to(mask_HW, record.key, len(packed.manifest.mask_classes))
    return image_HWC, mask_HW
