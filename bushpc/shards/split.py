"""Folds: which samples train and which validate, frozen into a file before any training.

    records ─make_folds→ folds.csv ─load_folds→ Folds → the loader        (or imported from published CSVs)
    records whose patients `duplicates.tie_patients` tied ─make_folds→ folds_grouped.csv, where copies share a fold

A fold file has the columns key, patient, label, fold: `fold` is the one fold whose validation part holds the
sample; the sample trains in all the others. With five folds that is the paper's 80 to 20. Normal scans are in our
own folds too, and take part where `data.normals` asks for them; published folds may hold lesions alone.
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

from bushpc.errors import ConfigError, DataError, unknown_name
from bushpc.files import write_atomically
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.raw import csv_rows

FILE_BY_SOURCE = {"frozen": "folds.csv", "published": "folds_published.csv", "grouped": "folds_grouped.csv"}
COLUMNS = ("key", "patient", "label", "fold")
MOST_SHOWN = 8
# Of a fold's number.
MOST_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Folds:
    """Every sample's fold. `fold_by_key` is in the manifest's order, and so are the lists made from it."""

    fold_by_key: dict[str, int]

    @property
    def count(self) -> int:
        """How many folds there are, numbered from 0."""
        return max(self.fold_by_key.values()) + 1

    def train(self, fold: int) -> list[str]:
        """Keys that train in `fold`. Raises: ConfigError for a fold that does not exist."""
        self._check(fold)
        return [key for key, held_out in self.fold_by_key.items() if held_out != fold]

    def validation(self, fold: int) -> list[str]:
        """Keys held out in `fold`. Raises: ConfigError for a fold that does not exist."""
        self._check(fold)
        return [key for key, held_out in self.fold_by_key.items() if held_out == fold]

    def _check(self, fold: int) -> None:
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < self.count:
            raise ConfigError(f"fold={fold} does not exist: there are {self.count} folds, 0 to {self.count - 1}.")


def make_folds(records: Sequence[Record], k: int = 5, seed: int = 0) -> dict[str, int]:
    """Draw `k` folds: patients never divided, labels spread evenly. The same records and seed give the same folds.

    Patients are dealt in random order, those with most scans first, each to the fold that is then nearest to an
    even share of every label. Labels stay within one scan of even where each patient has one scan. Lesions are dealt
    as if there were no normal scans: those follow their patient, and patients who have no others are dealt last.
    Raises: ConfigError for fewer than 2 folds; DataError for fewer patients with a lesion than folds.
    """
    if k < 2:
        raise ConfigError(f"k={k}: at least 2 folds are needed.")
    rng = np.random.default_rng(seed)
    held: list[Counter[str]] = [Counter() for _ in range(k)]
    fold_of: dict[str, int] = {}
    scans = _by_patient(record for record in records if record.label != "normal")
    if len(scans) < k:
        raise DataError(f"{len(scans)} patients cannot be divided into {k} folds: each needs a patient of its own.")
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
    """Give each patient of `scans` a fold in `fold_of`, and count in `held` what the folds then hold by label."""
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
    """How full a fold is of the labels that a patient brings, against an even share; then how full it is at all."""
    return sum(count * held[label] / share[label] for label, count in added.items()), held.total()


def write_folds(path: str | Path, records: Sequence[Record], fold_by_key: dict[str, int]) -> None:
    """Freeze folds into a file, in the order of `records`; written whole or not at all."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        if record.key in fold_by_key:
            writer.writerow([record.key, record.patient, record.label, fold_by_key[record.key]])
    write_atomically(Path(path), stream.getvalue())


def freeze_folds(path: str | Path, records: Sequence[Record], fold_by_key: dict[str, int]) -> None:
    """As `write_folds`, unless other folds are frozen there. Raises: DataError for those."""
    path = Path(path)
    if path.exists() and read_fold_numbers(path) != fold_by_key:
        raise DataError(f"{path} holds other folds, which runs may have used. Move it away to have new ones drawn.")
    write_folds(path, records, fold_by_key)


