"""Other datasets as test sets: which may be, for models that were trained on none of their scans.

    evaluate.external ─open_external→ manifest → bushpc.evaluate.external

No torch: the login node asks.
"""

from __future__ import annotations

from pathlib import Path

from bushpc.config import CellConfig
from bushpc.data.lineage import of_generated, same_data
from bushpc.errors import DataError
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest


def open_external(folder: Path, trained: Manifest) -> Manifest:
    """The manifest of a dataset that models trained on `trained` may be scored on as a whole.

    Raises: DataError if it is missing, damaged or synthetic, shares a raw file with `trained`, or has other mask
    classes or channels.
    """
    manifest = Manifest.load(folder)
    given = f"evaluate.external={folder}"
    if manifest.synthetic:
        raise DataError(
            f"{given} holds synthetic images of a trained generator: what models do with made-up scans tells nothing "
            "of patients. Give real datasets, and this folder as data.synthetic=… to train on it"
        )
    # What is made here has no raw files, and another seed makes other scans.
    raw = [] if Card.find(manifest.dataset, folder).made_here else manifest.sources.values()
    shared = set(raw) & set(trained.sources.values())
    same_tars = {shard.sha256 for shard in manifest.shards} & {shard.sha256 for shard in trained.shards}
    if shared or same_tars:
        raise DataError(
            f"{given} has {len(shared) or 'all'} of its raw files in common with {trained.dataset}, on which the "
            "models are trained: they would be tested on scans that they have seen. Give datasets that share none; its "
            "own folds test this one"
        )
    for what in ("mask_classes", "channels"):
        ours, theirs = getattr(trained, what), getattr(manifest, what)
        if ours != theirs:
            raise DataError(
                f"{given} has the {what.replace('_', ' ')} {', '.join(theirs)}, and {trained.dataset} has "
                f"{', '.join(ours)}: a model of the one cannot be scored on the other"
            )
    return manifest


def seen_by_generator(cell: CellConfig) -> list[str]:
    """Datasets of `evaluate.external` on whose scans the generator trained that made the cell's synthetic ones."""
    if not cell.data.mixed:
        return []
    seen = of_generated(Path(str(cell.data.synthetic)))
    datasets = zip(cell.evaluate.external_names, map(Manifest.load, map(Path, cell.evaluate.external)), strict=True)
    return [name for name, manifest in datasets if any(same_data(each, manifest) for each in seen)]
