"""What a cell's ledger must hold for `bushpc audit`: folds.csv and the cell's settings → the samples of an epoch."""

from __future__ import annotations

import csv
import typing as t
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bushpc.config.frozen import FrozenSettings
from bushpc.data.members import fold_members
from bushpc.data.mixture import open_synthetic
from bushpc.errors import ConfigError, DataError
from bushpc.files import sha256_of
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.run_record import RunRecord
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import Folds, read_fold_numbers

IN_NO_FOLD = -1


@dataclass(frozen=True)
class Scan:
    """A row of folds.csv."""

    key: str
    patient: str
    label: str
    fold: int


class Expected(t.NamedTuple):
    """draws: how often an epoch draws each key. others: what the other keys are, in words. batch_size: of all ranks."""

    draws: Counter[str]
    others: dict[str, str]
    batch_size: int


def read_scans(run: RunDir, record: RunRecord) -> list[Scan]:
    """The rows of the run's folds, of the samples that are packed."""
    path = run.folds
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            numbers = read_fold_numbers(path)
            scans = [Scan(row["key"], row["patient"], row["label"], numbers[row["key"]]) for row in rows]
        if sha256_of(path) != record.folds.sha256:
            raise DataError(f"{path} is not the one that the run was started with; restore it to audit the run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it to audit the run") from error
    if not record.excerpt:
        return scans
    packed = {scan.key for scan in Manifest.load(Path(record.shards)).records}
    return [scan for scan in scans if scan.key in packed]


def expected_of(cell_dir: CellDir, scans: list[Scan], fold: int) -> Expected:
    """What the ledger of a cell must hold, by its settings and the folds. Raises: DataError for a damaged config."""
    try:
        cell = FrozenSettings.load(cell_dir.config)
    except ConfigError as error:
        raise DataError(f"{error}: restore {cell_dir.config} to audit the run") from error
    synthetic: list[Scan] = []
    if cell.data.mixed:
        records = open_synthetic(str(cell.data.synthetic), fold, cell.data.synthetic_sha256).records(cell.data.normals)
        synthetic = [Scan(record.key, record.patient, record.label, IN_NO_FOLD) for record in records]
    folds = Folds(fold_by_key={scan.key: scan.fold for scan in scans})
    members = fold_members(scans, folds, fold, cell, synthetic)
    wanted = [scan for scan in scans if cell.data.normals or scan.label != "normal"]
    others = {scan.key: "a normal scan, which data.normals=false leaves out" for scan in scans}
    others |= {scan.key: "a real scan, which data.real=false leaves out" for scan in wanted}
    others |= {scan.key: "of the validation part" for scan in members.validation}
    others |= {scan.key: "held out of training for the schedule" for scan in members.holdout}
    others |= {scan.key: "a synthetic scan beyond data.synthetic_ratio" for scan in synthetic}
    return Expected(members.draws, others, cell.train.batch_size)
