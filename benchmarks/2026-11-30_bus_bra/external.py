"""Dice at home and on BrEaST with 95 % intervals over patients: `python external.py <run folder>`.

At home each image has its own fold's model. On BrEaST an image has the mean of the five models.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

DRAWS, SEED = 10_000, 0
STRADDLING = {f"bus_{case}-{side}" for case in ("0044", "0065", "0341", "0356") for side in "lr"}


def dice_by_image(files: list[Path]) -> tuple[dict[str, float], dict[str, str]]:
    values, patients = defaultdict(list), {}
    for file in files:
        for row in csv.DictReader(file.open()):
            if row["dice"]:
                values[row["key"]].append(float(row["dice"]))
                patients[row["key"]] = row["patient"]
    return {key: float(np.mean(each)) for key, each in values.items()}, patients


def with_interval(dice: dict[str, float], patients: dict[str, str]) -> str:
    sums, counts = defaultdict(float), defaultdict(int)
    for key, value in dice.items():
        sums[patients[key]] += value
        counts[patients[key]] += 1
    sum_P, count_P = np.array(list(sums.values())), np.array(list(counts.values()))
    drawn_DP = np.random.default_rng(SEED).integers(0, len(sum_P), (DRAWS, len(sum_P)))
    means_D = sum_P[drawn_DP].sum(axis=1) / count_P[drawn_DP].sum(axis=1)
    low, high = np.percentile(means_D, [2.5, 97.5])
    return f"{sum_P.sum() / count_P.sum():.3f} ({low:.3f} to {high:.3f}), {len(dice)} images of {len(sum_P)} patients"


for row in ("unet", "hybrid"):
    cells = sorted(Path(sys.argv[1]).glob(f"cells/{row}-fold*"))
    home, patients = dice_by_image([cell / "per_image.csv" for cell in cells])
    print(f"{row}: BUS-BRA {with_interval(home, patients)}")
    rest = {key: value for key, value in home.items() if key not in STRADDLING}
    print(f"{row}: BUS-BRA without the straddling cases {with_interval(rest, patients)}")
    print(f"{row}: BrEaST {with_interval(*dice_by_image([cell / 'external/breast.csv' for cell in cells]))}")
