"""Small cohorts of six scans in the layouts that `bushpc shards import` reads, made from nothing."""

from __future__ import annotations

import csv
import typing as t
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (20, 31)  # rows, columns; rows x columns is no multiple of 8, as bits of DICOM SEG are packed
LABELS = {"s1": "B", "s2": "M", "s3": "B", "s4": "M", "s5": "B", "s6": "N"}
PATIENTS = {"s1": "P1", "s2": "P1", "s3": "P2", "s4": "P3", "s5": "P4", "s6": "P5"}
MEANINGS = "labels=B:benign,M:malignant,N:normal"
PACKED = {"B": "benign", "M": "malignant", "N": "normal"}


def image_of(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).integers(1, 256, (*SIZE, 3), dtype=np.uint8)


def mask_of(name: str) -> np.ndarray:
    """0 and 1; empty for the normal scan. No mask looks like its mirror image."""
    mask = np.zeros(SIZE, np.uint8)
    if LABELS[name] != "N":
        number = int(name[1])
        mask[number : number + 6, 2 * number : 2 * number + 9] = 1
        mask[number, 2 * number] = 0
    return mask


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def table(path: Path, rows: t.Iterable[t.Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_folder(folder: Path) -> list[str]:
    """Layout (a) with columns of other names; returns the words that map it."""
    for name in LABELS:
        save(folder / "frames" / f"{name}.png", image_of(name))
        if LABELS[name] != "N":
            save(folder / "contours" / f"{name}_roi.png", mask_of(name) * 255)
    rows = [["scan", "pid", "dx", "BI-RADS", "physician"]]
    rows += [[name, PATIENTS[name], LABELS[name], "4a", "Dr X"] for name in LABELS]
    table(folder / "list.csv", rows)
    return ["images=frames", "masks=contours", "table=list.csv", "patients=pid", "label=dx", MEANINGS]
