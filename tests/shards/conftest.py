"""A tiny folder in BrEaST's layout, oddities included, made from nothing: 3 lesions and a normal scan."""

from __future__ import annotations

import typing as t
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import yaml
from PIL import Image

from bushpc.shards.card import PROJECT_SHARDS

IMAGES = "BrEaST-Lesions_USG-images_and_masks"
SHEET = "BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx"


class Breast:
    """The folder, and what can be done to it. `rows` are the spreadsheet's cells by column; `save` writes them."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards, self.images = folder, shards, folder / IMAGES
        self.images.mkdir(parents=True)
        shards.mkdir()
        self.card = yaml.safe_load((PROJECT_SHARDS / "breast" / "card.yaml").read_text())
        self.card["counts"] = {"benign": 2, "malignant": 1, "normal": 1}
        self.card["files"] = {"*.xlsx": 1, f"{IMAGES}/case*_tumor.png": 3}
        self.columns: list[str] = ["CaseID", *self.card["columns"]]
        self.rows = [
            self._row(case, label) for case, label in enumerate(("benign", "malignant", "benign", "normal"), 1)
        ]
        self.save()

    def _row(self, case: int, label: str) -> dict[str, t.Any]:
        rng = np.random.default_rng(case)
        grey = rng.integers(1, 256, (20 + case, 30), dtype=np.uint8)
        rgba = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
        rgba[:3, :5, 3] = 0  # transparent, with bright pixels hidden under it
        Image.fromarray(rgba).save(self.images / f"case{case:03d}.png")
        row: dict[str, t.Any] = dict.fromkeys(self.columns, "not available")
        row |= {"CaseID": case, "Image_filename": f"case{case:03d}.png", "Mask_tumor_filename": None}
        row |= {"Mask_other_filename": None, "Pixel_size": 0.0075, "BIRADS": 2, "Classification": label}
        if label != "normal":
            mask = np.zeros((20 + case, 30, 4), np.uint8)
            mask[5:12, 8:19] = 255
            mask[5, 8] = (255, 255, 255, 75)  # nearly transparent edge pixel
            Image.fromarray(mask).save(self.images / f"case{case:03d}_tumor.png")
            row |= {"Mask_tumor_filename": f"case{case:03d}_tumor.png", "Shape": "oval"}
        return row

    def save(self) -> None:
        book = openpyxl.Workbook()
        book.active.append(self.columns)
        for row in self.rows:
            book.active.append([row[column] for column in self.columns])
        book.save(self.folder / SHEET)
        (self.shards / "card.yaml").write_text(yaml.safe_dump(self.card))


@pytest.fixture
def breast(tmp_path: Path) -> Breast:
    return Breast(tmp_path / "raw", tmp_path / "shards")
