"""The audit of packed data finds what may mislead training or evaluation, before anything is trained.

    shards of one or more datasets ─inspect→ statistics per scan → findings, pairs, counts → terminal, CSV, JSON, page

A finding is a remark on one scan (or patient, or file), not a verdict: whether a lesion may touch the image border, for
example, depends on the study. Grave findings make results wrong in any study: the same picture in training and
validation or under two labels, a patient in two folds, a mask that contradicts its label.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import typing as t
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from bushpc.errors import ConfigError, DataError
from bushpc.files import write_atomically
from bushpc.sample import LABELS, UNLABELLED
from bushpc.shards import duplicates
from bushpc.shards.card import FILE_NAME, Card
from bushpc.shards.duplicates import LEAST_CORRELATION, MOST_BITS, Fingerprint, find_pairs, fingerprint_of, group
from bushpc.shards.manifest import Manifest, Record, read_image, read_mask
from bushpc.shards.progress import Show
from bushpc.shards.split import find_folds, load_folds, read_fold_numbers

if t.TYPE_CHECKING:
    import rich.console

# A lesion below a thousandth of its image has fewer than 66 pixels at 256 x 256: a border error of one pixel decides
# its Dice.
TINY_SHARE = 0.001
SMALL_SIDE = 64  # pixels: smaller images have less detail than the smallest network input
# Pixels whose channels differ by more grey levels are annotations or Doppler; scanner tints stay below 31.
COLOUR_SPREAD = 60

# Text and calipers are strokes thinner than 7 pixels, at least 85 grey levels brighter than their surroundings, in
# pieces about as high as wide; bright tissue interfaces are long and flat. This rule finds marks at 1 % of BrEaST's
# lesions, which have none, and at 57 % of those in the BUS-BRA excerpt, four fifths of which have calipers: it misses
# grey ones on bright tissue. With 75 grey levels it would find 69 %, and 4 % in BrEaST.
_STROKE = 7
_STROKE_CONTRAST = 85
_MARK_PIXELS = 8
_MARK_SIDES = (4, 48)
_MARK_ASPECT = 2
_MARK_ROOM = 48  # margin around the mask, in pixels, in which marks are searched
# A mark touches the outline if it is this close: as a share of the longer side, but at least so many pixels.
_NEAR_SHARE, _NEAR_LEAST = 0.006, 3


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


def audit(
    folders: Sequence[Path],
    *,
    folds: str = "frozen",
    most_bits: int = MOST_BITS,
    least_correlation: float = LEAST_CORRELATION,
    progress: Show | None = None,
) -> Audit:
    """Inspect every scan of the packed datasets in `folders`, and compare all pairs of scans.

    folds: the folds to check for leaks: `frozen`, `published` or `grouped`.
    most_bits, least_correlation: as in `bushpc.shards.duplicates.find_pairs`.
    Raises: ConfigError for a folder that is named twice; DataError for one without a readable manifest. Any other
    fault becomes a finding.
    """
    findings: list[Finding] = []
    datasets = _open(folders, folds, findings)
    scans = [(packed, record) for packed in datasets for record in packed.manifest.records]
    facts: dict[tuple[str, str], ScanStats] = {}
    readable: list[tuple[AuditedDataset, Record]] = []
    fingerprints: list[Fingerprint] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # decoding and filters release the GIL
        for done, ((packed, record), seen) in enumerate(zip(scans, pool.map(_inspect, scans), strict=True), 1):
            if isinstance(seen, DataError):
                findings.append(_finding("unreadable", packed, record, str(seen).splitlines()[0]))
            else:
                readable.append((packed, record))
                fingerprints.append(seen[0])
                facts[packed.name, record.key] = seen[1]
                findings += _findings_of(packed, record, seen[1])
            if progress:
                progress(done, len(scans))
    if progress:
        progress(len(scans), len(scans), "comparing all pairs")
    pairs = find_pairs(fingerprints, most_bits=most_bits, least_correlation=least_correlation)
    return Audit(
        datasets=datasets,
        findings=sorted(findings, key=lambda finding: list(KINDS).index(finding.kind)),
        twins=_twins(readable, pairs),
        facts=facts,
        most_bits=most_bits,
        least_correlation=least_correlation,
    )


def find_duplicates(folder: Path, manifest: Manifest, progress: Show | None = None) -> list[duplicates.Pair]:
    """Pairs of the same picture in one packed dataset, by position in its records. `duplicates=group` uses them.

    Raises: DataError for an image that cannot be read.
    """
    fingerprints = []
    for done, record in enumerate(manifest.records, 1):
        fingerprints.append(fingerprint_of(read_image(folder, record)))
        if progress:
            progress(done, len(manifest.records))
    return find_pairs(fingerprints)


def balance(audit: Audit) -> list[dict[str, t.Any]]:
    """Counts of every dataset (fold "") and of each of its folds, one row each.

    Sides are the images', in pixels; lesion shares are percentages of the image; pixel_mm counts the scans whose pixel
    size is known.
    """
    rows = []
    for packed in audit.datasets:
        parts: dict[str, list[Record]] = {"": packed.manifest.records}
        for fold in sorted(set(packed.fold_by_key.values())):
            parts[str(fold)] = [r for r in packed.manifest.records if packed.fold_by_key.get(r.key) == fold]
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


def summary(audit: Audit) -> rich.console.Group:
    """For the terminal: counts by dataset, then the findings."""
    import rich.table
    from rich.console import Group

    held = rich.table.Table("dataset", "scans", "patients", *LABELS, UNLABELLED, "with mm")
    for row in balance(audit):
        if not row["fold"]:
            counts = [row[name] for name in ("scans", "patients", *LABELS, UNLABELLED, "pixel_mm")]
            held.add_row(row["dataset"], *map(str, counts))
    found = rich.table.Table("found", "number", "first")
    for what, count in audit.pair_counts.items():
        found.add_row(f"pairs: {what}", str(count), "")
    for kind, count in audit.kind_counts.items():
        first = next(finding for finding in audit.findings if finding.kind == kind)
        title = KINDS[kind].title.lower()
        found.add_row(
            f"[bold]{title}[/]" if KINDS[kind].grave else title,
            str(count),
            first.key or first.said.splitlines()[-1].strip(),
        )
    return Group(held, found)


# --- one scan ---------------------------------------------------------------------------------------------------


def _inspect(scan: tuple[AuditedDataset, Record]) -> tuple[Fingerprint, ScanStats] | DataError:
    packed, record = scan
    try:
        image_HWC, mask_HW = read_image(packed.folder, record), read_mask(packed.folder, record)
    except DataError as error:
        return error
    channels = [np.ascontiguousarray(image_HWC[..., channel]) for channel in range(image_HWC.shape[2])]
    brightest_HW = functools.reduce(np.maximum, channels)  # np.max over such a short axis takes 20 ms
    coloured_HW = np.zeros_like(brightest_HW, bool)
    if len(channels) == 3:  # four channels are MRI sequences, not colours
        coloured_HW = brightest_HW - functools.reduce(np.minimum, channels) > COLOUR_SPREAD
    inside_HW = mask_HW > 0
    parts_HW, parts = ndimage.label(inside_HW, np.ones((3, 3)))
    edges = (inside_HW[0], inside_HW[-1], inside_HW[:, 0], inside_HW[:, -1])
    facts = ScanStats(
        lesion_share=float(inside_HW.mean()),
        parts=parts,
        smallest=int(np.bincount(parts_HW[inside_HW])[1:].min()) if parts else 0,
        at_border=any(bool(edge.any()) for edge in edges),
        marks=_marks(brightest_HW, coloured_HW, inside_HW) if parts else 0,
        coloured=float(coloured_HW.mean()),
        constant=all(channel.min() == channel.max() for channel in channels),
    )
    return fingerprint_of(image_HWC), facts


def _marks(brightest_HW: np.ndarray, coloured_HW: np.ndarray, inside_HW: np.ndarray) -> int:
    """Number of marks that touch the outline of the mask, which must not be empty."""
    (place,) = ndimage.find_objects(inside_HW.astype(np.uint8))
    around = tuple(slice(max(side.start - _MARK_ROOM, 0), side.stop + _MARK_ROOM) for side in place)
    bright_HW = brightest_HW[around]
    stroke_HW = bright_HW - ndimage.grey_opening(bright_HW, size=(_STROKE, _STROKE)) >= _STROKE_CONTRAST
    marks_HW, _ = ndimage.label(stroke_HW | coloured_HW[around], np.ones((3, 3)))
    near = max(_NEAR_LEAST, round(_NEAR_SHARE * max(inside_HW.shape)))
    inside_HW = inside_HW[around]
    outline_HW = inside_HW & ~ndimage.binary_erosion(inside_HW, border_value=1)
    touched = np.unique(marks_HW[ndimage.binary_dilation(outline_HW, np.ones((3, 3)), iterations=near)])
    pixels, places = np.bincount(marks_HW.ravel()), ndimage.find_objects(marks_HW)
    count = 0
    for mark in touched[touched > 0]:
        sides = sorted(side.stop - side.start for side in places[mark - 1])
        fits = _MARK_SIDES[0] <= sides[0] and sides[1] <= min(_MARK_SIDES[1], _MARK_ASPECT * sides[0])
        count += bool(fits and pixels[mark] >= _MARK_PIXELS)
    return count


def _findings_of(packed: AuditedDataset, record: Record, facts: ScanStats) -> t.Iterator[Finding]:
    def found(kind: str, said: str) -> Finding:
        return _finding(kind, packed, record, said)

    normal = record.label == "normal"
    if record.label not in (*LABELS, UNLABELLED):
        yield found("unknown_label", f"label '{record.label}'")
    if not facts.parts and not normal:
        yield found("empty_mask", f"{record.label}, but the mask is empty")
    if facts.parts and normal:
        yield found("normal_with_mask", f"{facts.lesion_share:.2%} of the image")
    if 0 < facts.lesion_share < TINY_SHARE:
        yield found("tiny_mask", f"{record.lesion_pixels} pixels, {facts.lesion_share:.3%} of the image")
    if facts.parts > 1:
        yield found("parts", f"{facts.parts} parts, the smallest of {facts.smallest} pixels")
    if facts.at_border:
        yield found("border", "the mask reaches the outermost pixels")
    if facts.marks:
        yield found("marks", f"{facts.marks} at the outline")
    if facts.coloured:
        yield found("colour", f"{facts.coloured:.2%} of the pixels")
    if facts.constant:
        yield found("constant", "all pixels are equal")
    if min(record.height, record.width) < SMALL_SIDE:
        yield found("small", f"{record.width}x{record.height} pixels")


def _finding(kind: str, packed: AuditedDataset, record: Record, said: str) -> Finding:
    return Finding(kind=kind, dataset=packed.name, key=record.key, said=said)


# --- datasets and pairs -----------------------------------------------------------------------------------------


def _open(folders: Sequence[Path], source: str, findings: list[Finding]) -> list[AuditedDataset]:
    """Open the datasets and their folds; faults of folds and patients are added to `findings`."""
    again = [folder for number, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:number])]
    if again:
        raise ConfigError(f"data={again[0]} is given twice: every scan would be a copy of itself. Give it once.")
    manifests = [Manifest.load(folder) for folder in folders]
    names = Counter(manifest.dataset for manifest in manifests)
    datasets = []
    for folder, manifest in zip(folders, manifests, strict=True):
        name = manifest.dataset if names[manifest.dataset] == 1 else f"{manifest.dataset} ({folder})"
        file, fold_by_key = "", {}
        try:
            path = find_folds(manifest, folder, source)
            file, fold_by_key = path.name, read_fold_numbers(path)
            load_folds(path, manifest.records, manifest.excerpt)
        except DataError as error:
            findings.append(Finding(kind="folds", dataset=name, key="", said=str(error)))
        packed = AuditedDataset(name=name, folder=folder, manifest=manifest, folds=file, fold_by_key=fold_by_key)
        findings += _findings_of_patients(packed)
        datasets.append(packed)
    return datasets


def _findings_of_patients(packed: AuditedDataset) -> t.Iterator[Finding]:
    if (packed.folder / FILE_NAME).exists() and Card.load(packed.folder).imported.get("patients") == "none":
        said = "imported with patients=none: every scan counts as a patient"
        yield Finding(kind="patients_unknown", dataset=packed.name, key="", said=said)
    folds: dict[str, set[int]] = {}
    labels: dict[str, set[str]] = {}
    for record in packed.manifest.records:
        labels.setdefault(record.patient, set()).add(record.label)
        if record.key in packed.fold_by_key:
            folds.setdefault(record.patient, set()).add(packed.fold_by_key[record.key])
    for kind, what, by_patient in (("patient_in_folds", "folds", folds), ("patient_labels", "labels", labels)):
        for patient, values in by_patient.items():
            if len(values) > 1:
                said = f"patient {patient}: {what} {', '.join(map(str, sorted(values)))}"
                yield Finding(kind=kind, dataset=packed.name, key="", said=said, patient=patient)


def _twins(scans: list[tuple[AuditedDataset, Record]], pairs: list[duplicates.Pair]) -> list[CopyPair]:
    """The pairs with their datasets' keys, labels and folds; the grave ones first."""
    groups = group(len(scans), pairs)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups[pair.first] for pair in pairs))}
    twins = []
    for pair in pairs:
        (packed, record), (other_packed, other) = scans[pair.first], scans[pair.second]
        same = packed is other_packed
        twins.append(
            CopyPair(
                dataset=packed.name,
                key=record.key,
                other_dataset=other_packed.name,
                other_key=other.key,
                identical=pair.identical,
                mirrored=pair.mirrored,
                correlation=pair.correlation,
                label=record.label,
                other_label=other.label,
                same_patient=same and record.patient == other.patient,
                fold=packed.fold_by_key.get(record.key),
                other_fold=other_packed.fold_by_key.get(other.key),
                group=numbers[groups[pair.first]],
            )
        )
    return sorted(twins, key=lambda pair: (not pair.conflicting, not pair.leaking, pair.group, -pair.correlation))


def _csv(kind: type, rows: Sequence[t.Any]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(kind.__dataclass_fields__), lineterminator="\n")  # type: ignore[attr-defined]
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return stream.getvalue()
