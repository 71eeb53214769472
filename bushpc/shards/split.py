"""Folds: which samples train and which validate, frozen in a file before any training.

    records ─make_folds→ folds.csv ─load_folds→ Folds → the loader
    records ─duplicates.tie_patients, make_folds→ folds_grouped.csv, where copies share a fold

A fold file has the columns key, patient, label, fold: `fold` is the one fold that validates on the sample; the
sample trains in all others. Five folds give the paper's 80:20 split. The file of a paper's single split has fold 0
alone, and the words `train` and `tune` for the scans that never validate. Our own folds include the normal scans, which
are used if `data.normals` is true; published folds may contain lesions only.
"""

from __future__ import annotations

import csv
import io
import typing as t
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.config import paper_splits
from bushpc.errors import ConfigError, DataError, first_of, unknown_name
from bushpc.files import write_atomically
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.readers import csv_rows

FILE_BY_SOURCE = {
    **{"frozen": "folds.csv", "published": "folds_published.csv", "grouped": "folds_grouped.csv"},
    **{source: f"folds_{source}.csv" for source in paper_splits.SOURCES},
}
# In place of a fold's number, for scans of a paper's single split that never validate.
TRAIN, TUNE = -1, -2
WORDS = {TRAIN: "train", TUNE: "tune"}
FOLDS = 5  # of a dataset that has none yet
COLUMNS = ("key", "patient", "label", "fold")
MOST_SHOWN = 8
MOST_DIGITS = 6  # in a fold number


class TooFewPatients(DataError):
    """Fewer patients with a lesion than folds."""

    code = "too-few-patients"
    cure = "Ask for fewer folds, or add patients."


@dataclass(frozen=True, kw_only=True)
class Folds:
    """The fold of every sample. `fold_by_key` and the lists made from it are in the manifest's order."""

    fold_by_key: dict[str, int]

    @property
    def count(self) -> int:
        """Number of folds; they are numbered from 0."""
        return max(self.fold_by_key.values()) + 1

    def train(self, fold: int) -> list[str]:
        """Keys that train in `fold`. Raises: ConfigError for a fold that does not exist."""
        self._check(fold)
        return [key for key, held_out in self.fold_by_key.items() if held_out not in (fold, TUNE)]

    def validation(self, fold: int) -> list[str]:
        """Keys held out in `fold`. Raises: ConfigError for a fold that does not exist."""
        self._check(fold)
        return [key for key, held_out in self.fold_by_key.items() if held_out == fold]

    @property
    def tuning(self) -> list[str]:
        """Keys of a paper's own validation part, which neither train nor are scored; none in other folds."""
        return [key for key, part in self.fold_by_key.items() if part == TUNE]

    def _check(self, fold: int) -> None:
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < self.count:
            raise ConfigError(f"fold={fold} does not exist: there are {self.count} folds, 0 to {self.count - 1}.")


def make_folds(records: Sequence[Record], k: int = FOLDS, seed: int = 0) -> dict[str, int]:
    """Draw `k` folds, grouped by patient and stratified by label. The same records and seed give the same folds.

    Patients are dealt in random order, those with most scans first, each to the fold that is emptiest for the
    patient's labels. If every patient has one scan, label counts stay within one of an even share. Lesions are dealt
    first, as if there were no normal scans: those follow their patient, and patients with normal scans only come last.
    Raises: ConfigError for fewer than 2 folds; TooFewPatients for fewer with a lesion than folds.
    """
    if k < 2:
        raise ConfigError(f"k={k}: there must be at least 2 folds.")
    rng = np.random.default_rng(seed)
    held: list[Counter[str]] = [Counter() for _ in range(k)]
    fold_of: dict[str, int] = {}
    scans = _by_patient(record for record in records if record.label != "normal")
    if len(scans) < k:
        raise TooFewPatients(f"{len(scans)} patients cannot be divided into {k} folds: every fold needs at least one.")
    _deal(scans, held, fold_of, rng)
    normals = _by_patient(record for record in records if record.label == "normal")
    for patient in normals.keys() & fold_of.keys():
        held[fold_of[patient]]["normal"] += len(normals[patient])
    _deal({patient: normals[patient] for patient in normals.keys() - fold_of.keys()}, held, fold_of, rng)
    return {record.key: fold_of[record.patient] for record in records}


def _by_patient(records: t.Iterable[Record]) -> dict[str, list[Record]]:
    scans: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        scans[record.patient].append(record)
    return scans


