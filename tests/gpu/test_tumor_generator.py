"""Promises on a GPU: the generator trains at full size on one A100, and makes the CPU's images. Skipped without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bushpc.cell import build_model
from bushpc.config import compose

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", ["controlnet", "lora"])
def test_a_step_at_full_size_fits_an_a100_of_80_gb(stage, peak_gb):
    words = ["model=tumor_generator", "model.pretrained=false", "loader.features=false", "engine.recompute=true"]
    small = ["model=tumor_generator_small", "loader.features=false", f"model.stage={stage}"]
    peak = peak_gb(8, 512, 1, [*words, f"model.stage={stage}", "train.accumulate=1"], small)
    print(f"stage={stage}: {peak:.1f} GB at the most")
    assert peak < 75


def test_it_makes_the_images_that_a_cpu_makes(gpu):
    model = build_model(dataclasses.replace(compose(["model=tumor_generator_small", "data=phantom"]), fold=0)).eval()
    mask_BHW = torch.zeros(2, 64, 64)
    mask_BHW[:, 20:40, 16:48] = 1
    captions = ["breast ultrasound image of benign tumor", "breast ultrasound image of malignant tumor"]
    images = [model.to(device).generate(mask_BHW.to(device), captions, [3, 4]).cpu() for device in ("cpu", gpu.device)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-2)
