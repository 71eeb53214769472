"""Masks are scored on the network's grid and, if asked, on the original scans; every figure's column names its grid."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from bushpc.cell import run_cell
from bushpc.config import compose
from bushpc.dist import World
from bushpc.errors import ConfigError
from bushpc.metrics.mask import MaskPair
from bushpc.metrics.registry import METRICS, mask_metrics
from bushpc.models.baselines import UNet
from bushpc.shards.manifest import Manifest, read_mask
from tests.evaluate.conftest import TINY_UNET


def rows_of(cell_dir: Path) -> dict[str, dict[str, str]]:
    with (cell_dir / "per_image.csv").open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def test_a_shift_of_one_pixel_of_the_network_is_1_network_px_and_1_95_px_of_a_scan_of_500() -> None:
    mask = np.zeros((256, 256))
    mask[100:140, 100:140] = 1
    pair = MaskPair(
        prob=np.roll(mask, 1, axis=1),
        mask=mask,
        pixel={"px": (500 / 256, 500 / 256)},
        tolerance={"px": 1.0},
    )
    found = mask_metrics(pair, ["hd95_network_px", "hd95_px"])
    assert found == {"hd95_network_px": 1.0, "hd95_px": pytest.approx(500 / 256)}
    assert (METRICS["hd95_network_px"].unit, METRICS["hd95_px"].unit) == ("network px", "px")


def test_original_figures_are_those_of_the_enlarged_map_against_the_packed_mask(make_cell, phantom_folder, monkeypatch):
    seen: dict[str, np.ndarray] = {}
    predict = UNet.predict

    def listens(model, batch):
        prediction = predict(model, batch)
        seen.update(zip(batch.keys, prediction.prob_BKHW[:, 0].numpy(), strict=True))
        return prediction

    monkeypatch.setattr(UNet, "predict", listens)
    cells = {name: make_cell(name, *TINY_UNET, f"evaluate.resolution={name}") for name in ("network", "original")}
    for cell_dir in cells.values():
        assert run_cell(cell_dir, World()) is None
    network, original = (rows_of(cell_dir) for cell_dir in cells.values())
    manifest = Manifest.load(phantom_folder)
    assert len(original) > 2
    for key, row in original.items():
        assert {name: row[name] for name in network[key]} == network[key], "the network's grid keeps its columns"
        mask_HW = read_mask(phantom_folder, manifest.record(key))
        # Pillow's bilinear filter is antialiased, too; pixels next to the threshold may fall on its other side.
        there = np.asarray(Image.fromarray(seen[key]).resize(mask_HW.shape[::-1], Image.Resampling.BILINEAR))
        two = torch.from_numpy((there >= 0.5).astype(int)), torch.from_numpy(mask_HW.astype(int))
        assert float(row["dice_original"]) == pytest.approx(float(binary_f1_score(*two)), abs=1e-3)
        assert float(row["iou_original"]) == pytest.approx(float(binary_jaccard_index(*two)), abs=1e-3)
        assert {f"{name}_original" for name in ("fpr", "fnr", "hd95_px", "dice_2class")} <= set(row)
    assert any(row["dice_original"] != row["dice"] for row in original.values()), "the case is degenerate"


def test_a_grid_that_is_not_at_hand_and_a_name_that_the_setting_gives_are_refused() -> None:
    words = ("model=unet_small", "data=phantom", "cluster=local")
    with pytest.raises(ConfigError, match=r"evaluate.resolution=original with data.stream"):
        compose([*words, "evaluate.resolution=original", "data.stream=/mnt/phantom/"])
    with pytest.raises(ConfigError, match=r"name dice, and set evaluate.resolution=original"):
        compose([*words, "evaluate.metrics=[dice_original]"])
    with pytest.raises(ConfigError, match=r"evaluate.resolution"):
        compose([*words, "evaluate.resolution=native"])
