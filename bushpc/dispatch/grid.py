"""One composed config → the cells of a run. Every cell is checked here, before anything is queued."""

from __future__ import annotations

import dataclasses
import hashlib

from bushpc import weights
from bushpc.config import CellConfig
from bushpc.files import sha256_of
from bushpc.shards.manifest import Manifest, verify
from bushpc.shards.split import find_folds, load_folds


def cv_cells(config: CellConfig) -> dict[str, CellConfig]:
    """Cell name → config, one per fold, in fold order; `fold=` only chooses which of them to submit.

    Raises: DataError (shards or folds missing, damaged or leaking), WeightsError (not staged), ConfigError.
    """
    folder = config.data.folder
    manifest = Manifest.load(folder)
    if config.data.stream:  # its tars are not here, and may be too many to read
        from bushpc.data.stream import require_reachable  # here: webdataset takes a second to import

        require_reachable(config.data.stream, manifest)
    else:
        verify(folder, manifest, deep=True)
    folds_file = find_folds(manifest, folder, config.folds)
    folds = load_folds(folds_file, manifest.lesions, manifest.excerpt)
    if config.fold is not None:
        folds.validation(config.fold)  # refuses a fold that does not exist
    weights.require(config.model_class, config.model, config.weights_folder)
    name = config.name or default_name(config, manifest.hash + sha256_of(folds_file))
    return {f"fold{k}": dataclasses.replace(config, fold=k, name=name) for k in range(folds.count)}


def default_name(config: CellConfig, data_hash: str) -> str:
    """`cv-xbusnet-breast-1a2b3c4d`: the same settings on the same data always land in the same run folder."""
    whole = dataclasses.replace(config, fold=None)
    digest = hashlib.sha256(f"{whole.hash}|{data_hash}".encode()).hexdigest()[:8]
    return f"cv-{config.choices['model']}-{config.data.name}-{digest}"
