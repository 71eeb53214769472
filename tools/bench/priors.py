"""Lesion masks of the clinical prior, compared with the plain way: one scipy warp of the whole frame per mask.

    OMP_NUM_THREADS=1 python tools/bench/priors.py [--size 512] [--masks 10000] [--out benchmarks/<date>_priors]

The plain way draws the same ellipses, smooths a field of white noise for each axis (gaussian_filter) to the deviation
and about the grain of ours, and warps the frame with it (map_coordinates); it promises neither that a lesion stays in
the frame nor in one piece. The two take turns. Seconds are the process's own CPU time: other programs do not count.
What the prior's masks are like is then counted over `--masks` of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import typing as t
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import machine, write_result
from scipy import ndimage

from bushpc.config import compose_command
from bushpc.dist import keyed_seed
from bushpc.generate.config import GenerateConfig
from bushpc.generate.priors import FARTHEST, INTERVALS, Drawn, Priors

QUANTILES = (0.05, 0.5, 0.95)
# Of a uniform cubic B-spline over independent control points: mean deviation of its values, against theirs.
SPLINE_DEVIATION = 0.48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--masks", type=int, default=10_000, help="for the statistics")
    parser.add_argument("--turn", type=int, default=200, help="masks of ours in a turn; of the plain way a tenth")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--out", type=Path, default=None, help="folder for priors.md and priors.json")
    arguments = parser.parse_args()
    priors = Priors(compose_command(GenerateConfig, "generate", []).priors, arguments.size, seed=0)
    facts = machine()
    speed = measure(priors, arguments.turn, arguments.repeats)
    drawn = [figures(priors(index)) for index in range(arguments.masks)]
    plain = [figures(plain_mask(priors, index)) for index in range(arguments.masks // 50)]
    facts["load_after"] = os.getloadavg()[0]
    result = {
        "size": arguments.size,
        "masks": arguments.masks,
        "speed": speed,
        "prior": [summary(drawn, label) for label in ("benign", "malignant")],
        "plain": [summary(plain, label) for label in ("benign", "malignant")],
        "machine": facts,
    }
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "priors", report, result)


def measure(priors: Priors, turn: int, repeats: int) -> dict[str, float]:
    """Masks per second of CPU time, the median over turns."""
    ways: dict[str, tuple[Callable[[int], Drawn], int]] = {
        "prior": (priors, turn),
        "plain": (lambda index: plain_mask(priors, index), turn // 10),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way, _ in ways.values():
        way(0)
    for repeat in range(repeats):
        for name, (way, count) in ways.items():
            began = time.process_time()
            for index in range(repeat * count, (repeat + 1) * count):
                way(index)
            rates[name].append(count / (time.process_time() - began))
    return {name: statistics.median(found) for name, found in rates.items()}


def plain_mask(priors: Priors, index: int) -> Drawn:
    """The same ellipse, warped by smoothed noise over the whole frame."""
    drawn = priors(index)
    attributes: dict[str, t.Any] = drawn.attributes
    a, b, x0, y0, sigma = (attributes[name] for name in ("a", "b", "x0", "y0", "sigma"))
    rng = np.random.default_rng(keyed_seed(0, "plain", index))
    shape = (priors.size, priors.size)
    y_SS, x_SS = np.mgrid[: priors.size, : priors.size]
    ellipse_SS = (((x_SS - x0) / a) ** 2 + ((y_SS - y0) / b) ** 2 <= 1).astype(np.float32)
    grain = [2 * (half + FARTHEST * sigma * min(a, b)) / INTERVALS / 1.5 for half in (b, a)]
    moves = []
    for _ in range(2):
        noise = ndimage.gaussian_filter(rng.standard_normal(shape), grain)
        moves.append(noise / noise.std() * SPLINE_DEVIATION * sigma * min(a, b))
    warped = ndimage.map_coordinates(ellipse_SS, [y_SS + moves[0], x_SS + moves[1]], order=1)
    return drawn._replace(mask_SS=(warped >= 0.5).astype(np.uint8))


def figures(drawn: Drawn) -> dict[str, t.Any]:
    """What is counted of one mask."""
    mask_SS = drawn.mask_SS
    rows, columns = np.nonzero(mask_SS)
    box_YX = mask_SS[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    attributes: dict[str, t.Any] = drawn.attributes
    a, b, x0, y0 = (attributes[name] for name in ("a", "b", "x0", "y0"))
    y_SS, x_SS = np.ogrid[: len(mask_SS), : len(mask_SS)]
    ellipse_SS = ((x_SS - x0) / a) ** 2 + ((y_SS - y0) / b) ** 2 <= 1
    outside = np.pad(1 - box_YX, 1, constant_values=1)
    inside = rows.min() > 0 and columns.min() > 0 and max(rows.max(), columns.max()) < len(mask_SS) - 1
    return {
        "label": drawn.label,
        "size": attributes["size"],
        "aspect": box_YX.shape[1] / box_YX.shape[0],
        "area": float(mask_SS.mean()),
        "iou": float((mask_SS & ellipse_SS).sum() / (mask_SS | ellipse_SS).sum()),
        "pieces": ndimage.label(box_YX)[1],
        "holes": ndimage.label(outside, np.ones((3, 3)))[1] - 1,
        "touches_edge": not inside,
    }


def summary(found: list[dict[str, t.Any]], label: str) -> dict[str, object]:
    """Of one class: shares, and 5 %, 50 % and 95 % quantiles."""
    of_label = [each for each in found if each["label"] == label]
    sizes = [each["size"] for each in of_label]
    return {
        "label": label,
        "masks": len(of_label),
        "sizes": {size: sizes.count(size) for size in sorted(set(sizes))},
        **{
            name: [float(q) for q in np.quantile([each[name] for each in of_label], QUANTILES)]
            for name in ("aspect", "area", "iou")
        },
        "wider": float(np.mean([each["aspect"] > 1 for each in of_label])),
        "taller": float(np.mean([each["aspect"] < 1 for each in of_label])),
        "in_pieces": sum(each["pieces"] != 1 for each in of_label),
        "with_holes": sum(each["holes"] != 0 for each in of_label),
        "at_the_edge": sum(each["touches_edge"] for each in of_label),
    }


def table(result: dict[str, t.Any]) -> str:
    speed = result["speed"]
    lines = [
        f"# Lesion masks of {result['size']} x {result['size']} pixels",
        "",
        f"{speed['prior']:.0f} masks per second of one core with attributes and caption; the plain way "
        f"{speed['plain']:.1f}: {speed['prior'] / speed['plain']:.0f} times as many.",
        "",
        "| masks | class | n | small, medium, large | width / height, 5 % · median · 95 % | wider | taller "
        "| area in % of the frame | IoU with the ellipse | in pieces | with holes | at the edge |",
        "|---|---|---:|---|---|---:|---:|---|---|---:|---:|---:|",
    ]
    for way in ("prior", "plain"):
        for row in result[way]:
            sizes = ", ".join(str(row["sizes"].get(size, 0)) for size in ("small", "medium", "large"))
            aspect, iou = (" · ".join(f"{q:.2f}" for q in row[name]) for name in ("aspect", "iou"))
            area = " · ".join(f"{100 * q:.1f}" for q in row["area"])
            lines.append(
                f"| {way} | {row['label']} | {row['masks']} | {sizes} | {aspect} | {row['wider']:.1%} "
                f"| {row['taller']:.1%} | {area} | {iou} | {row['in_pieces']} | {row['with_holes']} "
                f"| {row['at_the_edge']} |"
            )
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return "\n".join([*lines, "", facts])


if __name__ == "__main__":
    main()
