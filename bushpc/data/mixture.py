"""Real shards + synthetic shards → one manifest to train from.

    data.synthetic ─open_synthetic→ Synthetic ─added_to(real manifest)→ the manifest of a fold's data

Everything downstream (cache, features, loader and ledger) sees one dataset with the records of both; synthetic ones
have prefixed keys. This module does not import torch, as the login node and `bushpc audit` use it too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bushpc.data.lineage import of_generated, refuse_seen
from bushpc.errors import DataError
from bushpc.shards.manifest import FILE_NAME, Manifest, Record

# Prefix of the keys of synthetic training scans. No real key has a slash, as keys are names of files in tars.
PREFIX = "synthetic/"


@dataclass(frozen=True)
class Synthetic:
    """Packed synthetic scans. manifest: the one in `folder`."""

    manifest: Manifest
    folder: Path

    def records(self, normals: bool) -> list[Record]:
        """The records for training: keys with PREFIX, shards with their folder. normals: include normal scans."""
        wanted = self.manifest.records if normals else self.manifest.lesions
        return [replace(r, key=f"{PREFIX}{r.key}", shard=self._place(r.shard)) for r in wanted]

    def added_to(self, real: Manifest) -> Manifest:
        """A manifest of all scans, the real ones first. Its hash covers both datasets including their tars.

        Raises: DataError if mask classes or channels differ.
        """
        for what in ("mask_classes", "channels"):
            ours, theirs = getattr(real, what), getattr(self.manifest, what)
            if ours != theirs:
                raise DataError(
                    f"data.synthetic={self.folder} has the {what.replace('_', ' ')} {', '.join(theirs)}, but "
                    f"{real.dataset} has {', '.join(ours)}, so they cannot train together. Generate with a generator "
                    f"trained on {real.dataset}"
                )
        shards = [replace(shard, file=self._place(shard.file)) for shard in self.manifest.shards]
        records = self.records(normals=True)
        return replace(real, shards=[*real.shards, *shards], records=[*real.records, *records])

    def refuse_seen(self, real: Manifest, folds_sha256: str, fold: int) -> None:
        """Raises: DataError if the generator was trained on scans that validate this fold of this dataset."""
        refuse_seen(
            f"The generator of data.synthetic={self.folder}",
            of_generated(self.folder),
            real,
            folds_sha256,
            fold,
            "Its images may reproduce these scans, and training on them would leak. Generate with each fold's own "
            "generator into fold0, fold1 … of one folder and give that folder",
        )

    def _place(self, file: str) -> str:
        """The absolute path of a shard; joining it to another folder leaves it unchanged."""
        return str(self.folder / file)


def open_synthetic(folder: str | Path, fold: int, sha256: str | None = None) -> Synthetic:
    """Read the manifest in `folder`, or in its subfolder fold<N> if it has such folders.

    sha256: expected hash of the manifest. Raises: DataError if the manifest is missing, damaged or a different one, or
    if its scans are not marked as synthetic.
    """
    folder = Path(folder)
    if not (folder / FILE_NAME).exists() and (folder / "fold0").is_dir():
        folder = folder / f"fold{fold}"
    manifest = Manifest.load(folder)
    if not manifest.synthetic:
        raise DataError(
            f"data.synthetic={folder} holds {manifest.dataset}, which is not marked as synthetic (card.yaml: "
            "synthetic: true). Give a folder that `bushpc generate` wrote. Real scans are for data=…, where folds keep "
            "each patient in either training or validation"
        )
    if sha256 not in (None, manifest.hash):
        raise DataError(
            f"data.synthetic={folder} has manifest {manifest.hash[:12]}, but data.synthetic_sha256 is {sha256[:12]}: "
            "its scans have been regenerated. Restore the folder, or start a run under another name=…"
        )
    return Synthetic(manifest, folder.resolve())
