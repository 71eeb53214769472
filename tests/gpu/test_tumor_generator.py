"""Promises on a GPU: the generator trains at full size on one A100, and makes the CPU's images. Skipped without one."""

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
CAPTION = "breast ultrasound image of benign tumor with homogeneous echogenicity and clear boundary"


@pytest.mark.parametrize("stage", ["controlnet", "lora"])
def test_a_step_at_full_size_fits_an_a100_of_80_gb(stage):
    cell = compose(
        [
            *("model=tumor_generator", "data=phantom", "cluster.gpus_per_node=1", "model.pretrained=false"),
            *(f"model.stage={stage}", "loader.features=false", "engine.recompute=true", "engine.device=cuda"),
            *("train.batch_size=8", "train.accumulate=1"),
        ]
    )
    engine = Engine(cell, World(), build_model(dataclasses.replace(cell, fold=0)))
    batch = Batch(
        keys=[f"scan{i}" for i in range(8)],
        epochs=[1] * 8,
        image_BCHW=torch.randint(256, (8, 3, 512, 512), dtype=torch.uint8),
        mask_BKHW=torch.randint(2, (8, 1, 512, 512), dtype=torch.uint8),
        label_B=torch.arange(8) % 2,
        spatial_prompts=[""] * 8,
        attribute_prompts=[""] * 8,
        captions=[CAPTION] * 8,
    )
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second one has the optimizer's state
        engine.losses(batch)
        engine.update(cell.train.lr)
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"stage={stage}: {peak:.1f} GB at the most")
    assert peak < 75


def test_it_makes_the_images_that_a_cpu_makes():
    cell = compose(["model=tumor_generator_small", "data=phantom"])
    model = build_model(dataclasses.replace(cell, fold=0)).eval()
    mask_BHW = torch.zeros(2, 64, 64)
    mask_BHW[:, 20:40, 16:48] = 1
    images = [model.to(device).generate(mask_BHW.to(device), [CAPTION] * 2, [3, 4]).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(*images, rtol=0, atol=1e-2)
