"""Who trains, tunes and validates in a fold, and how often each sample is drawn.

    folds ─fold_members→ validation part; tuning part (learning rate, early stop); training part, with synthetic scans
    and the draws of an epoch

Needs key, patient and label only, and no torch: the plan counts steps with it on the login node, the loader draws
batches from it, and `bushpc audit` checks ledgers against it.
"""

from __future__ import annotations

import math
import typing as t
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bushpc.errors import ConfigError, DataError
from bushpc.sample import LabelledScan
from bushpc.shards.split import Folds

if t.TYPE_CHECKING:
    from bushpc.config import DataConfig, TrainConfig


AnyScan = t.TypeVar("AnyScan", bound=LabelledScan)


class CellSettings(t.Protocol):
    """The settings of a cell that are read here; CellConfig and FrozenSettings both have them."""

    @property
    def seed(self) -> int: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def train(self) -> TrainConfig: ...


@dataclass(frozen=True, kw_only=True)
class Members(t.Generic[AnyScan]):
    """The parts of a fold. repeats: how often an epoch draws each of `train`. holdout: of the real training scans,
    held out for the schedule; of a paper's split its own validation part.
    """

    train: list[AnyScan]
    repeats: list[int]
    holdout: list[AnyScan]
    validation: list[AnyScan]

    @property
    def draws(self) -> Counter[str]:
        """How often an epoch draws each key."""
        return Counter({scan.key: times for scan, times in zip(self.train, self.repeats, strict=True)})

    def steps(self, config: TrainConfig) -> int:
        """Optimiser steps of `train.epochs` passes over what trains; `train.iterations` if that is null."""
        return steps_of(config, sum(self.repeats))


def steps_of(config: TrainConfig, draws: int) -> int:
    """Optimiser steps of `train.epochs` passes of so many draws; `train.iterations` if that is null."""
    if config.epochs is None:
        return config.iterations
    return math.ceil(config.epochs * draws / config.batch_size)


def hold_out(scans: Sequence[AnyScan], share: float, seed: int) -> tuple[list[AnyScan], list[AnyScan]]:
    """(the rest, the tuning part): about `share` of the scans of every label, drawn by `seed`; no patient is divided.

    The patients of each label, by their first scan, come in a random order until the share is reached. At least one
    patient of a label is left to train on.
    """
    patients: dict[str, dict[str, list[AnyScan]]] = defaultdict(lambda: defaultdict(list))
    label_of: dict[str, str] = {}
    for scan in sorted(scans, key=lambda scan: scan.key):
        label = label_of.setdefault(scan.patient, scan.label)
        patients[label][scan.patient].append(scan)
    held: set[str] = set()
    for label in sorted(patients):
        names = sorted(patients[label])
        np.random.default_rng(seed).shuffle(names)
        wanted, count = share * sum(map(len, patients[label].values())), 0
        for name in names[:-1]:
            if count + len(patients[label][name]) / 2 > wanted:
                break
            held.add(name)
            count += len(patients[label][name])
    return [s for s in scans if s.patient not in held], [s for s in scans if s.patient in held]


def mix(real: Sequence[AnyScan], synthetic: Sequence[AnyScan], ratio: float, keep_real: bool) -> list[AnyScan]:
    """The training scans: the real ones, unless data.real=false, and `ratio` synthetic ones for each real one.

    The number of synthetic scans is the same with and without the real ones. Raises: DataError if there are too few of
    them, or the ratio selects none.
    """
    wanted = round(ratio * len(real))
    if not 1 <= wanted <= len(synthetic):
        raise DataError(
            f"data.synthetic_ratio={ratio:g} with {len(real)} real training scans comes to {wanted} synthetic ones, "
            f"and data.synthetic has {len(synthetic)}. Generate at least {max(wanted, 1)} (`bushpc generate RUN "
            f"n={max(wanted, 1)}`; in a grid that generates them, synthesis.n={max(wanted, 1)}), or set another ratio"
        )
    return [*(real if keep_real else ()), *synthetic[:wanted]]


def repeats(scans: Sequence[LabelledScan], balance: bool) -> list[int]:
    """How often each scan is drawn in an epoch: once, or with `balance` so often that all labels are equally frequent.

    Counts are whole numbers: scans of the most frequent label once, those of a label that is n times rarer n times.
    """
    counts = Counter(scan.label for scan in scans)
    most = max(counts.values(), default=0)
    return [round(most / counts[scan.label]) if balance else 1 for scan in scans]


def fold_members(
    scans: Sequence[AnyScan], folds: Folds, fold: int, cell: CellSettings, synthetic: Sequence[AnyScan] = ()
) -> Members[AnyScan]:
    """Divide the scans of a dataset for one fold of a cell.

    scans: all that are packed. synthetic: those of data.synthetic for this fold, whether or not they have normals.
    Raises: ConfigError for a fold that does not exist, and if `train.holdout` is less than half a patient of every
    label, as nothing would be held out; DataError if there are too few synthetic scans.
    """
    validation, tuning = set(folds.validation(fold)), set(folds.tuning)
    wanted = [scan for scan in scans if scan.key in folds.fold_by_key and _is_wanted(scan, cell)]
    real = [scan for scan in wanted if scan.key not in validation]
    share = cell.train.holdout
    if tuning:  # the paper's own part, whatever share is asked for
        train = [scan for scan in real if scan.key not in tuning]
        held = [scan for scan in real if scan.key in tuning]
    else:
        train, held = hold_out(real, share, cell.seed)
    if share and not held:
        raise ConfigError(
            f"train.holdout={share}: of the fold's {len(real)} training scans that is not one patient of any label, so "
            "no loss could be followed. Raise it (0.2 is usual), or set train.holdout=0 with a schedule that follows "
            "none (train.schedule=cosine, train.stop_patience=0)"
        )
    if cell.data.mixed:
        assert cell.data.synthetic_ratio is not None, "composition sets it"
        generated = [scan for scan in synthetic if _is_wanted(scan, cell)]
        train = mix(train, generated, cell.data.synthetic_ratio, cell.data.real)
    return Members(
        train=train,
        repeats=repeats(train, cell.train.balance),
        holdout=held,
        validation=[scan for scan in wanted if scan.key in validation],
    )


def _is_wanted(scan: LabelledScan, cell: CellSettings) -> bool:
    return cell.data.normals or scan.label != "normal"
