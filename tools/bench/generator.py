"""A training step of the tumor generator's LoRA, and generation, compared with diffusers' own scripts and pipeline.

    python tools/bench/generator.py [--scale 4] [--size 256] [--batch 4] [--steps 10] [--repeats 5]
        [--out benchmarks/<date>_generator]

Stable Diffusion v1.5's own shape with all widths and heads divided by --scale (1, 2 or 4), random weights, made-up
images, so that shares of VAE, text encoder, ControlNet and UNet are about those of the full size. A step of diffusers'
script (train_text_to_image_lora.py) encodes image and caption each time; ours reads kept moments and embeddings, and
all else is the same: ControlNet, UNet with adapters, backward, clipping, AdamW. Both draw the same numbers, and their
losses, and the images of both ways of generation, are compared before a time is believed. Ways take turns; times are
wall clock and of the processor.
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
from torch.nn import functional as F

from bushpc.config import compose
from bushpc.models.tumor_generator import TumorGenerator, TumorGeneratorConfig, clip_tokenizer
from bushpc.sample import Batch

SAME = 1e-4  # largest difference of two losses or images that is put down to rounding
CAPTION = "breast ultrasound image of {} tumor with {} echogenicity and {} boundary"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="1 is Stable Diffusion v1.5's own size")
    parser.add_argument("--size", type=int, default=256, help="edge of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images of a step, and of a batch that is generated")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler, a divisor of 1000")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each way")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for scale<scale>.md and .json")
    arguments = parser.parse_args()
    facts = {**machine(), "threads": torch.get_num_threads(), "device": arguments.device}
    torch.manual_seed(0)
    model = TumorGenerator(shaped(arguments)).to(arguments.device)
    with torch.no_grad():  # a ControlNet that is not zero
        for parameter in model.controlnet.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = made_up(model, arguments.batch).to(arguments.device)
    result = {
        "settings": {name: getattr(arguments, name) for name in ("scale", "size", "batch", "steps", "repeats")},
        "training": training(model.train(), batch, arguments.repeats),
        "generation": generation(model.eval(), batch, arguments.repeats),
        "machine": facts | {"load_after": os.getloadavg()[0]},
    }
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, f"scale{arguments.scale}", report, result)


def shaped(arguments: argparse.Namespace) -> TumorGeneratorConfig:
    """The paper's settings at stage `lora`, every width divided."""
    config = t.cast(TumorGeneratorConfig, compose(["model=tumor_generator", "data=phantom", "engine=cpu"]).model)
    divided = {
        name: tuple(width // arguments.scale for width in getattr(config, name))
        for name in ("vae_channels", "unet_channels", "mask_channels")
    }
    fields = vars(config) | divided
    # The heads too, so that each keeps its width: attention's share would grow otherwise.
    for name in ("unet_heads", "text_width", "text_heads", "groups"):
        fields[name] = getattr(config, name) // arguments.scale
    fields |= {"pretrained": False, "stage": "lora", "caption_dropout": 0.0}
    return TumorGeneratorConfig(**{**fields, "image_size": arguments.size, "steps": arguments.steps})


def made_up(model: TumorGenerator, count: int) -> Batch:
    size, noise = model.config.image_size, torch.Generator().manual_seed(0)
    mask_BKHW = torch.zeros(count, 1, size, size)
    mask_BKHW[:, :, size // 3 : size // 2, size // 4 : 3 * size // 4] = 1
    words = [("benign", "homogeneous", "clear"), ("malignant", "heterogeneous", "unclear")]
    return Batch(
        keys=[f"image{i}" for i in range(count)],
        epochs=[0] * count,
        image_BCHW=torch.rand(count, 3, size, size, generator=noise),
        mask_BKHW=mask_BKHW,
        label_B=torch.tensor([i % 2 for i in range(count)]),
        conditions={
            "spatial_prompts": [""] * count,
            "attribute_prompts": [""] * count,
            "captions": [CAPTION.format(*words[i % 2]) for i in range(count)],
        },
    )


# --- training ---------------------------------------------------------------------------------------------------


def training(model: TumorGenerator, batch: Batch, repeats: int) -> dict[str, t.Any]:
    """Both ways a step from the same weights; what VAE and text encoder cost alone."""
    kept = Batch(**{**vars(batch), "features": model.features(batch.image_BCHW)})
    ids = clip_tokenizer()(
        batch.conditions["captions"], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    ids = ids.to(batch.image_BCHW.device)
    parts, mask_BCHW = model.pipeline(), batch.mask_BKHW.expand(-1, 3, -1, -1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)

    def step(loss_of: Callable[[], torch.Tensor]) -> float:
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    def theirs() -> torch.Tensor:
        with torch.no_grad():
            latents = parts.vae.encode(2 * batch.image_BCHW - 1).latent_dist.sample() * parts.vae.config.scaling_factor
        timesteps = torch.randint(1000, (len(latents),))
        torch.rand(len(latents))  # as our draw of captions to leave out
        noise = torch.randn(latents.shape, device=latents.device)
        timesteps = timesteps.to(latents.device)
        noisy = parts.scheduler.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            embeddings = parts.text_encoder(ids)[0]
        return F.mse_loss(model.denoise(noisy, timesteps, embeddings, mask_BCHW), noise)

    ways = {"ours": lambda: step(lambda: model(kept).total), "diffusers": lambda: step(theirs)}
    before = [parameter.detach().clone() for parameter in trained]
    losses = {}
    for name, way in ways.items():  # which also warms both up
        losses[name] = way()
        optimizer.state.clear()
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
    agree("losses", abs(losses["ours"] - losses["diffusers"]))
    with torch.no_grad():
        alone = {
            "vae_cpu_s": lambda: parts.vae.encode(batch.image_BCHW),
            "text_encoder_cpu_s": lambda: parts.text_encoder(ids),
        }
        seconds = {name: statistics.median(timed(do)[1] for _ in range(3)) for name, do in alone.items()}
    return {**in_turns(ways, repeats), **seconds, "trained": sum(map(torch.numel, trained)), "loss": losses["ours"]}


# --- generation -------------------------------------------------------------------------------------------------


def generation(model: TumorGenerator, batch: Batch, repeats: int) -> dict[str, t.Any]:
    """One batch, by `generate` and by the pipeline, which is also asked image by image."""
    count, config = len(batch.keys), model.config
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    mask_BCHW = batch.mask_BKHW.expand(-1, 3, -1, -1)

    def by_pipeline(part: slice) -> torch.Tensor:
        made: torch.Tensor = pipeline(
            batch.conditions["captions"][part],
            image=mask_BCHW[part],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)[part]],
            output_type="pt",
        ).images
        return made

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: model.generate(batch.mask_BKHW[:, 0], batch.conditions["captions"], list(range(count))),
        "diffusers": lambda: by_pipeline(slice(None)),
        "one by one": lambda: torch.cat([by_pipeline(slice(i, i + 1)) for i in range(count)]),
    }
    made = {name: way() for name, way in ways.items()}
    for name in ("diffusers", "one by one"):
        agree(f"images of {name}", float((made["ours"] - made[name]).abs().max()))
    return {**in_turns(ways, repeats), "deviation": float(made["ours"].std())}


