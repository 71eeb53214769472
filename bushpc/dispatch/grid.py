"""One composed config → the cells of a run. Every cell is checked here, before anything is queued."""

from __future__ import annotations

import dataclasses
import hashlib

from bushpc import weights
from bushpc.config import CellConfig
from bushpc.shards.manifest import Manifest, verify
from bushpc.shards.split import find_folds, load_folds


def cv_cells(config: CellConfig) -> dict[str, CellConfig]:
    """Cell name → config, one per fold (or the one that `fold=` names), in fold order.

    Raises: DataError (shards or folds missing, damaged or leaking), WeightsError (not staged), ConfigError.
    """
    folder = config.data.folder
    manifest = Manifest.load(folder)
    verify(folder, manifest)
    folds = load_folds(find_folds(manifest, folder, config.folds), manifest.lesions, manifest.excerpt)
    numbers = list(range(folds.count))
    if config.fold is not None:
        folds.validation(config.fold)  # refuses a fold that does not exist
        numbers = [config.fold]
    weights.require(config.model_class, config.model, config.weights_dir)
    name = config.name or default_name(config)
    return {f"fold{k}": dataclasses.replace(config, fold=k, name=name) for k in numbers}


def default_name(config: CellConfig) -> str:
    """`cv-xbusnet-breast-1a2b3c4d`: the same settings always land in the same run folder."""
    whole = dataclasses.replace(config, fold=None)
    digest = hashlib.sha256(f"{whole.hash}|{whole.data.folder}".encode()).hexdigest()[:8]
    return f"cv-{config.choices['model']}-{config.data.name}-{digest}"
