"""Scans that a model was trained on already, counted: they may not validate or test what starts from it.

    trainings behind the weights, scans to be tested ─refuse_overlap→ an error with numbers, or warnings

In one dataset scans are compared by key and patient, between datasets by their pixels as packed. Copies that were
re-encoded or cropped are for `bushpc shards audit data=A data=B`.
"""

from __future__ import annotations

import functools
import hashlib
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
) -> list[str]:
    """Warnings of what could not be compared. what: the subject of the message.

    folders: where the shards of the trainings may lie. folds: files with folds, besides those in the folders.
    Raises: DataError with the number of scans that were trained on.
    """
    found = [_compare(what, training, each, folders, folds) for training in trainings for each in tested]
    return [warning for warning in found if warning]


def _compare(what: str, training: Training, tested: Tested, folders: Sequence[Path], folds: Sequence[Path]) -> str:
    """The warning, or "" if they were compared."""
    name = training.get("data") or "generated scans"
    if same_data(training, tested.manifest):
        seen: list[Record] | None = _seen_in_same(training, tested, folds)
    else:
        seen = _seen_elsewhere(training, tested, folders, folds)
    if seen is None:
        return (
            f"{tested.manifest.dataset} was not compared with {name}, on which the weights to start from were trained: "
            "pixels can only be compared where the shards of both are. Scans in both would test nothing"
        )
    if seen:
        examples = ", ".join(record.key for record in seen[:MOST_SHOWN])
        raise DataError(
            f"{what} was trained on {len(seen)} of the {len(tested.records)} scans of {tested.title} (in fold "
            f"{training['fold']} of {name}; {examples}{', …' if len(seen) > MOST_SHOWN else ''}), so they would test "
            "nothing. Start each fold from the same fold of the same folds, or from a run on other scans"
        )
    return ""


def _seen_in_same(training: Training, tested: Tested, folds: Sequence[Path]) -> list[Record]:
    """The tested scans that trained, or whose patients have scans that trained. All, if the folds are unknown."""
    keys = _trained_keys(training, [record.key for record in tested.manifest.records], tested.folder, folds)
    if keys is None:
        return list(tested.records)
    patients = {record.patient for record in tested.manifest.records if record.key in keys}
    return [record for record in tested.records if record.key in keys or record.patient in patients]


def _seen_elsewhere(
    training: Training, tested: Tested, folders: Sequence[Path], folds: Sequence[Path]
) -> list[Record] | None:
    """The tested scans whose pixels are those of a scan that trained; None if the shards of one are not here."""
    found = _packed(training, folders, tested.folder.parent)
    if found is None:
        return None
    folder, manifest = found
    theirs, ours = _pixels(folder, manifest.hash), _pixels(tested.folder, tested.manifest.hash)
    if theirs is None or ours is None:
        return None
    keys = _trained_keys(training, [record.key for record in manifest.records], folder, folds)
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


def _packed(training: Training, folders: Sequence[Path], beside: Path) -> tuple[Path, Manifest] | None:
    """The shards that a training used, where they are here: in `folders`, below `beside` or at home."""
    name = training.get("data")
    for folder in (*folders, *([beside / name, places.home() / "shards" / name] if name else [])):
        try:
            manifest = Manifest.load(folder)
        except DataError:
            continue
        if same_data(training, manifest):
            return folder, manifest
    return None


@functools.lru_cache(maxsize=8)
def _pixels(folder: Path, manifest_hash: str) -> dict[str, bytes] | None:
    """Key → digest of the image as packed; equal pixels make equal PNGs. None if the tars are elsewhere."""
    try:
        records = Manifest.load(folder).records
        return {record.key: hashlib.sha256(read_image_png(folder, record)).digest() for record in records}
    except DataError:  # they are streamed from elsewhere
        return None
