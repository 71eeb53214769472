"""Sampling with ViT-conditioned diffusion, compared with diffusers' own pipelines, which run the ViT in every step.

    python tools/bench/diffusion.py [--steps 20] [--images 1] [--repeats 3] [--out benchmarks/<date>_diffusion_sampling]
        [KEY=VALUE ...]

The model as its yaml has it, with random weights, on made-up images. DDIMPipeline and DDPMPipeline know nothing of what
an image decides once and for all, so their network is ViT, feature enhancers and UNet together. Both ways draw the same
noise, and what they make is compared before a time is believed. Both run in fp32 and in bfloat16 as the evaluation does
with engine.precision=bf16; all take turns. Times are seconds of wall clock and of the processor over all threads, which
other programs disturb less. A second table says what a step is made of, and how long its multiplications alone would
take. Words are overrides, such as model.samples=4.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import types
import typing as t
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from common import machine, write_result
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from bushpc.cell import build_model
from bushpc.config import compose
from bushpc.models.vit_diffusion import DiffusionUNet, VitDiffusion
from bushpc.nn.diffusion import BETA_SCHEDULES
from bushpc.sample import Batch

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # ours → diffusers'
PLAIN = "pipeline, fp32"
SAME = 1e-3  # largest difference of two probabilities that is put down to rounding in fp32

Seconds = dict[str, list[float]]  # of every turn, by name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="a divisor of the model's timesteps")
    parser.add_argument("--images", type=int, default=1, help="of a batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each way")
    parser.add_argument("--out", type=Path, default=None, help="folder for diffusion.md and diffusion.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    facts = {**machine(), "threads": torch.get_num_threads()}
    rows = [measure(sampler, arguments) for sampler in ("ddim", "ddpm")]
    result = {
        "images": arguments.images,
        "overrides": arguments.overrides,
        "samplers": rows,
        "one_step": one_step(arguments),
        "machine": facts,
    }
    facts["load_after"] = os.getloadavg()[0]
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "diffusion", report, result)


def measure(sampler: str, arguments: argparse.Namespace) -> dict[str, t.Any]:
    """Seconds of every way, how much faster it is than the plain one, and what it makes."""
    model = make_model(sampler, arguments)
    batch = made_up(model, arguments.images)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        PLAIN: lambda: by_pipeline(model, batch),
        "bushpc, fp32": lambda: ours(model, batch),
        "pipeline, bf16": autocast(lambda: by_pipeline(model, batch)),
        "bushpc, bf16": autocast(lambda: ours(model, batch)),
    }
    with torch.no_grad():  # the pipelines' own decorator
        probs = {name: way() for name, way in ways.items()}  # which also warms them up
        off = {name: (prob_BKHW - probs[PLAIN]).abs() for name, prob_BKHW in probs.items()}
        if off["bushpc, fp32"].max() > SAME:
            raise SystemExit(
                f"{sampler}: the ways differ by {off['bushpc, fp32'].max():.2g}, so their times say nothing"
            )
        wall, cpu = in_turns(ways, arguments.repeats)
    return {
        "sampler": sampler,
        "steps": arguments.steps,
        "samples": model.config.samples,
        "image_size": model.config.image_size,
        "inside": float(((probs[PLAIN] > 0) & (probs[PLAIN] < 1)).float().mean()),
        "ways": {
            name: {
                "s": statistics.median(wall[name]),
                "cpu_s": statistics.median(cpu[name]),
                "faster": median_ratio(wall[PLAIN], wall[name]),
                "cpu_faster": median_ratio(cpu[PLAIN], cpu[name]),
                "largest_off": float(off[name].max()),
                "mean_off": float(off[name].mean()),
            }
            for name in ways
        },
    }


def one_step(arguments: argparse.Namespace) -> dict[str, t.Any]:
    """What a step is made of, in processor seconds: the parts that take turns, and the multiplications alone."""
    model = make_model("ddim", arguments)
    batch = made_up(model, arguments.images)
    sampled = copy.deepcopy(model.unet).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    map_BDhw = torch.randn(1, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        condition = model.condition(batch.image_BCHW).repeated(model.config.samples)
        x_T, _ = model.draw(batch)

        def one_pass(unet: DiffusionUNet) -> torch.Tensor:
            return t.cast(torch.Tensor, unet.noise_head(unet(x_T, torch.tensor([0]), condition)))

        parts: dict[str, Callable[[], torch.Tensor]] = {
            "ViT and enhancers": lambda: model.condition(batch.image_BCHW).stem_BChw,
            "UNet as in training": lambda: one_pass(model.unet),
            "UNet in channels_last": lambda: one_pass(sampled),
            "a convolution": lambda: conv(map_BDhw),
        }
        parts |= {f"{name}, bf16": autocast(part) for name, part in parts.items()}
        for part in parts.values():
            part()
        _, cpu = in_turns(parts, 15)
        work = {"UNet": flops(lambda: one_pass(model.unet)), "a convolution": flops(parts["a convolution"])}
    seconds = {name: statistics.median(each) for name, each in cpu.items()}
    for more in ("", ", bf16"):
        seconds[f"UNet's multiplications{more}"] = (
            work["UNet"] / work["a convolution"] * seconds[f"a convolution{more}"]
        )
    return {"cpu_s": seconds, "gflop": {name: each / 1e9 for name, each in work.items()}}


def ours(model: VitDiffusion, batch: Batch) -> torch.Tensor:
    return t.cast(torch.Tensor, model.predict(batch).prob_BKHW)


def autocast(way: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """As the evaluation with engine.precision=bf16."""

    def wrapped() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return way()

    return wrapped


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> tuple[Seconds, Seconds]:
    """Wall-clock and processor seconds of every turn of every way."""
    wall: Seconds = {name: [] for name in ways}
    cpu: Seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - worked)
    return wall, cpu


def flops(way: Callable[[], object]) -> int:
    """Floating-point operations, a multiplication and its addition being two."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def make_model(sampler: str, arguments: argparse.Namespace) -> VitDiffusion:
    cell = compose(
        [
            *("model=vit_diffusion", "data=phantom", "engine=cpu", "model.pretrained=false"),
            *("model.inference=generative", f"model.sampler={sampler}", f"model.steps={arguments.steps}"),
            *arguments.overrides,
        ]
    )
    return t.cast(VitDiffusion, build_model(cell).eval())


