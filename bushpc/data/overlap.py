"""Scans that a model was trained on already, counted: they may not validate or test what starts from it.

    trainings behind the weights, scans to be tested ─refuse_overlap→ what was compared, or an error with numbers

In one dataset scans are compared by key and patient, between datasets by their pixels as packed. Copies that were
re-encoded or cropped are for `bushpc shards audit data=A data=B`.
"""

from __future__ import annotations

import functools
import hashlib
import typing as t
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc.config import places
from bushpc.data.lineage import Training, same_data
from bushpc.errors import DataError
from bushpc.files import sha256_of
from bushpc.shards.manifest import Manifest, Record, read_image_png
from bushpc.shards.split import FILE_BY_SOURCE, read_fold_numbers

MOST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Tested:
    """Scans that a run tests its models on. title: such as `the validation part of fold 0`. folder: of their shards."""

    title: str
    manifest: Manifest
    folder: Path
    records: Sequence[Record]


def refuse_overlap(
    what: str, trainings: Iterable[Training], tested: Sequence[Tested], folders: Sequence[Path], folds: Sequence[Path]
) -> list[dict[str, t.Any]]:
    """What was compared with each training, for run.json. what: the subject of the message.

    folders: where the shards of the trainings may lie. folds: files with folds, besides those in the folders.
    Raises: DataError with the number of scans that were trained on.
    """
    compared = []
    for training in trainings:
        how = {_compare(what, training, each, folders, folds) for each in tested}
        compared.append({"data": training.get("data"), "fold": training["fold"], "compared": sorted(how)})
    return compared


def _compare(what: str, training: Training, tested: Tested, folders: Sequence[Path], folds: Sequence[Path]) -> str:
    if same_data(training, tested.manifest):
        how, seen = "keys and patients", _seen_in_same(training, tested, folds)
    else:
        found = _packed(training, [*folders, tested.folder.parent / str(training.get("data"))])
        if found is None:
            return "nothing: its shards are not here"
        how, seen = "pixels", _seen_elsewhere(training, tested, *found, folds)
    if seen:
        examples = ", ".join(record.key for record in seen[:MOST_SHOWN])
        name = training.get("data") or "generated scans"
        raise DataError(
            f"{what} was trained on {len(seen)} of the {len(tested.records)} scans of {tested.title} (in fold "
            f"{training['fold']} of {name}; {examples}{', …' if len(seen) > MOST_SHOWN else ''}), so they would test "
            "nothing. Start each fold from the same fold of the same folds, or from a run on other scans"
        )
    return how


def _seen_in_same(training: Training, tested: Tested, folds: Sequence[Path]) -> list[Record]:
    """The tested scans that trained, or whose patients have scans that trained. All, if the folds are unknown."""
    keys = _trained_keys(training, [record.key for record in tested.manifest.records], tested.folder, folds)
    if keys is None:
        return list(tested.records)
    patients = {record.patient for record in tested.manifest.records if record.key in keys}
    return [record for record in tested.records if record.key in keys or record.patient in patients]


def _seen_elsewhere(
    training: Training, tested: Tested, folder: Path, manifest: Manifest, folds: Sequence[Path]
) -> list[Record]:
    """The tested scans whose pixels are those of a scan that trained."""
    keys = _trained_keys(training, [record.key for record in manifest.records], folder, folds)
    theirs, ours = _pixels(folder, manifest.hash), _pixels(tested.folder, tested.manifest.hash)
    trained = {digest for key, digest in theirs.items() if keys is None or key in keys}
    return [record for record in tested.records if ours.get(record.key) in trained]


def _trained_keys(training: Training, keys: Sequence[str], folder: Path, folds: Sequence[Path]) -> set[str] | None:
    """The scans of a fold's training part; None if no file with these folds is here."""
    if training["fold"] is None:
        return set(keys)
    for path in (*folds, *(folder / name for name in FILE_BY_SOURCE.values())):
        if path.is_file() and sha256_of(path) == training["folds_sha256"]:
            numbers = read_fold_numbers(path)
            return {key for key, fold in numbers.items() if fold != training["fold"]}
    return None


def _packed(training: Training, folders: Sequence[Path]) -> tuple[Path, Manifest] | None:
    """The shards that a training used, where they are here."""
    name = training.get("data")
    for folder in (*folders, *([places.home() / "shards" / name] if name else [])):
        try:
            manifest = Manifest.load(folder)
        except DataError:
            continue
        if same_data(training, manifest):
            return folder, manifest
    return None


@functools.lru_cache(maxsize=8)
def _pixels(folder: Path, manifest_hash: str) -> dict[str, bytes]:
    """Key → digest of the image as packed; equal pixels make equal PNGs. Empty if the tars are elsewhere."""
    try:
        records = Manifest.load(folder).records
        return {record.key: hashlib.sha256(read_image_png(folder, record)).digest() for record in records}
    except DataError:  # they are streamed from elsewhere
        return {}
