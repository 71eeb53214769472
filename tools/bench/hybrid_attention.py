"""Training speed of the hybrid attention network, compared with segmentation-models-pytorch's U-Net of that encoder.

    python tools/bench/hybrid_attention.py [--repeats 7] [--batch 10] [--out benchmarks/<date>_hybrid_attention]

Both train at 256 pixels on one batch that stays in memory: forward, the same loss, backward, Adam. They take turns,
step by step, so that whatever else the machine does meets both. Times are seconds of wall clock and, on a CPU, of
processor time, which other programs disturb less. Memory is what autograd keeps of a forward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from common import machine, write_result
from torch import nn

from bushpc.config import compose
from bushpc.losses.overlap import bce_loss, jaccard_loss
from bushpc.models.hybrid_attention import HybridAttention, HybridAttentionConfig
from bushpc.sample import Batch

PEER = "smp.Unet, densenet121"
ROWS: dict[str, dict[str, t.Any]] = {
    "hybrid attention, baseline": {"conv_block": False, "sfeb": False, "tam": False},
    "hybrid attention": {"conv_block": True, "sfeb": True, "tam": True},
    "hybrid attention, sfeb_stride=2": {"conv_block": True, "sfeb": True, "tam": True, "sfeb_stride": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="folder for speed.md and speed.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {**machine(), "threads": torch.get_num_threads(), "device": device}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    kept = {name: kept_mib_per_image(network) for name, network in networks().items()}
    result: dict[str, t.Any] = {"kept_mib_per_image": kept, "batch": arguments.batch, "machine": facts}
    for layout in ("contiguous", "channels_last"):
        result[layout] = compare(arguments, device, layout)
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "speed", report, result)


def compare(arguments: argparse.Namespace, device: str, layout: str) -> dict[str, dict[str, float]]:
    """Per network: median seconds of a step, ratio to the peer's, images a second."""
    batch = made_up(arguments.batch).to(device)
    if layout == "channels_last":
        batch = batch.channels_last()
    steps = {name: step_of(network, batch, device, layout) for name, network in networks().items()}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 1):
        for name, step in steps.items():
            began, worked = time.perf_counter(), time.process_time()
            step()
            if repeat:  # the first step pays for allocations and the choice of kernels
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - worked)
    out = {}
    for name in steps:
        # Of each turn its own ratio: what slows the machine for a while slows both sides of it.
        ratios = [ours / peer for ours, peer in zip(wall[name], wall[PEER], strict=True)]
        cpu_ratios = [ours / peer for ours, peer in zip(cpu[name], cpu[PEER], strict=True)]
        out[name] = {
            "step_s": statistics.median(wall[name]),
            "cpu_s": statistics.median(cpu[name]),
            "images_per_s": arguments.batch / statistics.median(wall[name]),
            "over_peer": statistics.median(ratios),
            "cpu_over_peer": statistics.median(cpu_ratios),
        }
        print(f"{layout}, {name}: {out[name]}", flush=True)
    return out


def networks() -> dict[str, nn.Module]:
    words = ["model=hybrid_attention", "model.pretrained=false"]
    config = t.cast(HybridAttentionConfig, compose(words).model)
    ours = {name: HybridAttention(dataclasses.replace(config, **row)) for name, row in ROWS.items()}
    return {PEER: smp.Unet("densenet121", encoder_weights=None), **ours}


def step_of(network: nn.Module, batch: Batch, device: str, layout: str) -> Callable[[], None]:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    network.to(device).to(memory_format=memory_format)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def kept_mib_per_image(network: nn.Module) -> float:
    """Activations kept for the backward pass in MiB per image, float32, each storage once, parameters not."""
    batch, storages = made_up(2), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(network, batch)  # held, so that no storage is freed and its address used again
    del loss
    return sum(storages.values()) / 2 / 2**20


def loss_of(network: nn.Module, batch: Batch) -> torch.Tensor:
    if isinstance(network, HybridAttention):
        return network(batch).total
    logits_BKHW = network(batch.image_BCHW)
    return bce_loss(logits_BKHW, batch.mask_BKHW) + jaccard_loss(logits_BKHW, batch.mask_BKHW)


def made_up(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        keys=[str(i) for i in range(count)],
        epochs=[0] * count,
        image_BCHW=torch.rand(count, 3, 256, 256, generator=generator),
        mask_BKHW=(torch.rand(count, 1, 256, 256, generator=generator) > 0.9).float(),
        label_B=torch.zeros(count, dtype=torch.int64),
        conditions={"spatial_prompts": [""] * count, "attribute_prompts": [""] * count, "captions": [""] * count},
    )


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    lines = [f"Training steps at 256 x 256, batch {result['batch']}, medians of steps that took turns."]
    for layout in ("contiguous", "channels_last"):
        lines += ["", f"| {layout} | s per step | images per s | times the peer's step | … in processor time |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {row['step_s']:.2f} | {row['images_per_s']:.2f} | {row['over_peer']:.3f} "
            f"| {row['cpu_over_peer']:.3f} |"
            for name, row in result[layout].items()
        ]
    kept = ", ".join(f"{name} {mib:.0f}" for name, mib in result["kept_mib_per_image"].items())
    lines += ["", f"Kept for the backward pass, MiB per image in float32: {kept}."]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join([*lines, "", f"Machine: {facts}.", ""])


if __name__ == "__main__":
    main()