def refuse_synthetic(manifest: Manifest, folder: str | Path) -> None:
    """Called wherever data would be divided into folds. Raises: DataError for a trained generator's images."""
    if manifest.synthetic:
        raise DataError(
            f"{folder} holds synthetic images of a trained generator (card.yaml: synthetic: true). They have no folds: "
            "what is learnt would be tested on what was made up. Give a real dataset as data=…, and this folder as "
            "data.synthetic=… to train on it besides."
        )


def find_folds(manifest: Manifest, folder: str | Path, source: str) -> Path:
    """The fold file beside the shards in `folder`, else the one that the project ships for the dataset.

    source: `frozen`, `published` or `grouped`. Raises: ConfigError for another source; DataError when there is no file,
    and for synthetic data, which have no folds.
    """
    refuse_synthetic(manifest, folder)
    if source not in FILE_BY_SOURCE:
        raise ConfigError(unknown_name("folds", source, FILE_BY_SOURCE))
    folder, name = Path(folder), FILE_BY_SOURCE[source]
    shipped = PROJECT_SHARDS / manifest.dataset / name
    if (folder / name).exists():
        return folder / name
    if (
        shipped.exists() and not Card.find(manifest.dataset, folder).made_here
    ):  # those differ from one packing to another
        return shipped
    raise DataError(
        f"folds={source}: no {name} in {folder}, and the project ships none for {manifest.dataset}. "
        "`bushpc pack` makes folds.csv, `bushpc shards folds data=… duplicates=group` makes folds_grouped.csv; "
        "folds_published.csv exists only where a paper's authors published theirs."
    )


def ensure_folds(folder: str | Path, manifest: Manifest) -> Path:
    """The frozen fold file of a freshly packed dataset, drawn with seed 0 into `folder` where there is none.

    Folds of a dataset that is made here are drawn again when they are of another packing. Raises: DataError for
    frozen folds of any other that do not fit it.
    """
    made_here = Card.find(manifest.dataset, folder).made_here
    try:
        path = find_folds(manifest, folder, "frozen")
        load_folds(path, manifest.records, manifest.excerpt, normals=made_here)
    except DataError as error:
        path = Path(folder) / FILE_BY_SOURCE["frozen"]
        if path.exists() and not made_here:
            raise DataError(
                f"{error}\nThe scans are packed. If the folds are of another packing, such as of an excerpt, move the "
                "file away and run the same command again: new ones are drawn."
            ) from error
        write_folds(path, manifest.records, make_folds(manifest.records))
    return path