# --- times ------------------------------------------------------------------------------------------------------


def agree(what: str, off: float) -> None:
    if not off <= SAME:
        raise SystemExit(f"{what}: the ways differ by {off:.2g}, so their times say nothing")


def in_turns(ways: dict[str, Callable[[], t.Any]], repeats: int) -> dict[str, t.Any]:
    """Median seconds of each way, and its ratio to ours: of each turn its own, as what slows one slows all of them."""
    turns = [{name: timed(way) for name, way in ways.items()} for _ in range(repeats)]
    found: dict[str, t.Any] = {}
    for name in ways:
        for clock, unit in enumerate(("s", "cpu_s")):
            found[f"{name} {unit}"] = statistics.median(turn[name][clock] for turn in turns)
            found[f"{name} ratio {unit}"] = statistics.median(turn[name][clock] / turn["ours"][clock] for turn in turns)
    return found


def timed(do: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall and of the processor."""
    began, worked = time.perf_counter(), time.process_time()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - worked


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    given, trained, made = result["settings"], result["training"], result["generation"]

    def row(title: str, of: dict[str, t.Any], name: str) -> str:
        numbers = [of[f"{name} s"], of[f"{name} cpu_s"], of[f"{name} ratio s"], of[f"{name} ratio cpu_s"]]
        return f"| {title} | {' | '.join(f'{number:.2f}' for number in numbers)} |"

    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(
        [
            f"Stable Diffusion v1.5's shape, widths divided by {given['scale']}, {given['size']} x {given['size']} "
            f"pixels, fp32, batches of {given['batch']}, random weights.",
            "",
            "| | s | CPU s | s, ratio to bushpc | CPU s, ratio to bushpc |",
            "| --- | ---: | ---: | ---: | ---: |",
            row("LoRA step, bushpc: moments and embeddings kept", trained, "ours"),
            row("LoRA step, diffusers' script: VAE and text encoder in each", trained, "diffusers"),
            row(f"{given['batch']} images, {given['steps']} steps, bushpc", made, "ours"),
            row(f"{given['batch']} images, {given['steps']} steps, diffusers' pipeline", made, "diffusers"),
            row("the same, image by image", made, "one by one"),
            "",
            f"Of a step of diffusers' script the VAE's encoder takes {trained['vae_cpu_s']:.2f} and the text encoder "
            f"{trained['text_encoder_cpu_s']:.2f} CPU seconds. {trained['trained']:,} parameters train.",
            "",
            f"Machine: {facts}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
