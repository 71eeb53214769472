"""A training step of ViT-conditioned diffusion, compared with the same step with a UNet of diffusers.

    python tools/bench/diffusion_step.py [--batch 2] [--repeats 5] [--out benchmarks/<date>_diffusion_step]

ViT, noise, losses and optimizer are the same; the UNets have the same number of parameters within a few percent. Theirs
is a UNet2DConditionModel, whose sample is 128 x 128: what ours makes of 2 x 2 pixels, x_t and the image, enters as
channels. One has cross-attention to the ViT's tokens at the resolutions of our bridges, without self-attention, which
nobody could pay at 128 x 128; the other has no attention at all. A step is forward, backward and AdamW, in fp32 on the
CPU, with random weights. All take turns. Times are seconds of wall clock and of the processor over all threads, which
other programs disturb less. Memory is what autograd keeps of a forward pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, write_result
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bushpc.cell import build_model
from bushpc.config import compose
from bushpc.models.vit_diffusion import Condition, VitDiffusion
from bushpc.sample import Batch

OURS = "bushpc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each")
    parser.add_argument("--out", type=Path, default=None, help="folder for step.md and step.json")
    arguments = parser.parse_args()
    facts = {**machine(), "threads": torch.get_num_threads()}
    models = {
        OURS: make_model(),
        f"{OURS}, engine.channels_last": make_model().to(memory_format=torch.channels_last),
        "diffusers, cross-attention": with_unet_of_diffusers(last_width=224, layers=1, attention=True),
        "diffusers, no attention": with_unet_of_diffusers(last_width=168, layers=2, attention=False),
    }
    rows = compare(models, made_up(arguments.batch), arguments.repeats)
    facts["load_after"] = os.getloadavg()[0]
    result = {"batch": arguments.batch, "models": rows, "machine": facts}
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "step", report, result)


def make_model() -> VitDiffusion:
    return t.cast(VitDiffusion, build_model(compose(["model=vit_diffusion", "engine=cpu", "model.pretrained=false"])))


def with_unet_of_diffusers(last_width: int, layers: int, attention: bool) -> VitDiffusion:
    model = make_model()
    model.unet = t.cast(t.Any, UNetOfDiffusers(model, last_width, layers, attention))
    return model


class UNetOfDiffusers(nn.Module):
    """What VitDiffusion expects of its UNet; the map that the heads read is their output already."""

    def __init__(self, model: VitDiffusion, last_width: int, layers: int, attention: bool) -> None:
        super().__init__()
        config = model.config
        assert model.vit is not None, "the bench's model has one"
        self.patch = config.patch
        squared, widths = config.patch**2, (*config.widths[:-1], last_width)
        self.made = config.mask_classes * squared
        stage = "SimpleCrossAttnUpBlock2D" if attention else "UpBlock2D"
        self.unet = UNet2DConditionModel(
            sample_size=config.image_size // config.patch,
            in_channels=(config.channels + config.mask_classes) * squared,
            out_channels=2 * self.made,
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("DownBlock2D",) * len(widths),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("UpBlock2D", *[stage] * (len(widths) - 1)),
            only_cross_attention=True,
            cross_attention_dim=model.vit.embed_dim,
            attention_head_dim=tuple(reversed(widths)),  # one head, as ours
            norm_num_groups=8,
        )

    def condition(self, image_BCHW: torch.Tensor, tokens_BND: torch.Tensor) -> Condition:
        return Condition(F.pixel_unshuffle(image_BCHW, self.patch), (tokens_BND,))

    def forward(self, x_t: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
        x = torch.cat([F.pixel_unshuffle(x_t, self.patch), condition.stem_BChw], dim=1)
        return self.unet(x, t_B, encoder_hidden_states=condition.enhanced[0], return_dict=False)[0]

    def noise_head(self, map_BDhw: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(map_BDhw[:, : self.made], self.patch)

    def auxiliary_head(self, map_BDhw: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(map_BDhw[:, self.made :], self.patch)


def made_up(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        keys=[str(i) for i in range(count)],
        epochs=[0] * count,
        image_BCHW=torch.rand(count, 3, 256, 256, generator=generator),
        mask_BKHW=(torch.rand(count, 1, 256, 256, generator=generator) > 0.9).float(),
        label_B=torch.zeros(count, dtype=torch.int64),
    )


def compare(models: dict[str, VitDiffusion], batch: Batch, repeats: int) -> dict[str, dict[str, float]]:
    """Of each: parameters, GFLOP and MiB of an image, median seconds of a step and their ratio to ours."""
    steps = {name: step_of(model, batch) for name, model in models.items()}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began, worked = time.perf_counter(), time.process_time()
            step()
            if repeat:  # the first step pays for allocations and the choice of kernels
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - worked)
    rows = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            kept = kept_bytes(model, batch)
        rows[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "unet_parameters": sum(p.numel() for p in model.unet.parameters()),
            "gflop_per_image": counter.get_total_flops() / len(batch.keys) / 1e9,
            "kept_mib_per_image": kept / len(batch.keys) / 2**20,
            "step_s": statistics.median(wall[name]),
            "cpu_s": statistics.median(cpu[name]),
            # Of each turn its own ratio: what slows the machine for a while slows both sides of it.
            "over_ours": statistics.median(one / ours for one, ours in zip(wall[name], wall[OURS], strict=True)),
            "cpu_over_ours": statistics.median(one / ours for one, ours in zip(cpu[name], cpu[OURS], strict=True)),
        }
    return rows


def step_of(model: VitDiffusion, batch: Batch) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()

    return step


def kept_bytes(model: VitDiffusion, batch: Batch) -> int:
    """Of a forward pass, for its backward pass: each storage once, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(batch)  # held, so that no storage is freed and its address used again
    del loss
    return sum(storages.values())


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    rows = [
        f"| {name} | {row['parameters'] / 1e6:.2f} | {row['unet_parameters'] / 1e6:.2f} | {row['gflop_per_image']:.1f} "
        f"| {row['kept_mib_per_image']:.0f} | {row['step_s']:.2f} | {row['over_ours']:.2f} | {row['cpu_s']:.2f} "
        f"| {row['cpu_over_ours']:.2f} |"
        for name, row in result["models"].items()
    ]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(
        [
            f"Training steps at 256 x 256, batch {result['batch']}, fp32 on the CPU, medians of steps that took turns. "
            "GFLOP of a forward pass, and MiB kept for the backward pass, are per image.",
            "",
            "| UNet | million parameters | its UNet | GFLOP | kept, MiB | s per step | times ours | CPU s per step "
            "| times ours, CPU |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Machine: {facts}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
