"""Cells of one run that follow each other: what becomes of a generator, and who trains on the scans that it makes.

    <generator>-fold<k> ─→ <generator>-fold<k>-generate ─→ <generator>-fold<k>-quality
                                                        └→ <row>-fold<k>, which trains on these scans

A cell's `source` names the cell that it follows. Scans that are yet to be made are known by the hash of their cell.
"""

from __future__ import annotations

import dataclasses
import typing as t
from collections.abc import Mapping
from dataclasses import dataclass

from bushpc.config import CellConfig
from bushpc.data.lineage import Training, trained_on
from bushpc.errors import ConfigError
from bushpc.runs.layout import RunDir
from bushpc.sample import LABELS
from bushpc.shards.manifest import Manifest

# While a row is composed; each fold's own folder takes its place.
TO_COME = "/scans/to/come"


class ScanToCome(t.NamedTuple):
    """A scan that a generator will make. Which label it has decides nothing here."""

    key: str
    patient: str
    label: str


@dataclass(frozen=True, kw_only=True)
class ScansToCome:
    """What a cell of the same run will generate. name, cell: that cell."""

    name: str
    cell: CellConfig

    def records(self) -> list[ScanToCome]:
        """One for each scan: the plan only counts them."""
        labels = LABELS[:2]
        return [ScanToCome(str(k), str(k), labels[k % len(labels)]) for k in range(self.cell.synthesis.n)]

    def read_by(self, cell: CellConfig) -> CellConfig:
        """The cell, training on these scans. Raises: ConfigError if the steps depend on the scans' labels."""
        if cell.train.balance and cell.train.epochs is not None:
            raise ConfigError(
                "train.balance=true with train.epochs: how many steps that takes depends on the labels of scans that "
                f"{self.name} has yet to generate; set train.iterations (train.epochs=null), or train.balance=false"
            )
        folder = RunDir(self.cell.run_dir).cell(self.name).scans
        data = dataclasses.replace(cell.data, synthetic=str(folder), synthetic_cell=self.cell.hash)
        return dataclasses.replace(cell, data=data, source=self.name)


def following(name: str, cell: CellConfig) -> dict[str, CellConfig]:
    """The cells that follow a generator's training, by name: one generates scans, the next measures them.

    They run on one rank; none for a model that generates nothing, or with synthesis.n=0.
    """
    if not cell.synthesis.n or not _generates(cell):
        return {}
    alone = dataclasses.replace(cell.cluster, nodes=1, ranks_per_node=1, gpus=min(1, cell.cluster.gpu_count))
    made = generating(name)
    generate = dataclasses.replace(cell, work="generate", source=name, cluster=alone)
    return {made: generate, f"{name}-quality": dataclasses.replace(generate, work="quality", source=made)}


def generating(training: str) -> str:
    """The name of the cell that generates what a training's generator makes."""
    return f"{training}-generate"


def as_generator(cell: CellConfig) -> CellConfig:
    """The cell of a grid's `generators`: it is tested on no other dataset. Raises: ConfigError if it makes no scans."""
    if not _generates(cell):
        raise ConfigError(
            f"model={cell.choices['model']} generates no scans from masks and captions; choose a generator, such as "
            "tumor_generator, sgd or dcgan"
        )
    if not cell.synthesis.n:
        raise ConfigError("synthesis.n=0: its rows train on generated scans; say how many, such as synthesis.n=1000")
    return dataclasses.replace(cell, evaluate=dataclasses.replace(cell.evaluate, external=()))


def depth(cells: Mapping[str, CellConfig], name: str) -> int:
    """How many cells come before this one, each following the other."""
    source = cells[name].source
    return 0 if source is None else 1 + depth(cells, source)


def trainings_behind(
    cells: Mapping[str, CellConfig], cell: CellConfig, manifest: Manifest, folds_sha256: str
) -> list[Training] | None:
    """What trained the generator of the scans that this cell trains on; None if it is no cell of the same run."""
    if cell.work != "train" or cell.source is None:
        return None
    return trained_on(cells[str(cells[cell.source].source)], manifest, folds_sha256)


def _generates(cell: CellConfig) -> bool:
    return hasattr(cell.model_class, "generate") and cell.model.reads("captions")
