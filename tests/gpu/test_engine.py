"""Promises on a GPU: full XBusNet trains in bf16, and the loss agrees with the CPU's. Skipped without one."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest
import torch
from safetensors.torch import load_file

from bushpc.cell import build_model, run_cell
from bushpc.config import CellConfig
from bushpc.dist import World
from bushpc.sample import Batch
from bushpc.train.preempt import StopFlag

pytestmark = pytest.mark.gpu


def test_a_cell_trains_and_evaluates_in_bf16(make_cell, gpu):
    cell_dir = make_cell("gpu", *gpu.words, "engine.precision=bf16")
    assert run_cell(cell_dir, World()) is None
    assert json.loads((cell_dir / "DONE").read_text())["step"] == 6


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.precision=fp32",),
        ("engine.precision=fp16", "train.ema=0.9"),
        ("engine.recompute=true", "engine.channels_last=true", "train.accumulate=2"),
        ("model=unet_small", "engine.compile=true"),
        ("engine=zero1",),
        ("engine=zero2", "engine.precision=fp16"),
        ("engine=zero3", "train.ema=0.9"),
    ],
)
def test_every_engine_setting_trains_on_a_gpu(make_cell, gpu, overrides):
    if gpu.rehearsed:  # compiling for a CPU takes minutes
        overrides = [word for word in overrides if word != "engine.compile=true"]
    cell_dir = make_cell("setting", *gpu.words, *overrides)
    # In a process of its own, like any cell: Accelerate and DeepSpeed keep the first engine for all that follow.
    process = multiprocessing.get_context("spawn").Process(target=run_cell, args=(cell_dir, World()))
    process.start()
    process.join()
    assert (process.exitcode, (cell_dir / "DONE").exists()) == (0, True)


def test_a_stopped_run_ends_with_the_undisturbed_weights(make_cell, gpu):
    cell_dirs = [make_cell(name, *gpu.words) for name in ("whole", "stopped")]
    run_cell(cell_dirs[0], World())
    with StopFlag() as stop:
        stop.deadline, stop.lead_s = time.time() + 5, 2.5  # in the middle of the short training, or before it
        run_cell(cell_dirs[1], World(), stop)
    run_cell(cell_dirs[1], World())
    ours, theirs = (load_file(d / "checkpoints" / "step_00000006" / "model.safetensors") for d in cell_dirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_full_size_xbusnet_takes_two_steps(make_cell, gpu):
    full = ("model=xbusnet", "model.pretrained=false", "model.image_size=352", "train.iterations=2")
    assert run_cell(make_cell("full", *gpu.words, *gpu.either(full, ("train.iterations=2",))), World()) is None


def test_the_loss_on_the_gpu_is_the_cpus(make_cell, gpu):
    cell = CellConfig.load(make_cell("loss", *gpu.words) / "config.yaml")
    model = build_model(cell).eval()
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        keys=["a", "b"],
        epochs=[0, 0],
        image_BCHW=torch.rand(2, 3, 64, 64, generator=generator),
        mask_BKHW=(torch.rand(2, 1, 64, 64, generator=generator) > 0.5).float(),
        label_B=torch.zeros(2, dtype=torch.long),
        conditions={
            "spatial_prompts": ["a small lesion in the upper inner quadrant of the breast", ""],
            "attribute_prompts": ["oval shape", "irregular shape"],
            "captions": [""] * 2,
        },
    )
    with torch.no_grad():
        expected = model(batch).total
        got = model.to(gpu.device)(batch.to(gpu.device)).total.cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
