"""Sampling with ViT-conditioned diffusion beside diffusers' own pipelines over the same network, the ViT in every step.

    python tools/bench/diffusion.py [--steps 20] [--images 1] [--repeats 3] [--out benchmarks/<date>_diffusion_sampling]
        [KEY=VALUE ...]

The model as its yaml has it, with random weights, on made-up images. DDIMPipeline and DDPMPipeline know nothing of what
an image decides once and for all, so their network is ViT, feature enhancers and UNet together. Both ways draw the same
noise, and what they make is compared before a time is believed. They take turns. Times are seconds of wall clock and of
the processor over all threads, which other programs disturb less. Words are overrides, such as model.samples=4.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import types
import typing as t
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, write_result
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from bushpc.config import compose
from bushpc.models.vit_diffusion import BETA_SCHEDULES, VitDiffusion
from bushpc.run import build_model
from bushpc.sample import Batch

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # ours → diffusers'
SAME = 1e-3  # largest difference of two probabilities that is put down to rounding


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
    facts["load_after"] = os.getloadavg()[0]
    result = {"images": arguments.images, "overrides": arguments.overrides, "samplers": rows, "machine": facts}
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "diffusion", report, result)


def measure(sampler: str, arguments: argparse.Namespace) -> dict[str, t.Any]:
    """Seconds of both ways, their ratio of each turn, and what a step is made of."""
    cell = compose(
        [
            *("model=vit_diffusion", "data=phantom", "engine=cpu", "model.pretrained=false"),
            *("model.inference=generative", f"model.sampler={sampler}", f"model.steps={arguments.steps}"),
            *arguments.overrides,
        ]
    )
    model = t.cast(VitDiffusion, build_model(cell).eval())
    batch = made_up(model, arguments.images)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: t.cast(torch.Tensor, model.predict(batch).prob_BKHW),
        "pipeline": lambda: by_pipeline(model, batch),
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():  # the pipelines' own decorator
        ours, plain = ways["ours"](), ways["pipeline"]()  # which also warms both up
        off = float((ours - plain).abs().max())
        if off > SAME:
            raise SystemExit(f"{sampler}: the two ways differ by up to {off:.2g}, so their times say nothing")
        for _ in range(arguments.repeats):
            for name, way in ways.items():
                wall_s, cpu_s = timed(way)
                wall[name].append(wall_s)
                cpu[name].append(cpu_s)
        condition = model.condition(batch.image_BCHW).repeated(model.config.samples)
        x_T, _ = model.draw(batch)
        step = torch.tensor([0])
        once_s = [timed(lambda: model.condition(batch.image_BCHW))[1] for _ in range(5)]
        unet_s = [timed(lambda: model.unet.noise_head(model.unet(x_T, step, condition)))[1] for _ in range(5)]
    return {
        "sampler": sampler,
        "steps": arguments.steps,
        "samples": model.config.samples,
        "image_size": model.config.image_size,
        "off": off,
        "inside": float(((ours > 0) & (ours < 1)).float().mean()),
        **{f"{name}_s": statistics.median(seconds) for name, seconds in wall.items()},
        **{f"{name}_cpu_s": statistics.median(seconds) for name, seconds in cpu.items()},
        "ratio": median_ratio(wall),
        "cpu_ratio": median_ratio(cpu),
        "once_cpu_s": statistics.median(once_s),
        "unet_cpu_s": statistics.median(unet_s),
    }


def made_up(model: VitDiffusion, images: int) -> Batch:
    config, noise = model.config, torch.Generator().manual_seed(0)
    size = config.image_size
    return Batch(
        keys=[f"image{i}" for i in range(images)],
        epochs=[0] * images,
        image_BCHW=torch.rand(images, config.channels, size, size, generator=noise),
        mask_BKHW=torch.zeros(images, config.mask_classes, size, size),
        label_B=torch.full((images,), -1),
        spatial_prompts=[""] * images,
        attribute_prompts=[""] * images,
        captions=[""] * images,
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


def timed(do: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall and of the processor."""
    began, worked = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - began, time.process_time() - worked


def median_ratio(seconds: dict[str, list[float]]) -> float:
    """Of each turn its own ratio: what slows the machine for a while slows both sides of it."""
    turns = zip(seconds["pipeline"], seconds["ours"], strict=True)
    return statistics.median(plain / ours for plain, ours in turns)


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    rows = [
        f"| {row['sampler']} | {row['steps']} | {row['pipeline_s']:.2f} | {row['ours_s']:.2f} | {row['ratio']:.2f} | "
        f"{row['pipeline_cpu_s']:.2f} | {row['ours_cpu_s']:.2f} | {row['cpu_ratio']:.2f} | {row['once_cpu_s']:.3f} | "
        f"{row['unet_cpu_s']:.3f} | {row['off']:.0e} | {row['inside']:.0%} |"
        for row in result["samplers"]
    ]
    first = result["samplers"][0]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(
        [
            f"ViT-conditioned diffusion, {first['image_size']} x {first['image_size']}, fp32 on the CPU, "
            f"{result['images']} image(s), {first['samples']} sample(s) of each; overrides: "
            f"{' '.join(result['overrides']) or 'none'}. Seconds for the batch.",
            "",
            "| sampler | steps | pipeline, s | bushpc, s | ratio | pipeline, CPU s | bushpc, CPU s | ratio of CPU "
            "| ViT and enhancers once, CPU s | UNet once, CPU s | largest difference | pixels neither 0 nor 1 |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Machine: {facts}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
