"""What a model has learnt from, through all that it started from: nobody is judged on scans that it remembers.

    cell ─trained_on→ run.json → export.json, generate.json ─refuse_seen, same_data→ what may train or test

No torch: the login node asks.
"""

from __future__ import annotations

import typing as t
from collections.abc import Iterable, Mapping
from pathlib import Path

from bushpc.config import CellConfig, DataConfig
from bushpc.errors import DataError
from bushpc.files import EXPORT_FILE, read_json
from bushpc.runs.records import RunRecord
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest

# Beside the shards that `bushpc generate` wrote.
GENERATED = "generate.json"

Training = dict[str, t.Any]


def training(manifest: Manifest, folder: Path, folds_sha256: str, fold: int) -> Training:
    """A training on one fold's training part. data: null for what is made here, of which another seed makes others."""
    return {
        "data": None if Card.find(manifest.dataset, folder).made_here else manifest.dataset,
        "manifest_sha256": manifest.hash,
        "folds_sha256": folds_sha256,
        "fold": fold,
    }


def trained_on(cell: CellConfig, manifest: Manifest, folds_sha256: str) -> list[Training]:
    """Every training that the cell's weights come from: its own, also on synthetic scans, those of its base, and those
    of whatever made the synthetic scans.

    Weights that are staged, and a base that `bushpc export` did not write, are left out: nobody knows theirs.
    """
    assert cell.fold is not None, "dispatch gives every cell its fold"
    base = cell.model.starts_from
    return distinct(
        [
            training(manifest, cell.data.folder, folds_sha256, cell.fold),
            *(of_exported(base) if base else []),
            *(_of_synthetic(cell.data) if cell.data.mixed else []),
        ]
    )


def _of_synthetic(data: DataConfig) -> list[Training]:
    scans = {"data": None, "manifest_sha256": data.synthetic_sha256, "folds_sha256": None, "fold": None}
    return [scans, *of_generated(Path(str(data.synthetic)))]


def of_cell(run: RunRecord, name: str) -> list[Training]:
    """Of a cell, as its run.json has it; of older runs, which started from nothing that was trained here, its own."""
    cell = run.cell(name)
    if cell.trained_on is not None:
        return cell.trained_on
    return [
        {
            "data": run.data,
            "manifest_sha256": run.manifest_sha256,
            "folds_sha256": run.folds.sha256,
            "fold": cell.fold,
        }
    ]


def of_exported(folder: Path) -> list[Training]:
    """Of a fold's folder of an export; none where `bushpc export` did not write it."""
    folds = (read_json(folder.parent / EXPORT_FILE) or {}).get("folds", [])
    return [each for fold in folds if fold["name"] == folder.name for each in fold["trained_on"]]


def of_generated(folder: Path) -> list[Training]:
    """Of all that made the images in `folder`. Raises: DataError where that is not known."""
    noted = read_json(folder / GENERATED)
    if noted is None or not noted.get("trained_on"):
        raise DataError(
            f"{folder} has no {GENERATED} that says what the generator of its images was trained on, so nobody knows "
            f"which scans it remembers. `bushpc generate` writes it beside the shards: copy it along with them"
        )
    found: list[Training] = noted["trained_on"]
    return found


def distinct(trainings: Iterable[Training]) -> list[Training]:
    """Each once, in the order in which they come."""
    found: list[Training] = []
    for each in trainings:
        if each not in found:
            found.append(each)
    return found


def same_data(trained: Mapping[str, t.Any], manifest: Manifest) -> bool:
    """Whether a training was on this dataset, be it packed in another way."""
    return trained["manifest_sha256"] == manifest.hash or trained.get("data") == manifest.dataset


def refuse_seen(
    what: str, trainings: Iterable[Training], manifest: Manifest, folds_sha256: str, fold: int, way_on: str
) -> None:
    """Raises: DataError where one of them was on scans that this fold of this dataset is validated on.

    what: comes from these trainings. way_on: what to do then.
    """
    for each in trainings:
        if same_data(each, manifest) and (each["folds_sha256"], each["fold"]) != (folds_sha256, fold):
            others = " of other folds" if each["folds_sha256"] != folds_sha256 else ""
            raise DataError(
                f"{what} has learnt from scans of fold {fold}'s validation part: it was trained in fold "
                f"{each['fold']}{others}. {way_on}, or train fold={each['fold']} alone"
            )
