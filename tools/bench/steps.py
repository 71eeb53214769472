"""What bushpc adds to a training step: its whole loop compared with a bare torch loop, on one rank and on two.

    python tools/bench/steps.py [--iterations 60] [--repeats 3] [--out benchmarks/<date>_steps]

Ours is `run_cell` with everything on: loader, ledger, heartbeat, agreement between ranks, checkpoints in the
background. The bare loop has its batches ready in memory: DistributedDataParallel, clipping, AdamW, nothing
else. Same model, same batches per rank, one thread per rank; the two take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, write_result

from bushpc.cell import run_cell
from bushpc.cli import main as bushpc
from bushpc.config import CellConfig, compose
from bushpc.data.batches import training_batches
from bushpc.data.loader import FoldData
from bushpc.dist import World, join, leave, meet, seed_everything
from bushpc.train.optim import adamw

SPAWN = multiprocessing.get_context("spawn")
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="xbusnet_small")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for steps.md and steps.json")
    arguments = parser.parse_args()
    facts = machine()
    folder = Path(tempfile.mkdtemp())
    assert bushpc(["pack", "data=phantom", f"out={folder / 'phantom'}", "count=40"]) == 0
    times: dict[tuple[str, int], list[float]] = {}
    for repeat in range(arguments.repeats):
        for ranks in (1, 2):
            for name, child in (("bushpc", ours), ("bare", bare)):
                cell_dir = make_cell(folder, f"{name}{ranks}-{repeat}", ranks, arguments)
                seconds = step_seconds(child, cell_dir, ranks)
                times.setdefault((name, ranks), []).append(seconds)
                print(f"{name}, {ranks} rank(s): {seconds * 1000:.1f} ms a step", flush=True)
    shutil.rmtree(folder)
    median = {key: statistics.median(values) for key, values in times.items()}
    speedup = {name: median[name, 1] / median[name, 2] for name in ("bushpc", "bare")}
    result = {
        "model": arguments.model,
        "step_ms": {f"{name}, {ranks} rank(s)": 1000 * value for (name, ranks), value in median.items()},
        "ours_over_bare": {ranks: median["bushpc", ranks] / median["bare", ranks] for ranks in (1, 2)},
        "speedup_of_two_ranks": speedup,
        "machine": facts,
    }
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "steps", report, result)


def make_cell(folder: Path, name: str, ranks: int, arguments: argparse.Namespace) -> Path:
    config = compose(
        [
            *(f"model={arguments.model}", "data=phantom", "engine=cpu", "prompts=none", "also_prompts=[]"),
            *(f"data.root={folder / 'phantom'}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}"),
            *(f"cluster.ranks_per_node={ranks}", f"train.iterations={arguments.iterations}", "train.log_every=5"),
            "train.save_every=20",
        ]
    )
    cell_dir = folder / name / "cells" / "fold0"
    cell_dir.mkdir(parents=True)
    (cell_dir / "config.yaml").write_text(dataclasses.replace(config, fold=0, name=name).to_yaml())
    shutil.copy(folder / "phantom" / "folds.csv", folder / name / "folds.csv")
    return cell_dir


def step_seconds(child: Callable[..., None], cell_dir: Path, ranks: int) -> float:
    """Seconds a step takes after the first ones, over all of the rest."""
    processes = [SPAWN.Process(target=child, args=(cell_dir, rank, ranks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [json.loads(line) for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["step"] >= WARM_UP]
    return (last["time"] - first["time"]) / (last["step"] - first["step"])


def rank_of(cell_dir: Path, rank: int, size: int) -> World:
    torch.set_num_threads(1)
    world = World(rank=rank, size=size, local_rank=rank)
    meet(world, cell_dir, "bench")
    return world


def ours(cell_dir: Path, rank: int, size: int) -> None:
    run_cell(cell_dir, rank_of(cell_dir, rank, size))


def bare(cell_dir: Path, rank: int, size: int) -> None:
    """What one writes by hand."""
    world, cell = rank_of(cell_dir, rank, size), CellConfig.load(cell_dir / "config.yaml")
    join(world, cuda=False, timeout_s=0)
    torch.use_deterministic_algorithms(cell.engine.deterministic)
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    batches = [batch.to("cpu") for batch in training_batches(cell, data, world, 0)]
    seed_everything(cell.seed, "init")
    model = cell.model_class(cell.model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = adamw(model, cell.train)
    model.train()
    with (cell_dir / "metrics.jsonl").open("a") if rank == 0 else open(os.devnull, "w") as log:
        for step, batch in enumerate(batches, start=1):
            wrapped(batch).total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cell.train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            if step % cell.train.log_every == 0:
                log.write(json.dumps({"step": step, "time": time.time()}) + "\n")
    leave()


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    rows = [f"| {name} | {value:.1f} |" for name, value in result["step_ms"].items()]
    ratios = ", ".join(f"{ratio:.3f} on {ranks} rank(s)" for ranks, ratio in result["ours_over_bare"].items())
    speedup = ", ".join(f"{name} {value:.3f}" for name, value in result["speedup_of_two_ranks"].items())
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(
        [
            f"{result['model']} on the phantom, CPU, one thread per rank, gloo; median of the repeats.",
            "",
            "| loop | ms per step |",
            "| --- | --- |",
            *rows,
            "",
            f"bushpc's step over the bare loop's: {ratios}.",
            f"Machine: {facts}.",
            f"Speed on two ranks over one, same global batch: {speedup}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