def _deal(
    scans: dict[str, list[Record]], held: list[Counter[str]], fold_of: dict[str, int], rng: np.random.Generator
) -> None:
    """Assign each patient in `scans` a fold in `fold_of`, and add the scans to `held`, the label counts by fold."""
    counts = Counter(record.label for patient in scans.values() for record in patient)
    share = {label: count / len(held) for label, count in counts.items()}
    patients = sorted(scans)
    rng.shuffle(patients)
    rarest_first = {label: rank for rank, label in enumerate(sorted(sorted(share), key=lambda label: share[label]))}
    patients.sort(key=lambda patient: (-len(scans[patient]), min(rarest_first[r.label] for r in scans[patient])))
    for patient in patients:
        added = Counter(record.label for record in scans[patient])
        fold = min(range(len(held)), key=lambda fold: (*_crowding(held[fold], added, share), fold))
        held[fold] += added
        fold_of[patient] = fold


def _crowding(held: Counter[str], added: Counter[str], share: dict[str, float]) -> tuple[float, int]:
    """How full a fold is for the patient's labels, relative to an even share; then how full it is in total."""
    return sum(count * held[label] / share[label] for label, count in added.items()), held.total()


def write_folds(path: str | Path, records: Sequence[Record], fold_by_key: dict[str, int]) -> None:
    """Write a fold file atomically, in the order of `records`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        if record.key in fold_by_key:
            fold = fold_by_key[record.key]
            writer.writerow([record.key, record.patient, record.label, fold_word(fold)])
    write_atomically(Path(path), stream.getvalue())


def freeze_folds(path: str | Path, records: Sequence[Record], fold_by_key: dict[str, int]) -> None:
    """Like `write_folds`, but never replaces other folds. Raises: DataError if the file holds some."""
    path = Path(path)
    if path.exists() and read_fold_numbers(path) != fold_by_key:
        raise DataError(f"{path} holds other folds, which runs may have used. To draw new ones, move the file away.")
    write_folds(path, records, fold_by_key)


def refuse_synthetic(manifest: Manifest, folder: str | Path) -> None:
    """Call this before data are divided into folds. Raises: DataError for images of a trained generator."""
    if manifest.synthetic:
        raise DataError(
            f"{folder} holds synthetic images of a trained generator (card.yaml: synthetic: true). They have no folds, "
            "because models must be tested on real images. Set data=… to a real dataset, and data.synthetic=… to this "
            "folder to train on both."
        )


def find_folds(manifest: Manifest, folder: str | Path, source: str) -> Path:
    """The fold file next to the shards in `folder`, else the one that the project ships for the dataset.

    source: a key of FILE_BY_SOURCE. Raises: ConfigError for another source; DataError if there is no file,
    and for synthetic data, which have no folds.
    """
    refuse_synthetic(manifest, folder)
    if source not in FILE_BY_SOURCE:
        raise ConfigError(unknown_name("folds", source, FILE_BY_SOURCE))
    folder, name = Path(folder), FILE_BY_SOURCE[source]
    shipped = PROJECT_SHARDS / manifest.dataset / name
    if (folder / name).exists():
        return folder / name
    # A generated dataset can differ from one packing to the next, so shipped folds don't fit it.
    if shipped.exists() and not Card.find(manifest.dataset, folder).made_here:
        return shipped
    raise DataError(f"folds={source}: {folder} has no {name}. {_how_to_get(source, manifest, folder)}")


def _how_to_get(source: str, manifest: Manifest, folder: Path) -> str:
    card = Card.find(manifest.dataset, folder)
    if source in paper_splits.SOURCES:
        return f"This command draws it: bushpc shards folds data={folder} split={source}"
    if source == "grouped":
        return f"This command writes it: bushpc shards folds data={folder} duplicates=group"
    if source == "published" and FILE_BY_SOURCE["published"] not in card.folds:
        return (
            f"The authors of {card.title} published no folds. Use folds=frozen, or folds=grouped, which keeps near "
            "duplicates together."
        )
    if source == "published" and manifest.excerpt:
        return (
            "`bushpc pack` writes it from the publisher's own table or splits, and this excerpt was packed without "
            "them. Use folds=frozen, or add them to the raw folder and pack again."
        )
    patients = {record.patient for record in manifest.lesions}
    if source == "frozen" and len(patients) < FOLDS:
        return (
            f"Its {len(patients)} patients with a lesion are too few for {FOLDS} folds: it can be audited, predicted "
            "and used for an external test, but not cross-validated. Pack more patients."
        )
    src = "" if card.made_here else " src=FOLDER"
    return f"This command writes it: bushpc pack data={manifest.dataset}{src} out={folder}"


def ensure_folds(folder: str | Path, manifest: Manifest) -> Path | None:
    """The frozen fold file of a newly packed dataset, beside its shards in `folder`: what the project ships for it if
    that fits, else drawn with seed 0. None if it has fewer patients than folds.

    For a generated dataset, folds that do not fit are drawn again. Raises: DataError if the frozen folds of any
    other dataset do not fit.
    """
    made_here = Card.find(manifest.dataset, folder).made_here
    try:
        path = find_folds(manifest, folder, "frozen")
        load_folds(path, manifest.records, manifest.excerpt, normals=made_here)
        if path.parent.resolve() != Path(folder).resolve():
            path = Path(folder) / FILE_BY_SOURCE["frozen"]
            write_atomically(path, find_folds(manifest, folder, "frozen").read_bytes())
    except DataError as error:
        path = Path(folder) / FILE_BY_SOURCE["frozen"]
        if path.exists() and not made_here:
            raise DataError(
                f"{error}\nThe scans are packed. If the folds belong to another packing, such as of an excerpt, move "
                "the file away and run the same command again to draw new ones."
            ) from error
        try:
            folds = make_folds(manifest.records)
        except TooFewPatients:
            return None
        write_folds(path, manifest.records, folds)
    return path


def load_folds(path: str | Path, records: Sequence[Record], excerpt: bool = False, *, normals: bool = False) -> Folds:
    """Read a fold file and check it against all packed records.

    excerpt: only a part of the dataset is packed, so keys that are not packed are ignored.
    normals: include the normal scans; otherwise only lesions.
    Raises: DataError naming unknown, missing or repeated keys, changed patients or labels, patients in several folds,
    and normal scans that are needed but missing.
    """
    path = Path(path)
    by_key = {record.key: record for record in records}
    folds: dict[str, int] = {}
    problems: dict[str, list[str]] = defaultdict(list)
    for row, cells in _read_csv(path, COLUMNS):
        key = cells["key"]
        record = by_key.get(key)
        if key in folds:
            problems["keys in two rows"].append(f"{key} (again in row {row})")
        elif record is None:
            if not excerpt:
                problems["keys that no packed scan has"].append(f"{key} (row {row})")
        elif (record.patient, record.label) != (cells["patient"], cells["label"]):
            problems["patient or label differs from the packed one"].append(f"{key} (row {row})")
        folds[key] = _fold_number(path, row, cells["fold"])
    without = [key for key in by_key if key not in folds]
    normal = {key for key, record in by_key.items() if record.label == "normal"}
    single = TRAIN in folds.values()  # a paper's split, which may leave scans out
    problems["lesions without a fold"] = [] if single else [key for key in without if key not in normal]
    if not normal <= set(without):  # a file may leave out all normal scans, but leaving out some is a mistake
        problems["normal scans without a fold"] = [key for key in without if key in normal]
    held = {key: folds[key] for key in by_key if key in folds}
    problems["patients in more than one fold"] = _patients_in_several_folds(by_key, held)
    _raise_if_any(path, problems)
    if normals and normal & set(without):
        raise DataError(
            f"data.normals=true, but {path} contains lesions only and no fold of the {len(normal)} normal scans. Set "
            "folds=frozen (if this is the frozen file, move it away and run `bushpc pack` to draw one with all scans), "
            "or data.normals=false."
        )
    if not normals:
        held = {key: fold for key, fold in held.items() if key not in normal}
    numbers = sorted(set(held.values()) - WORDS.keys())
    if not held or numbers != list(range(len(numbers))):
        raise DataError(f"{path}: folds must be numbered 0, 1, 2 … without gaps; found {numbers}.")
    return Folds(fold_by_key=held)


def read_fold_numbers(path: str | Path) -> dict[str, int]:
    """Key → fold, without checking it against the records. Raises: DataError if it is not a fold file."""
    path = Path(path)
    return {cells["key"]: _fold_number(path, row, cells["fold"]) for row, cells in _read_csv(path, ("key", "fold"))}


def fold_word(fold: int) -> str:
    """A fold as its file has it: its number, or `train` or `tune`."""
    return WORDS.get(fold, str(fold))


def _read_csv(path: Path, columns: Sequence[str]) -> t.Iterator[tuple[int, dict[str, str]]]:
    """The rows of a fold file with their line numbers."""
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Packing the dataset draws its folds: bushpc pack data={path.parent.name}"
        )
    yield from csv_rows(path, columns)


def _fold_number(path: Path, row: int, text: str) -> int:
    for number, word in WORDS.items():
        if text == word:
            return number
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise DataError(f"{path}, row {row}: fold is '{text[:20]}'; it must be a whole number ≥ 0, or train or tune.")
    return int(text)


def _patients_in_several_folds(records: dict[str, Record], fold_by_key: dict[str, int]) -> list[str]:
    folds: dict[str, set[int]] = defaultdict(set)
    for key, fold in fold_by_key.items():
        if key in records:
            folds[records[key].patient].add(fold)
    return [
        f"{patient} (folds {', '.join(map(str, sorted(where)))})" for patient, where in folds.items() if len(where) > 1
    ]


def _raise_if_any(where: Path, problems: dict[str, list[str]]) -> None:
    found = {what: cases for what, cases in problems.items() if cases}
    if found:
        lines = [f"{what}: {first_of(cases, MOST_SHOWN)}" for what, cases in found.items()]
        raise DataError(f"{where} does not fit the packed dataset:\n  " + "\n  ".join(lines))
