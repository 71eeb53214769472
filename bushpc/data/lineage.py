"""The lineage of a model: all data that it and its starting weights were trained on, so that tests use unseen scans.

    cell ─trained_on→ run.json → export.json, generate.json ─refuse_seen, same_data→ what may train or test

This module does not import torch: the login node uses it.
"""

from __future__ import annotations

import typing as t
from collections.abc import Iterable, Mapping
from pathlib import Path

from bushpc.config import CellConfig, DataConfig, WeightFile
from bushpc.errors import DataError
from bushpc.files import EXPORT_FILE, read_json
from bushpc.runs.run_record import RunRecord
from bushpc.shards.card import Card
from bushpc.shards.licences import STARTED_FROM, DataLicence, of_card, of_name
from bushpc.shards.manifest import Manifest

# Written by `bushpc generate` next to its shards.
GENERATED = "generate.json"

Training = dict[str, t.Any]


def training(manifest: Manifest, folder: Path, folds_sha256: str, fold: int) -> Training:
    """A training on one fold's training part. data: None for a generated dataset, as another seed gives other scans."""
    return {
        "data": None if Card.find(manifest.dataset, folder).made_here else manifest.dataset,
        "manifest_sha256": manifest.hash,
        "folds_sha256": folds_sha256,
        "fold": fold,
    }


def trained_on(
    cell: CellConfig, manifest: Manifest, folds_sha256: str, generator: Iterable[Training] | None = None
) -> list[Training]:
    """All trainings behind the cell's weights: its own (synthetic scans included), its base model's, and those of the
    generator of the synthetic scans.

    generator: what trained that, where its scans are yet to be made; None reads it from their folder.
    Staged weights, and a base that `bushpc export` did not write, are left out because their training is unknown.
    """
    assert cell.fold is not None, "dispatch gives every cell its fold"
    base = cell.model.starts_from
    added = _of_synthetic(cell.data) if generator is None and cell.data.mixed else generator or []
    return distinct(
        [
            training(manifest, cell.data.folder, folds_sha256, cell.fold),
            *(of_exported(base) if base else []),
            *(added if cell.data.mixed else []),
        ]
    )


def _of_synthetic(data: DataConfig) -> list[Training]:
    scans = {"data": None, "manifest_sha256": data.synthetic_sha256, "folds_sha256": None, "fold": None}
    return [scans, *of_generated(Path(str(data.synthetic)))]


def of_cell(run: RunRecord, name: str) -> list[Training]:
    """The trainings behind a cell, from its run.json. Older runs record none and have only their own."""
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
    """The trainings behind a fold's folder of an export; none if `bushpc export` did not write it."""
    folds = (read_json(folder.parent / EXPORT_FILE) or {}).get("folds", [])
    return [each for fold in folds if fold["name"] == folder.name for each in fold["trained_on"]]


def of_generated(folder: Path) -> list[Training]:
    """The trainings behind the generator of the images in `folder`. Raises: DataError if they are unknown."""
    noted = read_json(folder / GENERATED)
    if noted is None or not noted.get("trained_on"):
        raise DataError(
            f"{folder} has no {GENERATED} that states what the generator of its images was trained on, so it is "
            "unknown which scans they may reproduce. `bushpc generate` writes it next to the shards: copy it with them"
        )
    found: list[Training] = noted["trained_on"]
    return found


def licences(cell: CellConfig, trainings: Iterable[Training]) -> list[DataLicence]:
    """The licences of all data behind a cell's weights, each dataset once.

    That is: its own data, its synthetic scans, what trained their generator, and what trained its base model.
    """
    data = cell.data
    found = of_card(Card.find(data.name, data.folder), "trained on" if data.real else "validated on")
    if data.mixed:
        found += _of_synthetic_card(Path(str(data.synthetic)))
    if cell.model.starts_from:
        recorded = (read_json(cell.model.starts_from.parent / EXPORT_FILE) or {}).get("licences", [])
        found += [DataLicence(**each)._replace(role="trained the model that it started from") for each in recorded]
    for each in trainings:
        if each["data"] is not None:
            found += of_name(each["data"], data.folder.parent, "trained an earlier model: its base or a generator")
    by_name: dict[str, DataLicence] = {}
    for licence in found:
        by_name.setdefault(licence.data, licence)
    return list(by_name.values())


def licences_of_start(note: Mapping[str, t.Any] | None) -> list[DataLicence]:
    """The licences of imported weights (`CellRecord.started_from`), and of the data that bushpc knows behind them."""
    if note is None or "imported_sha256" not in note:  # a run: its data are among the trainings
        return []
    title = f"{note['name']} {note['version']}".strip()
    own = DataLicence(note["name"], title, note["licence"] or "none stated", note["where"], STARTED_FROM)
    return [own, *(DataLicence(**each) for each in note["licences"])]


def licences_of_pulled(files: Iterable[WeightFile]) -> list[DataLicence]:
    """The licences of published weights, as the library states them that names the files."""
    return [
        DataLicence(
            file.hub_repo,
            file.hub_repo,
            file.licence or "none stated",
            f"https://huggingface.co/{file.hub_repo}",
            STARTED_FROM,
        )
        for file in files
    ]


def _of_synthetic_card(folder: Path) -> list[DataLicence]:
    role = "synthetic scans, trained on"
    try:
        return of_card(Card.load(folder), role)
    except DataError:
        return [DataLicence("synthetic", "Synthetic scans", "not known here: their folder is gone", "", role)]


def distinct(trainings: Iterable[Training]) -> list[Training]:
    """The trainings without repetitions, in their order."""
    found: list[Training] = []
    for each in trainings:
        if each not in found:
            found.append(each)
    return found


def same_data(trained: Mapping[str, t.Any], manifest: Manifest) -> bool:
    """Whether a training used this dataset, even if packed differently."""
    return trained["manifest_sha256"] == manifest.hash or trained.get("data") == manifest.dataset


def refuse_seen(
    what: str, trainings: Iterable[Training], manifest: Manifest, folds_sha256: str, fold: int, advice: str
) -> None:
    """Raises: DataError if one of the trainings used scans that validate this fold of this dataset.

    what: the subject of the message, which has these trainings. advice: what to do.
    """
    for each in trainings:
        if same_data(each, manifest) and (each["folds_sha256"], each["fold"]) != (folds_sha256, fold):
            others = " of other folds" if each["folds_sha256"] != folds_sha256 else ""
            raise DataError(
                f"{what} was trained on scans of fold {fold}'s validation part, in fold {each['fold']}{others}. "
                f"{advice}, or train only fold={each['fold']}"
            )
