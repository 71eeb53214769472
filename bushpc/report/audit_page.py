"""Audit of packed data → one HTML page with the pictures. Reads the shards, as a report's pictures do."""

from __future__ import annotations

import functools
import typing as t
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.report import standalone
from bushpc.report.audit_gallery import SAME_PICTURE, scan_id
from bushpc.report.drawing import contour_of
from bushpc.report.standalone import EDGE, Histogram, ScanPicture, histograms, labels_with
from bushpc.report.table import Column, RowData, Table, Value
from bushpc.shards.audit_findings import KINDS, Audit, AuditedDataset, CopyPair, balance
from bushpc.shards.manifest import Record, read_image, read_mask

MOST_PAIRS = 60  # with pictures: a page stays one that a phone can open
MOST_OF_A_KIND = 18
_SECTIONS = (("counts", "Counts"), ("pairs", "The same picture"))


class FindingsOfKind(t.NamedTuple):
    """Findings of one kind. without: sentences on those that are about no scan. more: how many aren't shown."""

    id: str
    title: str
    meaning: str
    grave: bool
    number: int
    views: list[ScanPicture]
    without: list[str]
    more: int


def write_page(audit: Audit, folder: Path, command: Sequence[str], gallery: str = "") -> Path:
    """Write `folder`/index.html, whole. Raises: OSError.

    command: that wrote it, for the page's foot. gallery: relative link to the page of all scans, if there is one.
    """
    pairs = audit.twins[:MOST_PAIRS]
    kinds = [_of_kind(audit, kind) for kind in audit.kind_counts]
    scans = [record for packed in audit.datasets for record in packed.manifest.records]
    return standalone.write_page(
        folder,
        "audit.html.j2",
        command,
        audit=audit,
        gallery=gallery,
        scan_id=functools.partial(scan_id, audit),
        same_picture=SAME_PICTURE,
        scans=len(scans),
        patients=len({(packed.name, r.patient) for packed in audit.datasets for r in packed.manifest.records}),
        counts=_counts(audit),
        histograms=_histograms(audit),
        pairs=[(pair, _view(audit, pair.dataset, pair.key), _other(audit, pair)) for pair in pairs],
        more_pairs=len(audit.twins) - len(pairs),
        kinds=kinds,
        sections=[*_SECTIONS, *((kind.id, kind.title) for kind in kinds), ("provenance", "Provenance")],
    )


def _of_kind(audit: Audit, kind: str) -> FindingsOfKind:
    findings = [finding for finding in audit.findings if finding.kind == kind]
    about_scans = [finding for finding in findings if finding.key]
    shown = about_scans[:MOST_OF_A_KIND]
    without = [f"{finding.dataset}: {finding.said}" for finding in findings if not finding.key]
    return FindingsOfKind(
        kind,
        KINDS[kind].title,
        KINDS[kind].meaning,
        KINDS[kind].grave,
        len(findings),
        [_view(audit, finding.dataset, finding.key, finding.said) for finding in shown],
        without[:MOST_OF_A_KIND],
        len(about_scans) - len(shown) + max(0, len(without) - MOST_OF_A_KIND),
    )


def _other(audit: Audit, pair: CopyPair) -> ScanPicture:
    return _view(audit, pair.other_dataset, pair.other_key)


def _view(audit: Audit, dataset: str, key: str, caption: str = "") -> ScanPicture:
    packed = next(packed for packed in audit.datasets if packed.name == dataset)
    record = packed.manifest.record(key)
    try:
        return ScanPicture(dataset, key, caption or record.label, _picture(packed, record))
    except DataError:
        return ScanPicture(dataset, key, caption or record.label, None)


def _picture(packed: AuditedDataset, record: Record) -> str:
    """The image with the outline of its mask; of four channels that are no colours, the first."""
    image_HWC = read_image(packed.folder, record)
    if image_HWC.shape[2] != 3:
        image_HWC = np.repeat(image_HWC[..., :1], 3, axis=2)
    return contour_of(image_HWC, read_mask(packed.folder, record), EDGE)


@dataclass(frozen=True, kw_only=True)
class Counts(RowData):
    """Counts of a dataset or of one of its folds, as `shards.audit.balance` has them."""

    counts: Mapping[str, t.Any]

    @property
    def part(self) -> str:
        return f"fold {self.counts['fold']}" if self.counts["fold"] else "all"

    @property
    def sides(self) -> str:
        return f"{self.counts['shortest_side']} to {self.counts['longest_side']}"

    @property
    def lesion_share(self) -> str:
        share = self.counts["lesion_share"]
        return "{1:.1f} ({0:.1f} to {2:.1f})".format(*share) if share else "—"


def _counts(audit: Audit) -> Table:
    rows = [Counts(counts=row, group=row["dataset"], strong=not row["fold"]) for row in balance(audit)]
    labels = labels_with(lambda label: any(row.counts[label] for row in rows))
    columns = (
        Column(key="part", header="Part", numeric=False, of=lambda row: row.part),
        _count_column("scans", "Scans"),
        _count_column("patients", "Patients"),
        *(_count_column(label, label.capitalize()) for label in labels),
        _count_column("pixel_mm", "Pixel size known"),
        Column(key="sides", header="Sides, pixels", of=lambda row: row.sides),
        Column(key="lesion_share", header="Lesion, % of image", of=lambda row: row.lesion_share),
    )
    note = "Lesions as median and, in brackets, the 5 % and the 95 % quantile."
    return Table.of("counts", "Scans by dataset and fold", columns, rows, [note])


def _count_column(key: str, header: str) -> Column:
    return Column(key=key, header=header, of=functools.partial(_count, key))


def _count(key: str, row: Counts) -> Value:
    count: int = row.counts[key]
    return count


def _histograms(audit: Audit) -> list[Histogram]:
    """The same bins for all datasets, so that they can be compared."""
    shares, sides = {}, {}
    for packed in audit.datasets:
        records = packed.manifest.records
        shares[packed.name] = [100 * r.lesion_pixels / (r.height * r.width) for r in records if r.lesion_pixels]
        sides[packed.name] = [float(max(r.height, r.width)) for r in records]
    found: list[Histogram] = []
    for title, by_dataset in (("Lesion area, % of the image", shares), ("Longer side, pixels", sides)):
        values = [value for each in by_dataset.values() for value in each]
        if not values:
            continue
        found += histograms(title, by_dataset, 0.0, max(values))
    return found