def made_up(model: VitDiffusion, images: int) -> Batch:
    config, noise = model.config, torch.Generator().manual_seed(0)
    size = config.image_size
    return Batch(
        keys=[f"image{i}" for i in range(images)],
        epochs=[0] * images,
        image_BCHW=torch.rand(images, config.channels, size, size, generator=noise),
        mask_BKHW=torch.zeros(images, config.mask_classes, size, size),
        label_B=torch.full((images,), -1),
        conditions={"spatial_prompts": [""] * images, "attribute_prompts": [""] * images, "captions": [""] * images},
    )


class EveryStep(torch.nn.Module):
    """The whole network as a pipeline wants it: x_t and t in, noise out, and nothing remembered in between."""

    def __init__(self, model: VitDiffusion, image_BCHW: torch.Tensor) -> None:
        super().__init__()
        self.model, self.image_BCHW = model, image_BCHW
        self.device, self.dtype = image_BCHW.device, image_BCHW.dtype
        config = model.config
        self.config = types.SimpleNamespace(sample_size=config.image_size, in_channels=config.mask_classes)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> types.SimpleNamespace:
        unet = self.model.unet
        return types.SimpleNamespace(sample=unet.noise_head(unet(x_t, t[None], self.model.condition(self.image_BCHW))))


def by_pipeline(model: VitDiffusion, batch: Batch) -> torch.Tensor:
    """The mean over samples, as `VitDiffusion.predict`."""
    config = model.config
    image_BCHW = batch.image_BCHW.repeat_interleave(config.samples, dim=0)
    shared = {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": BETA_SCHEDULES[config.beta_schedule],
        "prediction_type": PREDICTIONS[config.prediction],
        "timestep_spacing": "trailing",
        "clip_sample": True,
    }
    network, more = EveryStep(model, image_BCHW), {}
    pipeline: t.Any
    if config.sampler == "ddim":
        pipeline, more = DDIMPipeline(network, DDIMScheduler(**shared)), {"use_clipped_model_output": True}
    else:
        pipeline = DDPMPipeline(network, DDPMScheduler(**shared))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        batch_size=len(image_BCHW),
        generator=_fresh(model, batch),
        num_inference_steps=config.steps,
        output_type="np",
        **more,
    )
    prob_BKHW = torch.from_numpy(made.images).permute(0, 3, 1, 2)
    return prob_BKHW.unflatten(0, (-1, config.samples)).mean(dim=1)


def _fresh(model: VitDiffusion, batch: Batch) -> list[torch.Generator]:
    """Generators that have not drawn yet, one for each sample, as `predict` has them."""
    _, generators = model.draw(batch)
    return [torch.Generator().manual_seed(generator.initial_seed()) for generator in generators]


def median_ratio(plain: list[float], way: list[float]) -> float:
    """Of each turn its own ratio: what slows the machine for a while slows both sides of it."""
    return statistics.median(one / other for one, other in zip(plain, way, strict=True))


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    rows = [
        f"| {row['sampler']}, {row['steps']} steps | {name} | {way['s']:.2f} | {way['faster']:.2f} "
        f"| {way['cpu_s']:.2f} | {way['cpu_faster']:.2f} | {way['largest_off']:.0e} | {way['mean_off']:.0e} |"
        for row in result["samplers"]
        for name, way in row["ways"].items()
    ]
    parts = result["one_step"]["cpu_s"]
    steps = [
        f"| {name} | {seconds * 1000:.1f} | {parts[f'{name}, bf16'] * 1000:.1f} |"
        for name, seconds in parts.items()
        if not name.endswith(", bf16")
    ]
    first, work = result["samplers"][0], result["one_step"]["gflop"]
    inside = ", ".join(f"{row['inside']:.0%} with {row['sampler']}" for row in result["samplers"])
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(
        [
            f"ViT-conditioned diffusion, {first['image_size']} x {first['image_size']}, on the CPU, {result['images']} "
            f"image(s), {first['samples']} sample(s) of each; overrides: {' '.join(result['overrides']) or 'none'}. "
            f"Seconds for the batch; times faster than the {PLAIN}; differences of probabilities to it.",
            "",
            "| sampler | way | s | faster | CPU s | faster, CPU | largest difference | mean difference |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Pixels whose probability is neither 0 nor 1: {inside}.",
            "",
            "| once | CPU ms, fp32 | CPU ms, bf16 |",
            "| --- | --- | --- |",
            *steps,
            "",
            f"A pass of the UNet has {work['UNet']:.2f} GFLOP, the convolution (64 channels, 64 x 64) "
            f"{work['a convolution']:.2f}; the UNet's multiplications are its time at that convolution's speed.",
            "",
            f"Machine: {facts}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
