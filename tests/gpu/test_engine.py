"""Promises on a GPU: full XBusNet trains in bf16, and the loss agrees with the CPU's. Skipped without one."""

from __future__ import annotations

import json

import pytest
import torch

from bushpc.config import CellConfig
from bushpc.dist import World
from bushpc.run import build_model, run_cell
from bushpc.sample import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
ON_GPU = ("engine=ddp", "cluster.gpus_per_node=1")


def test_a_cell_trains_and_evaluates_in_bf16(make_cell):
    cell_dir = make_cell("gpu", *ON_GPU)
    assert run_cell(cell_dir, World()) is None
    assert json.loads((cell_dir / "DONE").read_text())["step"] == 6


def test_full_size_xbusnet_takes_two_steps(make_cell):
    full = ("model=xbusnet", "model.pretrained=false", "model.image_size=352", "train.iterations=2")
    assert run_cell(make_cell("full", *ON_GPU, *full), World()) is None


def test_the_loss_on_the_gpu_is_the_cpus(make_cell):
    cell = CellConfig.load(make_cell("loss", *ON_GPU) / "config.yaml")
    model = build_model(cell).eval()
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        keys=["a", "b"],
        image_BCHW=torch.rand(2, 3, 64, 64, generator=generator),
        mask_BKHW=(torch.rand(2, 1, 64, 64, generator=generator) > 0.5).float(),
        label_B=torch.zeros(2, dtype=torch.long),
        spatial_prompts=["a small lesion in the upper inner quadrant of the breast", ""],
        attribute_prompts=["oval shape", "irregular shape"],
    )
    with torch.no_grad():
        expected = model(batch).total
        got = model.cuda()(batch.to("cuda")).total.cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
