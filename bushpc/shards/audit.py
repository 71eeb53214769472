"""The audit of packed data finds what may mislead training or evaluation, before anything is trained.

    shards of one or more datasets ─inspect→ statistics per scan → findings, pairs, counts → terminal, CSV, JSON, page

A finding is a remark on one scan (or patient, or file), not a verdict: whether a lesion may touch the image border, for
example, depends on the study. Grave findings make results wrong in any study: the same picture in training and
validation or under two labels, a patient in two folds, a mask that contradicts its label.
"""

from __future__ import annotations

import os
import typing as t
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bushpc.errors import ConfigError, DataError
from bushpc.sample import LABELS, UNLABELLED
from bushpc.shards import duplicates
from bushpc.shards.audit_findings import (
    KINDS,
    Audit,
    AuditedDataset,
    CopyPair,
    Finding,
    ScanStats,
    balance,
    finding_of,
)
from bushpc.shards.audit_scans import findings_of, inspect
from bushpc.shards.card import FILE_NAME, Card
from bushpc.shards.duplicates import LEAST_CORRELATION, MOST_BITS, Fingerprint, find_pairs, fingerprint_of, group
from bushpc.shards.manifest import Manifest, Record, read_image
from bushpc.shards.progress import Show
from bushpc.shards.split import find_folds, load_folds, read_fold_numbers

if t.TYPE_CHECKING:
    import rich.console


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
        for done, ((packed, record), seen) in enumerate(zip(scans, pool.map(inspect, scans), strict=True), 1):
            if isinstance(seen, DataError):
                findings.append(finding_of("unreadable", packed, record, str(seen).splitlines()[0]))
            else:
                readable.append((packed, record))
                fingerprints.append(seen[0])
                facts[packed.name, record.key] = seen[1]
                findings += findings_of(packed, record, seen[1])
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
