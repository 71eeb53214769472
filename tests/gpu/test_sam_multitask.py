"""Promises on a GPU: SAM's ViT-B at 1024 x 1024 trains with batch 8 in bf16 within 40 GB. Skipped without one."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("encoder", ["full", "lora", "frozen"])
def test_a_step_at_full_size_takes_less_than_40_gb(encoder, peak_gb):
    words = ["model=sam_multitask", "model.pretrained=false", "loader.features=false", "engine.recompute=true"]
    chosen = [f"model.encoder={encoder}"]
    peak = peak_gb(8, 1024, 50, [*words, *chosen], ["model=sam_multitask_small", "model.image_size=64", *chosen])
    print(f"encoder={encoder}: {peak:.1f} GB at the most")
    assert peak < 40
