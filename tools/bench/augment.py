"""Processor time of augmentation per scan: bushpc's one warp beside torchvision's transforms (bushpc before), and
albumentations doing the same changes.

    python tools/bench/augment.py [--albumentations-python PYTHON] [--out benchmarks/<date>_augment]

The same changes everywhere: left-right flip, rotation by up to 15 degrees, zoom by up to 10 %, brightness and contrast
by up to 20 %, of a grey scan of three equal channels and its mask. All ways run on one thread, in turn, several
times over; ratios are those of the same turn, and their median counts, so that other load
weighs on all. PYTHON has albumentations and opencv-python-headless: it is no dependency of bushpc.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import typing as t
from pathlib import Path

from common import ROOT, machine, write_result

USUAL = ("augment.hflip=0.5", "augment.rotate=15", "augment.zoom=0.1", "augment.brightness=0.2", "augment.contrast=0.2")
# Name in the table → words of a run, or the peer.
WAYS: dict[str, tuple[str, ...]] = {
    "torchvision, one after the other (bushpc before)": ("augment.method=torchvision", *USUAL),
    "bushpc, light": ("augment=light",),
    "bushpc, light, colour scan": ("augment=light", "colour"),
    "bushpc, nnunet": ("augment=nnunet",),
    "bushpc, trivial": ("augment=trivial",),
    "bushpc, ultrasound": ("augment=ultrasound",),
}
BEFORE, NOW, PEER, PEER_GREY = (*list(WAYS)[:2], "albumentations", "albumentations, one channel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=352)
    parser.add_argument("--scans", type=int, default=400, help="of each way in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--albumentations-python", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for augment.md and augment.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        for line in sys.stdin:
            print(json.dumps(measure(line.strip(), asked.size, asked.scans)), flush=True)
        return
    here = child(sys.executable, asked)
    measurers = dict.fromkeys(WAYS, here)
    if asked.albumentations_python:
        measurers |= dict.fromkeys((PEER, PEER_GREY), child(asked.albumentations_python, asked))
    found: dict[str, list[dict[str, t.Any]]] = {name: [] for name in measurers}
    for _ in range(asked.repeats):
        for name, process in measurers.items():
            found[name].append(ask(process, name))
    for process in {id(process): process for process in measurers.values()}.values():
        process.communicate()
    result = {"machine": machine(), "size": asked.size, "scans": asked.scans, "ways": found}
    report = table(result)
    print(report)
    if asked.out:
        write_result(asked.out, "augment", report, result)


def child(python: Path | str, asked: argparse.Namespace) -> subprocess.Popen[str]:
    """A process on one thread that measures the ways that it is asked for."""
    words = ["--child", "--size", str(asked.size), "--scans", str(asked.scans)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
    return subprocess.Popen(
        [str(python), __file__, *words], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen[str], name: str) -> dict[str, t.Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(name + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} could not be measured, see above")
    made: dict[str, t.Any] = json.loads(line)
    return made


def measure(name: str, size: int, scans: int) -> dict[str, t.Any]:
    """ms of processor time a scan."""
    change, versions = albumentations(size, name == PEER_GREY) if name.startswith(PEER) else ours(name, size)
    for i in range(40):
        change(i)
    began = time.process_time()
    for i in range(scans):
        change(i)
    return {"ms": (time.process_time() - began) / scans * 1e3, "versions": versions}


def picture(size: int) -> tuple[t.Any, t.Any]:
    """A smooth grey scan of three channels and a round lesion."""
    import cv2
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 3).astype(np.float32)
    smooth = ((blurred - blurred.min()) * (255 / np.ptp(blurred))).astype(np.uint8)
    y, x = np.mgrid[:size, :size] / size
    mask = ((x - 0.45) ** 2 + (y - 0.5) ** 2 < 0.03).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(smooth[..., None], 3, axis=2)), mask


def ours(name: str, size: int) -> tuple[t.Callable[[int], t.Any], dict[str, str]]:
    """One scan at a time, as the loader's worker does it for a batch."""
    from types import SimpleNamespace

    import cv2
    import torch

    from bushpc.config import compose
    from bushpc.data.augment import Augment

    torch.set_num_threads(1)
    words = [word for word in WAYS[name] if word != "colour"]
    augment = Augment(compose(["model=unet_small", "data=phantom", "cluster=local", *words]).augment)
    image_SSC, mask_SS = picture(size)
    if "colour" in WAYS[name]:
        image_SSC[..., 0] //= 2
    records = [t.cast(t.Any, SimpleNamespace(key=str(number), label="benign")) for number in range(20)]
    return (
        lambda i: augment.batch([image_SSC], [mask_SS], [records[i % 20]], 0, [i]),
        {"torch": torch.__version__, "cv2": cv2.__version__},
    )


def albumentations(size: int, grey: bool) -> tuple[t.Callable[[int], t.Any], dict[str, str]]:
    """Its own transforms for the same changes, composed as its documentation does."""
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    transform = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(rotate=(-15, 15), scale=(0.9, 1.1), interpolation=cv2.INTER_LINEAR, p=1),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=1),
        ]
    )
    image, mask = picture(size)
    if grey:
        image = image[..., :1].copy()
    return lambda i: transform(image=image, mask=mask), {"albumentations": A.__version__, "cv2": cv2.__version__}


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    ways, size = result["ways"], result["size"]

    def ratio(slow: str, fast: str) -> float:
        turns = zip(ways[slow], ways[fast], strict=True)
        return statistics.median(one["ms"] / other["ms"] for one, other in turns)

    lines = [
        f"Processor time of augmenting a scan and its mask at {size} x {size}, one thread; medians of "
        f"{len(ways[NOW])} repeats in turn.",
        "",
        ", ".join(f"{name} {value}" for name, value in result["machine"].items()),
        "",
        "| way | ms a scan | scans a second and core | times faster than before | versions |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, runs in ways.items():
        ms = statistics.median(run["ms"] for run in runs)
        versions = ", ".join(f"{each} {number}" for each, number in runs[0]["versions"].items())
        lines.append(f"| {name} | {ms:.2f} | {1000 / ms:.0f} | {ratio(BEFORE, name):.1f} | {versions} |")
    lines += ["", f"- Before / bushpc, light: {ratio(BEFORE, NOW):.1f} (wanted: 10 or more)"]
    if PEER in ways:
        lines.append(f"- albumentations / bushpc, light: {ratio(PEER, NOW):.1f} (wanted: 1.5 or more)")
        lines.append(f"- albumentations on one channel / bushpc, light: {ratio(PEER_GREY, NOW):.1f}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