def load_folds(path: str | Path, records: Sequence[Record], excerpt: bool = False, *, normals: bool = False) -> Folds:
    """Read a fold file and hold it against the packed records, all of them.

    excerpt: only a part of the dataset is packed: keys of the file that are not packed are left out.
    normals: whether the folds hold the normal scans too; only the lesions otherwise.
    Raises: DataError naming unknown, missing or repeated keys, changed patients or labels, every patient that is in
    two folds, and normal scans that are asked for and not there.
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
    problems["lesions without a fold"] = [key for key in without if key not in normal]
    if not normal <= set(without):  # none of them is a file's right, some of them a mistake
        problems["normal scans without a fold"] = [key for key in without if key in normal]
    held = {key: folds[key] for key in by_key if key in folds}
    problems["patients in more than one fold"] = _straddling(by_key, held)
    _refuse(path, problems)
    if normals and normal & set(without):
        raise DataError(
            f"data.normals=true: {path} holds lesions alone, and no fold of the {len(normal)} normal scans. Take "
            "folds=frozen (if it is that one: move it away, and `bushpc pack` draws one with all scans), or "
            "data.normals=false."
        )
    if not normals:
        held = {key: fold for key, fold in held.items() if key not in normal}
    numbers = sorted(set(held.values()))
    if not held or numbers != list(range(len(numbers))):
        raise DataError(f"{path}: folds must be numbered 0, 1, 2 … without a gap; found {numbers}.")
    return Folds(fold_by_key=held)


def read_fold_numbers(path: str | Path) -> dict[str, int]:
    """Key → fold as a fold file says it, fitting any records or not. Raises: DataError if it is no fold file."""
    path = Path(path)
    return {cells["key"]: _fold_number(path, row, cells["fold"]) for row, cells in _read_csv(path, ("key", "fold"))}


def import_published(folder: str | Path, records: Sequence[Record]) -> dict[str, int]:
    """Folds from XBusNet's published train_fold<N>.csv and val_fold<N>.csv, whose first column is `Image Name`.

    Raises: DataError if training and validation overlap, validation parts do not divide the lesions among
    themselves, or a training part is not all the rest.
    """
    folder = Path(folder)
    count = len(list(folder.glob("val_fold*.csv")))
    if not count:
        raise DataError(f"{folder} holds no val_fold0.csv: the folder with the published fold CSVs is needed.")
    lesions = [record for record in records if record.label != "normal"]
    problems: dict[str, list[str]] = defaultdict(list)
    fold_by_key: dict[str, int] = {}
    for fold in range(count):
        parts = {name: _image_keys(folder / f"{name}_fold{fold}.csv") for name in ("train", "val")}
        leaking = sorted(set(parts["train"]) & set(parts["val"]))
        problems["in training and validation of one fold"] += [f"{key} (fold {fold})" for key in leaking]
        for key in parts["val"]:
            if fold_by_key.setdefault(key, fold) != fold:
                problems["in two validation parts"].append(f"{key} (folds {fold_by_key[key]} and {fold})")
        for record in lesions:
            if record.key not in parts["train"] and record.key not in parts["val"]:
                problems["in neither part of a fold"].append(f"{record.key} (fold {fold})")
    known = {record.key: record for record in lesions}
    problems["keys that no packed lesion has"] = [key for key in fold_by_key if key not in known]
    problems["lesions in no validation part"] = [key for key in known if key not in fold_by_key]
    problems["patients in more than one fold"] = _straddling(known, fold_by_key)
    _refuse(folder, problems)
    return {record.key: fold_by_key[record.key] for record in lesions}


def _image_keys(path: Path) -> list[str]:
    return [cells["Image Name"].removesuffix(".png") for _, cells in _read_csv(path, ("Image Name",))]


def _read_csv(path: Path, columns: Sequence[str]) -> t.Iterator[tuple[int, dict[str, str]]]:
    """The rows of a fold file, each with its line number in an editor."""
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Pack the dataset to have its folds made: bushpc pack data={path.parent.name}"
        )
    yield from csv_rows(path, columns)


def _fold_number(path: Path, row: int, text: str) -> int:
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise DataError(f"{path}, row {row}: fold is '{text[:20]}'; a whole number from 0 on is needed.")
    return int(text)


def _straddling(records: dict[str, Record], fold_by_key: dict[str, int]) -> list[str]:
    folds: dict[str, set[int]] = defaultdict(set)
    for key, fold in fold_by_key.items():
        if key in records:
            folds[records[key].patient].add(fold)
    return [
        f"{patient} (folds {', '.join(map(str, sorted(where)))})" for patient, where in folds.items() if len(where) > 1
    ]


def _refuse(where: Path, problems: dict[str, list[str]]) -> None:
    found = {what: cases for what, cases in problems.items() if cases}
    if found:
        lines = [
            f"{what}: {', '.join(cases[:MOST_SHOWN])}"
            + (f" and {len(cases) - MOST_SHOWN} more" if len(cases) > MOST_SHOWN else "")
            for what, cases in found.items()
        ]
        raise DataError(f"{where} does not fit the packed dataset:\n  " + "\n  ".join(lines))
