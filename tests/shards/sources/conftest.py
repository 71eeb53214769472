"""Tiny raw folders in publishers' layouts, made from nothing, and the cards that go with them."""

from __future__ import annotations

import typing as t
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.write import pack

WIDTH, HEIGHT = 30, 20
BOX = (slice(5, 12), slice(8, 19))


class Raw:
    """The folder of one dataset, and what can be done to it."""

    def __init__(self, name: str, tmp_path: Path) -> None:
        self.name, self.folder, self.shards = name, tmp_path / "raw", tmp_path / "shards"
        self.folder.mkdir()

    def image(self, file: str, mode: str = "L", size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
        """Save a noisy picture that no other is equal to; returns what must be read from it, (H, W, 3)."""
        rng = np.random.default_rng(list(file.encode()))
        pixels = Image.fromarray(rng.integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
        self._save(file, pixels)
        return np.asarray(pixels.convert("RGB"))

    def mask(
        self,
        file: str,
        mode: str = "L",
        box: tuple[slice, slice] | None = BOX,
        colour: tuple[int, int, int] = (255, 255, 255),
        size: tuple[int, int] = (WIDTH, HEIGHT),
    ) -> np.ndarray:
        """Save a mask with `colour` inside `box`; returns what must be read from it, (H, W) of 0 and 1."""
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        if box:
            pixels[box] = colour
        self._save(file, Image.fromarray(pixels).convert(mode))
        return (pixels.max(axis=2) > 0).astype(np.uint8)

    def _save(self, file: str, picture: Image.Image) -> None:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    def pack(self, labels: dict[str, int], **options: t.Any):
        """Pack with the project's card, but for the counts: `labels`, and as many files as there are."""
        content = yaml.safe_load((PROJECT_SHARDS / self.name / "card.yaml").read_text())
        content["counts"] = {label: labels.get(label, 0) for label in content["counts"]}
        content["files"] = {pattern: len(list(self.folder.glob(pattern))) for pattern in content["files"]}
        self.shards.mkdir(exist_ok=True)
        (self.shards / "card.yaml").write_text(yaml.safe_dump(content))
        return pack(self.name, self.folder, self.shards, **options)

    def packed_nothing(self) -> bool:
        """Whether no tar, manifest or fold file lies in the shards folder."""
        return {path.name for path in self.shards.iterdir()} <= {"card.yaml", ".packing"}


@pytest.fixture
def raw_of(tmp_path: Path) -> t.Callable[[str], Raw]:
    """raw_of("busi") → an empty raw folder of that dataset."""
    return lambda name: Raw(name, tmp_path)


@pytest.fixture
def labels_of() -> t.Callable[..., dict[str, int]]:
    """Number of packed samples by label."""
    return lambda manifest: dict(Counter(record.label for record in manifest.records))


@pytest.fixture
def card_of() -> t.Callable[[str], Card]:
    return lambda name: Card.load(PROJECT_SHARDS / name)
