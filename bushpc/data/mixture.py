"""Synthetic shards besides the real ones → one manifest to train from.

    data.synthetic ─open_synthetic→ Synthetic ─added_to(real manifest)→ the manifest of a fold's data

Everything behind it, cache, features, loader and ledger, sees one dataset: the records of both, those of the synthetic
one under keys of their own. No torch: the login node and `bushpc audit` read them, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bushpc.data.lineage import of_generated, refuse_seen
from bushpc.errors import DataError
from bushpc.shards.manifest import FILE_NAME, Manifest, Record

# Before the key of every synthetic scan that trains. No real key has a slash: keys are names of files in tars.
PREFIX = "synthetic/"


@dataclass(frozen=True)
class Synthetic:
    """Packed synthetic scans. manifest: as it lies in `folder`."""

    manifest: Manifest
    folder: Path

    def records(self, normals: bool) -> list[Record]:
        """As training knows them: keys with PREFIX, shards with their folder. normals: whether with normal scans."""
        wanted = self.manifest.records if normals else self.manifest.lesions
        return [replace(r, key=f"{PREFIX}{r.key}", shard=self._place(r.shard)) for r in wanted]

    def added_to(self, real: Manifest) -> Manifest:
        """All scans of both, the real ones first. Its hash is of both, tars included.

        Raises: DataError where the two have not the same mask classes or channels.
        """
        for what in ("mask_classes", "channels"):
            ours, theirs = getattr(real, what), getattr(self.manifest, what)
            if ours != theirs:
                raise DataError(
                    f"data.synthetic={self.folder} has the {what.replace('_', ' ')} {', '.join(theirs)}, and "
                    f"{real.dataset} has {', '.join(ours)}: they cannot train together. Generate from a generator that "
                    f"trained on {real.dataset}"
                )
        shards = [replace(shard, file=self._place(shard.file)) for shard in self.manifest.shards]
        records = self.records(normals=True)
        return replace(real, shards=[*real.shards, *shards], records=[*real.records, *records])

    def refuse_seen(self, real: Manifest, folds_sha256: str, fold: int) -> None:
        """Raises: DataError where the generator trained on scans that this fold of this dataset is validated on."""
        refuse_seen(
            f"The generator of data.synthetic={self.folder}",
            of_generated(self.folder),
            real,
            folds_sha256,
            fold,
            "What it remembers of them would be trained on. Generate with each fold's own generator into fold0, fold1 "
            "… of one folder and give that",
        )

    def _place(self, file: str) -> str:
        """The absolute path of a shard, which stays what it is below any folder."""
        return str(self.folder / file)


def open_synthetic(folder: str | Path, fold: int, sha256: str | None = None) -> Synthetic:
    """Read the manifest in `folder`, or in its fold<N> where it holds such folders.

    sha256: what the manifest must have. Raises: DataError if it is missing, damaged or another one, or if its scans are
    not marked as synthetic.
    """
    folder = Path(folder)
    if not (folder / FILE_NAME).exists() and (folder / "fold0").is_dir():
        folder = folder / f"fold{fold}"
    manifest = Manifest.load(folder)
    if not manifest.synthetic:
        raise DataError(
            f"data.synthetic={folder} holds {manifest.dataset}, which is not marked as synthetic (card.yaml: "
            "synthetic: true). Real scans train as data=…, with folds that keep each patient out of training or out of "
            "validation; give a folder that `bushpc generate` wrote"
        )
    if sha256 not in (None, manifest.hash):
        raise DataError(
            f"data.synthetic={folder} has another manifest ({manifest.hash[:12]}) than data.synthetic_sha256 says "
            f"({sha256[:12]}): its scans were made anew. Restore the folder, or start a run under another "
            "name=…"
        )
    return Synthetic(manifest, folder.resolve())
