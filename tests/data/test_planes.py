"""Promises of datasets beyond one lesion in RGB: classes that overlap, four channels, no labels, normal scans."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from torchmetrics.functional.classification import binary_f1_score

from bushpc.cell import run_cell
from bushpc.config import CellConfig, compose
from bushpc.data.batches import training_batches, validation_batches
from bushpc.data.loader import FoldData
from bushpc.dist import World
from bushpc.errors import DataError
from bushpc.sample import LABELS, UNLABELLED, Sample
from bushpc.shards.card import PROJECT_SHARDS
from bushpc.shards.manifest import Manifest, read_image, read_mask
from bushpc.shards.sources import phantom
from bushpc.shards.split import ensure_folds
from bushpc.shards.write import pack

SIZE = 32  # the images', so that resizing changes nothing
CLASSES = ["core", "rim", "whole"]


def scan(item) -> Sample:
    """Four channels of noise; core and rim overlap in a column, and whole is both of them and more."""
    rng = np.random.default_rng(item.recipe.index)
    core, rim = np.zeros((2, SIZE, SIZE), bool)
    core[8:20, 6:15], rim[8:20, 14:24] = True, True
    whole = core | rim
    whole[20:26, 10:20] = True
    mask_HW = sum(plane.astype(np.uint8) << bit for bit, plane in enumerate((core, rim, whole)))
    return Sample(
        key=item.key,
        patient=f"patient{item.recipe.patient}",
        label=UNLABELLED,
        image_HWC=rng.integers(0, 256, (SIZE, SIZE, 4), np.uint8),
        mask_HW=mask_HW,
    )


def open_cell(folder: Path, tmp_path: Path, *overrides: str) -> tuple[CellConfig, FoldData]:
    cell = compose(
        [
            *("model=unet_small", "data=phantom", "cluster=local", f"model.image_size={SIZE}", "augment.hflip=0"),
            *("augment.rotate=0", "augment.zoom=0", "augment.brightness=0", "augment.contrast=0", "fold=0"),
            *("train.iterations=4", "train.batch_size=4", "loader.workers=0", f"data.root={folder}"),
            *(f"loader.cache_dir={tmp_path / 'cache'}", *overrides),
        ]
    )
    return cell, FoldData.open(cell, 0, folder / "folds.csv")


@pytest.fixture
def classes(tmp_path, monkeypatch) -> Path:
    """11 such scans, packed."""
    monkeypatch.setattr(phantom, "load", scan)
    folder = tmp_path / "classes"
    folder.mkdir()
    card = yaml.safe_load((PROJECT_SHARDS / "phantom" / "card.yaml").read_text())
    card |= {"mask_classes": CLASSES, "channels": ["flair", "t1", "t1ce", "t2"]}
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    plan = phantom.plan
    unlabelled = lambda *args, **how: plan(*args, **how)._replace(  # noqa: E731
        items=[type(item)(key=item.key, label=UNLABELLED, recipe=item.recipe) for item in plan(*args, **how).items]
    )
    monkeypatch.setattr(phantom, "plan", unlabelled)
    ensure_folds(folder, pack("phantom", None, folder, parameters={"count": 11, "normals": 0}))
    return folder


def test_tars_and_batches_hold_every_class_and_channel_as_the_source_gave_them(classes, tmp_path):
    manifest = Manifest.load(classes)
    assert (manifest.mask_classes, len(manifest.channels)) == (CLASSES, 4)
    cell, data = open_cell(classes, tmp_path)
    streamed, _ = open_cell(classes, tmp_path, f"data.stream={classes}/")
    seen = set()
    for batch in [
        *training_batches(cell, data, World(), 0),
        *validation_batches(cell, data, "none", World()),
        *validation_batches(streamed, data, "none", World()),
    ]:
        assert batch.label_B.tolist() == [-1] * len(batch.keys)
        for key, image_CHW, mask_KHW in zip(batch.keys, batch.image_BCHW, batch.mask_BKHW, strict=True):
            record = manifest.record(key)
            image_HWC, mask_HW = read_image(classes, record), read_mask(classes, record)
            assert torch.equal(image_CHW, torch.from_numpy(image_HWC).permute(2, 0, 1))
            planes = np.unpackbits(mask_HW[None], axis=0, bitorder="little")[:3]
            assert torch.equal(mask_KHW, torch.from_numpy(planes))
            assert (planes[0] & planes[1]).any()
            assert record.lesion_pixels == np.count_nonzero(mask_HW) == planes[2].sum()
            assert record.lesion_length == 18
            seen.add(key)
    assert seen == {record.key for record in manifest.records}


def test_every_class_is_scored_by_its_own_map_and_their_mean_stands_for_all(classes, tmp_path):
    tiny = ("patch=4", "widths=[8,8]", "depth=1", "acb=false", "steps=2", "samples=2")
    modes = ("inference=generative", "sampler=ddim", "channels=4", "mask_classes=3")
    config, _ = open_cell(
        *(classes, tmp_path, "model=vit_diffusion_small", *(f"model.{word}" for word in (*tiny, *modes))),
        *(
            "evaluate.metrics=[dice,hd95_px,betti_error]",
            "evaluate.explain=0",
            "train.iterations=2",
            "train.epochs=null",
        ),
    )
    cell_dir = tmp_path / "run" / "cells" / "fold0"
    cell_dir.mkdir(parents=True)
    (cell_dir / "config.yaml").write_text(replace(config, name="run").to_yaml())
    shutil.copy(classes / "folds.csv", tmp_path / "run" / "folds.csv")
    assert run_cell(cell_dir, World()) is None

    manifest, maps = Manifest.load(classes), cell_dir / "predictions" / "none"
    rows = pd.read_csv(cell_dir / "per_image.csv")
    assert len(rows) >= 2
    for _, row in rows.iterrows():
        planes = np.unpackbits(read_mask(classes, manifest.record(row["key"]))[None], axis=0, bitorder="little")[:3]
        found = [np.asarray(Image.open(maps / name / f"{row['key']}.png")) >= 128 for name in ("", "rim", "whole")]
        dices = [
            binary_f1_score(torch.from_numpy(ours).int(), torch.from_numpy(plane).int()).item()
            for ours, plane in zip(found, planes, strict=True)
        ]
        assert [row[f"dice:{name}"] for name in CLASSES] == pytest.approx(dices)
        assert row["dice"] == pytest.approx(np.mean(dices))
        assert row["hd95_px"] == pytest.approx(np.mean([row[f"hd95_px:{name}"] for name in CLASSES]))
        assert row["betti_error"] == pytest.approx(np.mean([row[f"betti_error:{name}"] for name in CLASSES]))
        assert row["tp"] == sum((ours & (plane > 0)).sum() for ours, plane in zip(found, planes, strict=True))
        for name in ("", "rim", "whole"):
            deviation = np.asarray(Image.open(maps / name / "uncertainty" / f"{row['key']}.png"))
            assert deviation.any()  # two samples differ somewhere
    pixels = pd.read_csv(cell_dir / "calibration.csv")["pixels"].sum()
    assert pixels == len(rows) * 3 * SIZE * SIZE


def test_a_model_gets_floats_of_them(classes, tmp_path):
    cell, data = open_cell(classes, tmp_path)
    batch = next(iter(validation_batches(cell, data, "none", World()))).to("cpu")
    assert batch.image_BCHW.dtype == batch.mask_BKHW.dtype == torch.float32
    assert set(batch.mask_BKHW.unique().tolist()) == {0.0, 1.0}
    assert batch.image_BCHW.shape[1:] == (4, SIZE, SIZE)
    assert batch.mask_BKHW.shape[1:] == (3, SIZE, SIZE)


def test_normal_scans_train_and_validate_where_data_normals_asks(phantom_folder, tmp_path):
    """All are in one part of a fold or the other; a size bin is of lesions, so they change none."""
    _, without = open_cell(phantom_folder, tmp_path, "model=xbusnet_small")  # it reads the sentences compared below
    cell, data = open_cell(phantom_folder, tmp_path, "model=xbusnet_small", "data.normals=true")
    normal = {record.key for record in data.manifest.records if record.label == "normal"}
    assert len(normal) == 4
    held = [{record.key for record in part} for part in (data.train, data.validation)]
    assert normal <= held[0] | held[1]
    assert held[1] & normal
    for part, lesions in zip(held, (without.train, without.validation), strict=True):
        assert part - normal == {record.key for record in lesions}
    assert data.conditions == without.conditions
    for batch in validation_batches(cell, data, "oracle", World()):
        for key, label, mask_KHW, prompt in zip(
            batch.keys, batch.label_B.tolist(), batch.mask_BKHW, batch.conditions["spatial_prompts"], strict=True
        ):
            assert (key in normal) == (label == LABELS.index("normal")) == (not mask_KHW.any()) == (prompt == "")


def test_normal_scans_that_the_fold_file_leaves_out_are_refused_with_the_way_on(phantom_folder, tmp_path):
    folder = Path(shutil.copytree(phantom_folder, tmp_path / "published"))
    lines = (folder / "folds.csv").read_text().splitlines(keepends=True)
    (folder / "folds.csv").write_text("".join(line for line in lines if ",normal," not in line))
    open_cell(folder, tmp_path)
    with pytest.raises(DataError, match=r"data.normals=true, but .*folds\.csv contains lesions only.*folds=frozen"):
        open_cell(folder, tmp_path, "data.normals=true")
    ensure_folds(folder, Manifest.load(folder))  # a packing of this version deals them
    assert open_cell(folder, tmp_path, "data.normals=true")
