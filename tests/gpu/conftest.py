"""Tests on a GPU: what they share. `pytest tests/gpu --rehearse` runs the same lines on a CPU, with small networks.

A rehearsal shows typing errors and changed interfaces, and says nothing about a GPU: sizes, speed and numbers are not
those of the test.
"""

from __future__ import annotations

import dataclasses
import typing as t

import pytest
import torch

from bushpc.cell import build_model
from bushpc.config import compose
from bushpc.dist import World
from bushpc.sample import Batch
from bushpc.train.engine import Engine


@dataclasses.dataclass(frozen=True)
class Gpu:
    """device: `cuda`, or `cpu` in a rehearsal. words: of a cell there."""

    device: str

    @property
    def rehearsed(self) -> bool:
        return self.device == "cpu"

    @property
    def words(self) -> tuple[str, ...]:
        return (f"engine.device={self.device}", f"cluster.gpus={0 if self.rehearsed else 1}")

    def either(self, on_gpu: t.Any, rehearsed: t.Any) -> t.Any:
        """What the test says, or a small stand-in for it."""
        return rehearsed if self.rehearsed else on_gpu


@pytest.fixture
def gpu(request):
    """Skips the test where there is neither a GPU nor a rehearsal."""
    if request.config.getoption("--rehearse"):
        return Gpu("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine (pytest tests/gpu --rehearse runs this on the CPU)")
    return Gpu("cuda")


@pytest.fixture
def peak_gb(gpu):
    """peak_gb(images, edge, epoch, words, rehearsed) → GB that two training steps take at the most.

    rehearsed: words instead of `words` in a rehearsal, for images of 64 pixels.
    """

    def of(images, edge, epoch, words, rehearsed):
        images, edge = gpu.either(images, 2), gpu.either(edge, 64)
        cell = compose(["data=phantom", *gpu.words, f"train.batch_size={images}", *gpu.either(words, rehearsed)])
        engine = Engine(cell, World(), build_model(dataclasses.replace(cell, fold=0)))
        batch = Batch(
            keys=[f"scan{i}" for i in range(images)],
            epochs=[epoch] * images,
            image_BCHW=torch.randint(256, (images, 3, edge, edge), dtype=torch.uint8),
            mask_BKHW=torch.randint(2, (images, 1, edge, edge), dtype=torch.uint8),
            label_B=torch.arange(images) % 2,
            conditions={
                "spatial_prompts": [""] * images,
                "attribute_prompts": [""] * images,
                "captions": ["breast ultrasound image"] * images,
            },
        )
        if not gpu.rehearsed:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the second one has the optimizer's state
            engine.losses(batch)
            engine.update(cell.train.lr)
        return torch.cuda.max_memory_allocated() / 1e9

    return of
