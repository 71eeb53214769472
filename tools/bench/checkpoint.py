"""How long a save holds up the training loop, compared with torch.save and Accelerate's save_state of the same state.

    python tools/bench/checkpoint.py [--model xbusnet] [--repeats 7] [--out benchmarks/<date>_checkpoint]

All three write to the same folder, in turn, after a step that touched every tensor. Ours returns when the state is
copied and is written, hashed and flushed behind the loop's back: that time is given too, as is the stall of a save
that comes while the one before is still being written.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, write_result

from bushpc.config import compose
from bushpc.dist import World
from bushpc.runs.retention import Retention
from bushpc.runs.saver import Saver
from bushpc.sample import Batch
from bushpc.train.engine import Engine, start_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="xbusnet")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--out", type=Path, default=None, help="folder for result.md and result.json")
    arguments = parser.parse_args()
    facts = machine()
    cell = compose(
        [f"model={arguments.model}", "data=phantom", "model.pretrained=false", "engine=cpu", "train.batch_size=2"]
    )
    start_ranks(cell, World())
    engine = Engine(cell, World(), cell.model_class(cell.model))
    engine.train()
    one_step(engine, cell.model.image_size)
    size = sum(tensor.numel() * tensor.element_size() for _, _, tensor in engine.tensors())

    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    saver = Saver(folder / "ours", Retention(keep=1), still_ours=lambda: None)
    meta: dict[str, t.Any] = {"config": "bench", "settings": {}, "frozen": None}
    steps = iter(range(1, 1000))

    def ours() -> None:
        saver.save(next(steps), engine.tensors(), meta)

    ranks: t.Any = engine._ranks
    accelerator, optimizer = ranks.accelerator, ranks.optimizer
    ways: dict[str, Callable[[], object]] = {
        "bushpc": ours,
        "torch.save": lambda: torch.save(
            {"model": engine.model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "torch.pt"
        ),
        "accelerate save_state": lambda: accelerator.save_state(str(folder / "accelerate")),
    }
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    written: list[float] = []
    for repeat in range(arguments.repeats + 1):
        for name, save in ways.items():
            stall = seconds(save)
            saver.finish()
            if repeat:  # the first one makes folders and buffers
                stalls[name].append(stall)
        written.append(saver.written_s[-1])
    ours()
    busy = seconds(ours)
    saver.finish()
    shutil.rmtree(folder)

    median = {name: statistics.median(times) for name, times in stalls.items()}
    result = {
        "model": arguments.model,
        "state_mb": round(size / 1e6, 1),
        "repeats": arguments.repeats,
        "stall_s": median,
        "all_s": stalls,
        "share_of_torch_save": median["bushpc"] / median["torch.save"],
        "share_of_save_state": median["bushpc"] / median["accelerate save_state"],
        "written_behind_s": statistics.median(written[1:]),
        "stall_while_writing_s": busy,
        "machine": facts,
    }
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "checkpoint", report, result)


def one_step(engine: Engine, image_size: int) -> None:
    """Makes AdamW's state."""
    engine.losses(
        Batch(
            keys=["a", "b"],
            epochs=[0, 0],
            image_BCHW=torch.rand(2, 3, image_size, image_size),
            mask_BKHW=torch.ones(2, 1, image_size, image_size),
            label_B=torch.zeros(2, dtype=torch.long),
            conditions={
                "spatial_prompts": ["a small lesion in the upper inner quadrant of the breast", ""],
                "attribute_prompts": ["oval shape", ""],
                "captions": [""] * 2,
            },
        )
    )
    engine.update(1e-4)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    lines = [
        f"State of {result['model']} with AdamW: {result['state_mb']} MB; median of {result['repeats']} saves.",
        "",
        "| way to save | loop waits (s) | ours / theirs |",
        "| --- | --- | --- |",
    ]
    for name, stall in result["stall_s"].items():
        ratio = result["stall_s"]["bushpc"] / stall
        lines.append(f"| {name} | {stall:.3f} | {'' if name == 'bushpc' else f'{ratio:.3f}'} |")
    lines += [
        "",
        f"Written, hashed and flushed behind the loop in {result['written_behind_s']:.2f} s; a save that comes while "
        f"the one before is being written waits {result['stall_while_writing_s']:.2f} s.",
        "",
        "Machine: " + ", ".join(f"{name} {value}" for name, value in result["machine"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
