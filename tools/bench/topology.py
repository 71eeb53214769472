"""The topological loss, compared with the plain way: gudhi's complexes, cofaces and Wasserstein distance in turn.

    python tools/bench/topology.py [--batch 16] [--size 256] [--repeats 3] [--out benchmarks/<date>_topology]

Value and gradient for a batch of pairs of maps that look like a diffusion model's predictions: lesions with soft
borders, plus noise of several grains. The two take turns; what they return is compared before a time is believed.
The plain way's automatic differentiation needs eagerpy, which bushpc does not:

    pip install --no-deps --target /tmp/eagerpy eagerpy==0.30.0
    PYTHONPATH=/tmp/eagerpy python tools/bench/topology.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import typing as t
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gudhi
import numpy as np
import torch
from common import machine, write_result
from gudhi.wasserstein import wasserstein_distance
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from bushpc.losses.topology import topological_loss


@dataclass(frozen=True)
class Case:
    """Noise in logits, whose correlation length is `grain` pixels (0: every pixel its own)."""

    grain: float
    noise: float
    downsample: int = 1


CASES = (
    Case(grain=4, noise=0.1),
    Case(grain=4, noise=0.5),
    Case(grain=4, noise=2),
    Case(grain=2.5, noise=0.5),
    Case(grain=2, noise=0.5),
    Case(grain=1.5, noise=0.5),
    # At full size the plain way would want gigabytes and many minutes for each pair of these.
    Case(grain=0, noise=0.5, downsample=4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of ours; the plain way: 1")
    parser.add_argument("--out", type=Path, default=None, help="folder for topology.md and topology.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = machine()
    rows = [measure(case, arguments) for case in CASES]
    facts["load_after"] = os.getloadavg()[0]
    result = {"batch": arguments.batch, "size": arguments.size, "threads": arguments.threads, "cases": rows}
    report = table(result | {"machine": facts})
    print(report)
    if arguments.out:
        write_result(arguments.out, "topology", report, result | {"machine": facts})


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, t.Any]:
    """Seconds per batch of both ways, by the wall and of all cores together."""
    maps = predictions(case, arguments.batch, arguments.size)
    ways = {
        "ours": lambda a, b: topological_loss(a, b, downsample=case.downsample).sum(),
        "plain": lambda a, b: plain_loss(a, b, case.downsample),
    }
    once(ways["ours"], maps)  # imports, threads
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        (loss, *slopes), seconds = once(ways["ours"], maps)
        timed["ours"].append(seconds)
        (reference, *reference_slopes), seconds = once(ways["plain"], maps)
        timed["plain"].append(seconds)
        torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
        # Where birth and death are off by exactly the same, L∞ has a kink and each way its own subgradient.
        off = sum(int(((x - y).abs() > 1e-6).sum()) for x, y in zip(slopes, reference_slopes, strict=True))
        of = sum(int(torch.count_nonzero(y)) for y in reference_slopes)
        assert off <= 1e-3 * of, f"{off} of {of} slopes differ"
    wall, cpu = ({name: statistics.median(x[i] for x in turns) for name, turns in timed.items()} for i in (0, 1))
    row = {
        "grain": case.grain,
        "noise": case.noise,
        "downsample": case.downsample,
        "points": points(maps[0], case.downsample),
        "loss": float(loss),
        "slopes": of,
        "slopes_off": off,
        "plain_s": wall["plain"],
        "ours_s": wall["ours"],
        "ratio": wall["plain"] / wall["ours"],
        "plain_cpu_s": cpu["plain"],
        "ours_cpu_s": cpu["ours"],
        "cpu_ratio": cpu["plain"] / cpu["ours"],
    }
    print(row, flush=True)
    return row


def predictions(case: Case, batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two predictions each of `batch` masks, (B, 1, H, W): the noise of the second is partly that of the first."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    pairs = []
    for _ in range(batch):
        logit = np.full((size, size), -4.0)
        for _ in range(random.integers(1, 4)):
            (cy, cx), radius = random.uniform(0.2, 0.8, 2), random.uniform(0.05, 0.2)
            logit = np.maximum(logit, 4 - 8 * np.hypot(y - cy, x - cx) / (2 * radius))
        first, other = (grains(random, size, case.grain) for _ in range(2))
        pairs.append([logit + case.noise * first, logit + case.noise * (0.95 * first + 0.3 * other)])
    both = torch.tensor(np.array(pairs), dtype=torch.float32).sigmoid()
    return both[:, :1].contiguous(), both[:, 1:].contiguous()


def grains(random: np.random.Generator, size: int, grain: float) -> np.ndarray:
    noise = random.standard_normal((size, size))
    noise = gaussian_filter(noise, grain) if grain else noise
    return noise / noise.std()


def once(
    way: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], maps: tuple[torch.Tensor, torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], tuple[float, float]]:
    """(loss, its two gradients), (wall seconds, CPU seconds)."""
    a, b = (x.clone().requires_grad_() for x in maps)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = way(a, b)
    loss.backward()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    assert a.grad is not None
    assert b.grad is not None
    return (loss.detach().double(), a.grad, b.grad), seconds


def plain_loss(a_BKHW: torch.Tensor, b_BKHW: torch.Tensor, downsample: int) -> torch.Tensor:
    """The same loss, summed over the batch, as gudhi's documentation would have one write it."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in zip(*(F.avg_pool2d(x, downsample)[:, 0] for x in (a_BKHW, b_BKHW)), strict=True):
        (a_points, a_birth), (b_points, b_birth) = map(plain_diagrams, pair)
        total = total + (a_birth - b_birth).abs()
        for p, q in zip(a_points, b_points, strict=True):
            total = total + wasserstein_distance(
                p, q, order=1, internal_p=np.inf, enable_autodiff=True, keep_essential_parts=False
            )
    return total


