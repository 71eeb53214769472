"""Files of features → the features of a batch. features.py computes them, and decides where they lie.

Every tensor is checked against its checksum when a process first reads it.
"""

from __future__ import annotations

import functools
import json
import typing as t
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bushpc.errors import DataError

# What opening a file raises that is none of ours.
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError)
# Samples per file. If a process is killed, its unfinished group is computed again.
GROUP = 32


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """The complete features of a dataset. plain: the folder of unaugmented samples; changed: that of variants.

    rows: position of each key in the manifest.
    """

    plain: Path
    changed: Path
    rows: dict[str, int]

    def __call__(self, keys: Sequence[str], variants: Sequence[int | None]) -> dict[str, torch.Tensor]:
        """Features of B samples by name, B x …. Each sample has an augmentation variant; None is unaugmented.

        Raises: DataError naming a missing or damaged file.
        """
        samples = [self._sample(key, variant) for key, variant in zip(keys, variants, strict=True)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _sample(self, key: str, variant: int | None) -> dict[str, torch.Tensor]:
        if variant is not None:
            changed = _open(self.file(self.rows[key] // GROUP, variant)).get(key)
            if changed is not None:
                return changed
        return _open(self.file(self.rows[key] // GROUP, None))[key]

    def file(self, group: int, variant: int | None) -> Path:
        """The file of a group of samples."""
        if variant is None:
            return self.plain / f"{group:05d}.safetensors"
        return self.changed / f"{variant:02d}-{group:05d}.safetensors"


class _File(t.Mapping[str, dict[str, torch.Tensor]]):
    """Key → the features of a sample, memory-mapped and verified at first access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = safe_open(path, framework="pt")
        self._checksums: dict[str, dict[str, int]] = json.loads(self._tensors.metadata()["crc32"])
        self._verified: set[str] = set()

    def __getitem__(self, key: str) -> dict[str, torch.Tensor]:
        sample = {name: self._tensors.get_tensor(f"{key}/{name}") for name in self._checksums[key]}
        if key not in self._verified:
            if {name: checksum(tensor) for name, tensor in sample.items()} != self._checksums[key]:
                raise DataError(f"{self.path} is damaged at {key}. Delete it, and run the same command again")
            self._verified.add(key)
        return sample

    def __iter__(self) -> t.Iterator[str]:
        return iter(self._checksums)

    def __len__(self) -> int:
        return len(self._checksums)


@functools.cache
def _open(path: Path) -> _File:
    """Raises: DataError."""
    try:
        return _File(path)
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read ({error}). Delete it, and run the same command again") from error


def is_whole(path: Path) -> bool:
    """Whether a file exists with the length that its header states; its tensors are verified on reading."""
    try:
        _File(path)
    except DAMAGED:
        return False
    return True


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
