"""What an export reads: every packed scan, its card and its folds."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest, Record, read_image_png, read_mask
from bushpc.shards.progress import Show


def case_of(key: str) -> str:
    """A sample's name in files. Only keys of synthetic scans in a mixture have a slash."""
    return key.replace("/", "__")


@dataclass(frozen=True, kw_only=True)
class Scans:
    """A packed dataset. folds: key → fold, of those that have one."""

    folder: Path
    manifest: Manifest
    card: Card
    folds: Mapping[str, int]
    show: Show

    def __iter__(self) -> Iterator[tuple[Record, bytes, np.ndarray]]:
        """(record, the image's PNG as it was packed, mask_HW). Raises: DataError."""
        total = len(self.manifest.records)
        for number, record in enumerate(self.manifest.records):
            self.show(number, total)
            yield record, read_image_png(self.folder, record), read_mask(self.folder, record)
        self.show(total, total)

    def patient(self, record: Record) -> str | None:
        """None in a cohort whose user declared that patients aren't known: the manifest then has the key for one."""
        return None if self.card.imported.get("patients") == "none" else record.patient

    def masks(self) -> Iterator[np.ndarray]:
        return (read_mask(self.folder, record) for record in self.manifest.records)

    def all_grey(self) -> bool:
        """Whether each image has three equal channels; the packer stores one of them then."""
        return all(self._mode(record) == "L" for record in self.manifest.records)

    def _mode(self, record: Record) -> str:
        with Image.open(io.BytesIO(read_image_png(self.folder, record))) as image:
            return image.mode
