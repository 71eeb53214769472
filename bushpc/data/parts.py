"""The training part of a fold → what is trained on, what is held out of it, and how often each sample is drawn.

    folds → training part ─hold_out→ tuning part (learning rate, early stop), and the rest ─mix→ with synthetic scans
    ─repeats→ draws of an epoch

Needs key, patient and label only, and no torch: the login node counts steps with it, and `bushpc audit` ledgers.
"""

from __future__ import annotations

import math
import typing as t
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from bushpc.errors import ConfigError, DataError

if t.TYPE_CHECKING:
    from bushpc.config import CellConfig, TrainConfig


class Scan(t.Protocol):
    """What is read of a sample: a manifest's Record has it, and so has a row of folds.csv."""

    @property
    def key(self) -> str: ...

    @property
    def patient(self) -> str: ...

    @property
    def label(self) -> str: ...


AnyScan = t.TypeVar("AnyScan", bound=Scan)


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
    """What trains: the real scans, if they are kept, and the first `ratio` synthetic ones for each of them.

    The same number of synthetic scans whether or not the real ones are kept. Raises: DataError where there are not so
    many, and for a ratio that comes to none.
    """
    wanted = round(ratio * len(real))
    if not 1 <= wanted <= len(synthetic):
        raise DataError(
            f"data.synthetic_ratio={ratio:g} with {len(real)} real training scans comes to {wanted} synthetic ones, "
            f"and data.synthetic has {len(synthetic)}. Generate at least {max(wanted, 1)} (`bushpc generate RUN "
            f"n={max(wanted, 1)}`), or set another ratio"
        )
    return [*(real if keep_real else ()), *synthetic[:wanted]]


def repeats(scans: Sequence[Scan], balance: bool) -> list[int]:
    """How often each scan is drawn in an epoch: once, or with `balance` so often that labels come equally often.

    As nearly as whole numbers allow: the most frequent label once, another one n times where it is n times as rare.
    """
    counts = Counter(scan.label for scan in scans)
    most = max(counts.values(), default=0)
    return [round(most / counts[scan.label]) if balance else 1 for scan in scans]


def training_part(
    cell: CellConfig, real: Sequence[AnyScan], synthetic: Sequence[AnyScan]
) -> tuple[list[AnyScan], list[AnyScan]]:
    """(what trains, the tuning part) of a fold. real: its training part. synthetic: of data.synthetic; may be empty.

    Raises: ConfigError where `train.holdout` is less than half a patient of every label: nothing would be held out;
    DataError where there are too few synthetic scans.
    """
    share = cell.train.holdout
    train, held = hold_out(real, share, cell.seed)
    if share and not held:
        raise ConfigError(
            f"train.holdout={share}: of the fold's {len(real)} training scans that is not one patient of any label, so "
            "no loss could be followed. Raise it (0.2 is usual), or set train.holdout=0 with a schedule that follows "
            "none (train.schedule=cosine, train.stop_patience=0)"
        )
    if cell.data.mixed:
        assert cell.data.synthetic_ratio is not None, "composition sets it"
        train = mix(train, synthetic, cell.data.synthetic_ratio, cell.data.real)
    return train, held


def steps(train: Sequence[Scan], config: TrainConfig) -> int:
    """Optimiser steps of `train.epochs` passes over what trains; `train.iterations` where that is null."""
    if config.epochs is None:
        return config.iterations
    return math.ceil(config.epochs * sum(repeats(train, config.balance)) / config.batch_size)
