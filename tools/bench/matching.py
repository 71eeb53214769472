"""Matching the persistence diagrams of noise: the sparse way beside the assignment that is exact, in one run.

    python tools/bench/matching.py [--size 256] [--out benchmarks/<date>_matching]

The maps are what an untrained diffusion network makes of one lesion at the steps t and t - 50, as the topological
consistency of ViT-conditioned diffusion compares them, and two maps of unrelated noise. Seconds of the processor.
"""

from __future__ import annotations

import argparse
import time
import typing as t
from pathlib import Path

import numpy as np
from common import machine, write_result

from bushpc.losses import matching, topology

LOOKBACK = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="edge of the maps in pixels")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[50, 200, 600], help="t, of 1000 with a linear schedule"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for matching.md and matching.json")
    arguments = parser.parse_args()
    facts = machine()
    generator = np.random.default_rng(0)
    noise = [generator.random((arguments.size, arguments.size), dtype=np.float32) for _ in range(2)]
    cases = {f"t = {step}": estimates(step, arguments.size) for step in arguments.steps} | {"unrelated noise": noise}
    rows = [row for name, maps in cases.items() for row in compare(name, maps)]
    report = table(rows, facts)
    print(report)
    if arguments.out:
        write_result(arguments.out, "matching", report, {"machine": facts, "size": arguments.size, "cases": rows})


def estimates(step: int, size: int) -> list[np.ndarray]:
    """x'_0 in [0, 1] at `step` and LOOKBACK steps before, from one noise, of which the network sees a tenth."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    y, x = np.mgrid[:size, :size] / size - 0.5
    mask = np.where((x / 0.25) ** 2 + (y / 0.17) ** 2 < 1, 1.0, -1.0)
    noise = 0.9 * np.random.default_rng(0).standard_normal((size, size))
    moments = (step, max(0, step - LOOKBACK))
    return [np.clip((mask + noise * (1 / kept[at] - 1) ** 0.5 + 1) / 2, 0, 1).astype(np.float32) for at in moments]


def compare(name: str, maps: list[np.ndarray]) -> t.Iterator[dict[str, t.Any]]:
    """A row for components and one for holes."""
    (_, first), (_, second) = (topology._persistence(one, 0.0) for one in maps)
    for kind, a, b in zip(("components", "holes"), first, second, strict=True):
        points = [np.column_stack([side.m_N, side.h_N]) for side in topology._without_common(a, b)]
        sparse, sparse_s = timed(points, exact_pairs=matching.EXACT_PAIRS)
        exact, exact_s = timed(points, exact_pairs=10**12)
        yield {
            **{"maps": name, "points": kind, "first": len(points[0]), "second": len(points[1])},
            **{"exact_s": exact_s, "sparse_s": sparse_s, "above": sparse / exact - 1},
        }


def timed(points: list[np.ndarray], exact_pairs: int) -> tuple[float, float]:
    """Cost of the matching, and seconds of the processor."""
    kept, matching.EXACT_PAIRS = matching.EXACT_PAIRS, exact_pairs
    began = time.process_time()
    i, j = matching.match(*points)
    seconds = time.process_time() - began
    matching.EXACT_PAIRS = kept
    a, b = points
    left = np.delete(a[:, 1], i).sum() + np.delete(b[:, 1], j).sum()
    return float(np.abs(a[i] - b[j]).sum() + left), seconds


def table(rows: list[dict[str, t.Any]], facts: dict[str, t.Any]) -> str:
    lines = [
        "| maps | points | number | exact, s | sparse, s | ratio | above the least cost |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['maps']} | {row['points']} | {row['first']} and {row['second']} | {row['exact_s']:.2f} | "
            f"{row['sparse_s']:.2f} | {row['exact_s'] / row['sparse_s']:.1f} | {100 * row['above']:.2f} % |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n\nMachine: " + ", ".join(f"{name} {value}" for name, value in facts.items()) + ".\n"


if __name__ == "__main__":
    main()
