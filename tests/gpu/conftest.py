"""What tests of memory at full size share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bushpc.cell import build_model
from bushpc.config import compose
from bushpc.dist import World
from bushpc.sample import Batch
from bushpc.train.engine import Engine


@pytest.fixture
def peak_gb():
    """peak_gb(images, edge, epoch, words) → GB that two training steps take at the most."""

    def of(images, edge, epoch, words):
        cell = compose(["data=phantom", "cluster.gpus=1", "engine.device=cuda", *words])
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
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the second one has the optimizer's state
            engine.losses(batch)
            engine.update(cell.train.lr)
        return torch.cuda.max_memory_allocated() / 1e9

    return of
