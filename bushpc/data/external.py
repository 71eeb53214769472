"""External test sets: checks that the models were trained on none of their scans.

    evaluate.external ─open_external→ manifest → bushpc.evaluate.external

This module does not import torch: the login node uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bushpc.config import CellConfig
from bushpc.data.lineage import Training, of_generated, same_data
from bushpc.errors import DataError
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest


def open_external(folder: Path, trained: Manifest, given: str | None = None) -> Manifest:
    """The manifest of a whole dataset on which models trained on `trained` may be evaluated.

    given: how the user named it, by default `evaluate.external=…`.

    Raises: DataError if it is missing, damaged or synthetic, shares a raw file with `trained`, or differs in mask
    classes or channels.
    """
    manifest = Manifest.load(folder)
    given = given or f"evaluate.external={folder}"
    if manifest.synthetic:
        raise DataError(
            f"{given} holds synthetic images of a trained generator, and results on them say nothing about patients. "
            "Give real datasets; to train on this folder, set data.synthetic=…"
        )
    # A generated dataset has no raw files, and another seed gives other scans.
    raw = [] if Card.find(manifest.dataset, folder).made_here else manifest.sources.values()
    shared = set(raw) & set(trained.sources.values())
    same_tars = {shard.sha256 for shard in manifest.shards} & {shard.sha256 for shard in trained.shards}
    if shared or same_tars:
        raise DataError(
            f"{given} shares {len(shared) or 'all'} of its raw files with {trained.dataset}, the training data, so the "
            "models would be tested on scans they have seen. Give datasets that share none; this one is tested by its "
            "own folds"
        )
    for what in ("mask_classes", "channels"):
        ours, theirs = getattr(trained, what), getattr(manifest, what)
        if ours != theirs:
            raise DataError(
                f"{given} has the {what.replace('_', ' ')} {', '.join(theirs)}, but {trained.dataset} has "
                f"{', '.join(ours)}: a model trained on one cannot be evaluated on the other"
            )
    return manifest


def seen_by_generator(cell: CellConfig, generator: Sequence[Training] | None = None) -> list[str]:
    """Datasets of `evaluate.external` that the generator of the cell's synthetic scans was trained on.

    generator: its trainings, where its scans are yet to be made; None reads them from their folder.
    """
    if not cell.data.mixed:
        return []
    seen = of_generated(Path(str(cell.data.synthetic))) if generator is None else generator
    datasets = zip(cell.evaluate.external_names, map(Manifest.load, map(Path, cell.evaluate.external)), strict=True)
    return [name for name, manifest in datasets if any(same_data(each, manifest) for each in seen)]
