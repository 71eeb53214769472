"""What an audit can find, and the files it writes: findings.csv, pairs.csv, audit.json."""

from __future__ import annotations

import csv
import functools
import io
import json
import typing as t
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bushpc.files import write_atomically
from bushpc.sample import LABELS, UNLABELLED
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.split import fold_word

# A lesion below a thousandth of its image has fewer than 66 pixels at 256 x 256: a border error of one pixel decides
# its Dice.
TINY_SHARE = 0.001
SMALL_SIDE = 64  # pixels: smaller images have less detail than the smallest network input
# Pixels whose channels differ by more grey levels are annotations or Doppler; scanner tints stay below 31.
COLOUR_SPREAD = 60


class Kind(t.NamedTuple):
    """The kind of a finding. grave: it makes results wrong in any study."""

    title: str
    meaning: str
    grave: bool


KINDS = {
    "unreadable": Kind("Unreadable", "Image or mask is cut off, damaged, or differs in size from the manifest.", True),
    "patient_in_folds": Kind("Patients in two folds", "The network is validated on patients that it trained on.", True),
    "folds": Kind("Folds that do not fit", "The fold file does not fit these scans; training would reject it.", True),
    "empty_mask": Kind("Empty masks", "The mask of a lesion has no pixels: its Dice is 0 or undefined.", True),
    "normal_with_mask": Kind("Normal scans with a mask", "A scan without a lesion has lesion pixels.", True),
    "unknown_label": Kind("Unknown labels", f"Neither {', '.join(LABELS)} nor {UNLABELLED}.", True),
    "patients_unknown": Kind(
        "Patients that are not known",
        "Scans of one patient may train and validate at once, so results may be too good.",
        False,
    ),
    "patient_labels": Kind("Patients with several labels", "The patient has two lesions, or a label is wrong.", False),
    "tiny_mask": Kind("Tiny lesions", f"Below {TINY_SHARE:.1%} of the image.", False),
    "parts": Kind("Masks in several parts", "Several lesions, or specks left by an annotation tool.", False),
    "border": Kind("Masks at the image's border", "The lesion is cut off, so its size is unknown.", False),
    "marks": Kind(
        "Text or calipers at a mask's outline",
        "Thin bright strokes or coloured pixels at the outline: a network may learn the marks instead of the lesion.",
        False,
    ),
    "colour": Kind("Coloured images", "Doppler, elastography or coloured marks.", False),
    "constant": Kind("Constant images", "Every pixel is the same.", True),
    "small": Kind("Very small images", f"The shorter side is below {SMALL_SIDE} pixels.", False),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """kind: one of KINDS. key: of the scan, or "" if it is not about a scan. said: what was seen, as a text.

    patient: whom it is about, "" if it is about a scan or about all.
    """

    kind: str
    dataset: str
    key: str
    said: str
    patient: str = ""


@dataclass(frozen=True, kw_only=True)
class CopyPair:
    """Two scans that are the same picture.

    correlation: of their local contrast, 1 if identical. group: number of the group of copies they belong to.
    fold, other_fold: None if the scan has no fold.
    """

    dataset: str
    key: str
    other_dataset: str
    other_key: str
    identical: bool
    mirrored: bool
    correlation: float
    label: str
    other_label: str
    same_patient: bool
    fold: int | None
    other_fold: int | None
    group: int

    @property
    def same_dataset(self) -> bool:
        return self.dataset == self.other_dataset

    @property
    def conflicting(self) -> bool:
        """Whether the labels differ; an unlabelled scan never conflicts."""
        return self.label != self.other_label and UNLABELLED not in (self.label, self.other_label)

    @property
    def leaking(self) -> bool:
        """Whether one trains while the other validates."""
        return self.same_dataset and None not in (self.fold, self.other_fold) and self.fold != self.other_fold

    @property
    def grave(self) -> bool:
        return self.conflicting or self.leaking

    def says(self) -> str:
        """The pair's properties as a text, the gravest first."""
        words = []
        if self.conflicting:
            words.append(f"{self.label} against {self.other_label}")
        if self.leaking:
            words.append(f"folds {self.fold} and {self.other_fold}")
        if not self.same_dataset:
            words.append("in two datasets")
        elif self.same_patient:
            words.append("of one patient")
        how = "identical pixels" if self.identical else f"correlation {self.correlation:.3f}"
        return ", ".join([*words, how + (", mirrored" if self.mirrored else "")])


@dataclass(frozen=True, kw_only=True)
class AuditedDataset:
    """An audited dataset. name: of the dataset; followed by its folder if two datasets have the same name.

    folds: name of the fold file, or "" if there is none. fold_by_key: the file's content, even if it doesn't fit.
    """

    name: str
    folder: Path
    manifest: Manifest
    folds: str
    fold_by_key: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ScanStats:
    """Statistics of a scan's pixels.

    lesion_share: of the image, 0 to 1. parts: number of 8-connected components; smallest: pixels of the smallest one.
    at_border: whether the mask touches the image border. marks: number of marks that touch the mask's outline.
    coloured: share of coloured pixels. constant: whether all pixels of the image are equal.
    """

    lesion_share: float
    parts: int
    smallest: int
    at_border: bool
    marks: int
    coloured: float
    constant: bool


@dataclass(frozen=True, kw_only=True)
class Audit:
    """facts: statistics by dataset and key, of every scan that could be read."""

    datasets: list[AuditedDataset]
    findings: list[Finding]
    twins: list[CopyPair]
    facts: dict[tuple[str, str], ScanStats]
    most_bits: int
    least_correlation: float

    @functools.cached_property
    def grave(self) -> int:
        """Number of grave findings plus grave pairs."""
        return sum(KINDS[finding.kind].grave for finding in self.findings) + sum(pair.grave for pair in self.twins)

    @property
    def pair_counts(self) -> dict[str, int]:
        """Number of pairs by property; a pair may be counted several times."""
        return {
            "identical pixels": sum(pair.identical for pair in self.twins),
            "near duplicates": sum(not pair.identical for pair in self.twins),
            "mirrored": sum(pair.mirrored for pair in self.twins),
            "within one label": sum(pair.label == pair.other_label for pair in self.twins),
            "with conflicting labels": sum(pair.conflicting for pair in self.twins),
            "in training and validation": sum(pair.leaking for pair in self.twins),
            "of one patient": sum(pair.same_patient for pair in self.twins),
            "across datasets": sum(not pair.same_dataset for pair in self.twins),
        }

    @property
    def kind_counts(self) -> dict[str, int]:
        """Number of findings by kind, in the order of KINDS, without zeros."""
        counts = Counter(finding.kind for finding in self.findings)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    def to_json(self) -> str:
        """Findings, pairs and counts, without the statistics of each scan."""
        content = {
            "thresholds": {
                "most_bits": self.most_bits,
                "least_correlation": self.least_correlation,
                "tiny_share": TINY_SHARE,
                "small_side": SMALL_SIDE,
                "colour_spread": COLOUR_SPREAD,
            },
            "datasets": [
                {
                    "name": each.name,
                    "manifest": each.manifest.hash,
                    "excerpt": each.manifest.excerpt,
                    "folds": each.folds,
                }
                for each in self.datasets
            ],
            "counts": balance(self),
            "pair_counts": self.pair_counts,
            "finding_counts": self.kind_counts,
            "pairs": [asdict(pair) for pair in self.twins],
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def balance(audit: Audit) -> list[dict[str, t.Any]]:
    """Counts of every dataset (fold "") and of each of its folds, one row each.

    Sides are the images', in pixels; lesion shares are percentages of the image; pixel_mm counts the scans whose pixel
    size is known.
    """
    rows = []
    for packed in audit.datasets:
        parts: dict[str, list[Record]] = {"": packed.manifest.records}
        for fold in sorted(set(packed.fold_by_key.values())):
            parts[fold_word(fold)] = [r for r in packed.manifest.records if packed.fold_by_key.get(r.key) == fold]
        for fold_name, records in parts.items():
            labels = Counter(record.label for record in records)
            shares = [100 * r.lesion_pixels / (r.height * r.width) for r in records if r.lesion_pixels]
            rows.append(
                {
                    "dataset": packed.name,
                    "fold": fold_name,
                    "scans": len(records),
                    "patients": len({record.patient for record in records}),
                    **{label: labels[label] for label in (*LABELS, UNLABELLED)},
                    "pixel_mm": sum(record.pixel_mm is not None for record in records),
                    "shortest_side": min((min(r.height, r.width) for r in records), default=0),
                    "longest_side": max((max(r.height, r.width) for r in records), default=0),
                    "lesion_share": [round(float(q), 2) for q in np.quantile(shares, (0.05, 0.5, 0.95))]
                    if shares
                    else [],
                }
            )
    return rows


def write(audit: Audit, folder: Path) -> None:
    """Write `folder`/findings.csv, pairs.csv and audit.json, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "findings.csv", _csv(Finding, audit.findings))
    write_atomically(folder / "pairs.csv", _csv(CopyPair, audit.twins))
    write_atomically(folder / "audit.json", audit.to_json())


def finding_of(kind: str, packed: AuditedDataset, record: Record, said: str) -> Finding:
    return Finding(kind=kind, dataset=packed.name, key=record.key, said=said)


def _csv(kind: type, rows: Sequence[t.Any]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(kind.__dataclass_fields__), lineterminator="\n")  # type: ignore[attr-defined]
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return stream.getvalue()
