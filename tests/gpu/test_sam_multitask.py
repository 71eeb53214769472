"""Promises on a GPU: SAM's ViT-B at 1024 x 1024 trains with batch 8 in bf16 within 40 GB. Skipped without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bushpc.config import compose
from bushpc.dist import World
from bushpc.run import build_model
from bushpc.sample import Batch
from bushpc.train.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.mark.parametrize("encoder", ["full", "lora", "frozen"])
def test_a_step_at_full_size_takes_less_than_40_gb(encoder):
    cell = compose(
        [
            *("model=sam_multitask", "data=phantom", "cluster.gpus_per_node=1", "model.pretrained=false"),
            *(f"model.encoder={encoder}", "loader.features=false", "engine.recompute=true", "engine.device=cuda"),
        ]
    )
    engine = Engine(cell, World(), build_model(dataclasses.replace(cell, fold=0)))
    batch = Batch(
        keys=[f"scan{i}" for i in range(8)],
        epochs=[50] * 8,
        image_BCHW=torch.randint(256, (8, 3, 1024, 1024), dtype=torch.uint8),
        mask_BKHW=torch.randint(2, (8, 1, 1024, 1024), dtype=torch.uint8),
        label_B=torch.arange(8) % 3,
        spatial_prompts=[""] * 8,
        attribute_prompts=[""] * 8,
        captions=[""] * 8,
    )
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second one has the optimizer's state
        engine.losses(batch)
        engine.update(cell.train.lr)
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"encoder={encoder}: {peak:.1f} GB at the most")
    assert peak < 40
