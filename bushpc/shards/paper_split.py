"""A paper's single split: records ─draw_split→ train, tune and test parts, frozen beside the shards as fold 0.

The fold file has the word `train` or `tune` where others have a fold's number, so fold 0 is the only one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bushpc.config.paper_splits import SPLITS, PaperSplit, split_of
from bushpc.errors import ConfigError, DataError
from bushpc.files import why_not_writable
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.split import FILE_BY_SOURCE, TRAIN, TUNE, freeze_folds, refuse_synthetic

TEST = 0
PARTS = (TRAIN, TUNE, TEST)


def ensure_split(manifest: Manifest, folder: Path, source: str, *, normals: bool) -> None:
    """Draw and freeze the split that `folds=source` names, unless it is there; nothing for other folds.

    normals: `data.normals`. Raises: ConfigError for a dataset that the paper does not split, and without the normal
    scans that it counts; DataError if the dataset has fewer scans, or its folder cannot be written.
    """
    split = split_of(source, manifest.dataset)
    if split is None:
        return
    refuse_synthetic(manifest, folder)
    if split.counts and split.normals and not normals:
        raise ConfigError(
            f"folds={source}: {split.printed} of {manifest.dataset} include its normal scans. Set data.normals=true, "
            "or take folds=frozen for lesions alone"
        )
    path = folder / FILE_BY_SOURCE[source]
    if path.exists():
        return
    drawn = draw_split(manifest.records, split)
    if reason := why_not_writable(folder):
        raise DataError(
            f"folds={source}: the split is to be frozen in {path}. {reason}. Ask its owner to run: bushpc shards folds "
            f"data={folder} split={source}"
        )
    freeze_folds(path, manifest.records, drawn)


def draw_split(records: Sequence[Record], split: PaperSplit, seed: int = 0) -> dict[str, int]:
    """Key → TRAIN, TUNE or 0 (test). The same records and seed give the same split.

    Stratified by label; no patient is divided. With one scan per patient the parts have exactly the paper's sizes,
    otherwise the nearest that whole patients allow. Raises: DataError if the split is larger than the dataset.
    """
    scans = [record for record in records if split.normals or record.label != "normal"]
    _refuse_larger(scans, split)
    room = _room(scans, split)
    patients: dict[str, list[Record]] = defaultdict(list)
    for record in scans:
        patients[record.patient].append(record)
    names = sorted(patients)
    np.random.default_rng(seed).shuffle(names)
    names.sort(key=lambda name: -len(patients[name]))  # large ones first, while every part has room
    part_of: dict[str, int] = {}
    taken: dict[int, Counter[str]] = {part: Counter() for part in room}
    for name in names:
        added = Counter(record.label for record in patients[name])
        shares = {part: _share_left(room[part], taken[part], added) for part in room}
        part = max(room, key=lambda part: (shares[part], -PARTS.index(part)))
        if split.counts and shares[part] <= 0:  # the dataset has more scans than the paper counts
            continue
        taken[part] += added
        part_of[name] = part
    return {record.key: part_of[record.patient] for record in scans if record.patient in part_of}


def _share_left(room: Counter[str], taken: Counter[str], added: Counter[str]) -> float:
    """What is left of a part's room for these labels, as a share; lowest where one of them has none."""
    return min((room[label] - taken[label]) / room[label] if room[label] else -1.0 for label in added)


def _room(scans: Sequence[Record], split: PaperSplit) -> dict[int, Counter[str]]:
    """Part → scans of each label, in proportion to the dataset's. Sums are the paper's exactly."""
    of_label = Counter(record.label for record in scans)
    labels, total = sorted(of_label), len(scans)
    if split.counts is None:
        assert split.test_share is not None, "one of the two is set"
        test = Counter({label: round(split.test_share * of_label[label]) for label in labels})
        return {TRAIN: of_label - test, TEST: test}
    sizes = {part: size for part, size in zip(PARTS, split.counts, strict=True) if size}
    left, room = Counter(of_label), {}
    for part in sorted(sizes, key=lambda part: sizes[part])[:-1]:
        room[part] = _proportional(of_label, sizes[part], total)
        left -= room[part]
    largest = next(part for part in sizes if part not in room)
    # The dataset may have more scans than the paper counts; these are in no part.
    room[largest] = left if left.total() == sizes[largest] else _proportional(of_label, sizes[largest], total)
    return room


def _proportional(of_label: Counter[str], size: int, total: int) -> Counter[str]:
    """`size` scans over the labels by their shares, largest remainders first."""
    exact = {label: size * count / total for label, count in of_label.items()}
    whole = Counter({label: int(share) for label, share in exact.items()})
    by_remainder = sorted(exact, key=lambda label: (whole[label] - exact[label], label))
    whole.update(by_remainder[: size - whole.total()])
    return whole


def _refuse_larger(scans: Sequence[Record], split: PaperSplit) -> None:
    if split.total is None or split.total <= len(scans):
        return
    others = [
        f"folds={other.source} ({other.printed})"
        for other in SPLITS
        if other.data == split.data and other.total and other.total <= len(scans)
    ]
    raise DataError(
        f"folds={split.source}: the {split.paper} divides {split.data} into {split.printed}, {split.total} in all, and "
        f"{len(scans)} {'scans' if split.normals else 'scans with a lesion'} are packed. What would work: "
        f"{', '.join([*others, 'folds=frozen'])}"
    )
