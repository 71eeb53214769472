"""What the benchmarks share: the work that every loader does per sample, timing, the machine's facts, results."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import time
import typing as t
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def decoded(image_png: bytes, mask_png: bytes, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (S, S, 3) and mask (S, S), uint8, resized as bushpc does it: the same work for every peer."""
    from bushpc.data.square import resize

    with Image.open(io.BytesIO(image_png), formats=["PNG"]) as image:
        image_HWC = np.array(image.convert("RGB"))
    with Image.open(io.BytesIO(mask_png), formats=["PNG"]) as mask:
        mask_HW = np.array(mask.convert("L"))
    return resize(image_HWC, mask_HW, size)


def first_and_later(epoch: Callable[[], int], at_least_s: float) -> dict[str, float]:
    """Images a second of the first epoch and of those after it, which are repeated for `at_least_s` seconds.

    epoch: delivers one epoch, returns its number of images; what it has to start, it starts when called first.
    """
    began = time.perf_counter()
    first = epoch() / (time.perf_counter() - began)
    began, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < at_least_s:
        images += epoch()
    return {"first": first, "later": images / passed}


def machine() -> dict[str, t.Any]:
    """Facts that a result is worth nothing without. load: runnable processes over the last minute."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() + (" and uncommitted changes" if changed.stdout.strip() else ""),
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_result(out: Path, name: str, report: str, result: dict[str, t.Any]) -> None:
    """`name`.md for people and `name`.json for programs, below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(report)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