def plain_diagrams(map_HW: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Diagrams of dimensions 0 and 1, and the birth of the class that never dies."""
    complex_ = gudhi.CubicalComplex(top_dimensional_cells=-map_HW.detach().double().numpy())
    complex_.compute_persistence()
    finite, essential = complex_.cofaces_of_persistence_pairs()
    cells = -map_HW.double().T.flatten()  # gudhi counts cells column by column
    return [cells[torch.from_numpy(pairs).long()] for pairs in finite], cells[int(essential[0][0])]


def points(maps_BKHW: torch.Tensor, downsample: int) -> list[int]:
    """Median number of points in the diagrams of dimensions 0 and 1."""
    diagrams = [plain_diagrams(x)[0] for x in F.avg_pool2d(maps_BKHW, downsample)[:, 0]]
    return [int(statistics.median(map(len, one))) for one in zip(*diagrams, strict=True)]


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    rows = [
        f"| {row['grain']} | {row['noise']} | {row['downsample']} | {row['points'][0]} + {row['points'][1]} | "
        f"{row['plain_s'] * 1e3:.0f} | {row['ours_s'] * 1e3:.0f} | **{row['ratio']:.1f}** | "
        f"{row['plain_cpu_s'] * 1e3:.0f} | {row['ours_cpu_s'] * 1e3:.0f} | {row['cpu_ratio']:.1f} |"
        for row in result["cases"]
    ]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(
        [
            f"Topological loss and its gradients, {result['batch']} pairs of {result['size']} x {result['size']} maps, "
            f"ours on {result['threads']} threads. Loss and gradients are equal to 1e-6, but for "
            f"{max(row['slopes_off'] / row['slopes'] for row in result['cases']):.1e} of the slopes at most, which lie "
            "at kinks.",
            "",
            "Plain: gudhi.CubicalComplex, cofaces, gudhi.wasserstein with automatic differentiation, one by one. CPU "
            "time adds up all cores, so its ratio leaves out what threads gain, and other load on the machine.",
            "",
            "| grain, px | noise, logits | downsample | points in dimension 0 + 1 | plain, ms | ours, ms | ratio "
            "| plain, CPU ms | ours, CPU ms | CPU ratio |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Machine: {facts}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
