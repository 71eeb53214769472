"""Promises of a mixture: synthetic scans train and are never validated, each once an epoch, as many as asked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import yaml

from bushpc.cell import run_cell
from bushpc.config import CellConfig, compose
from bushpc.data.batches import training_batches, validation_batches
from bushpc.data.loader import FoldData
from bushpc.data.mixture import PREFIX, open_synthetic
from bushpc.data.square import resize
from bushpc.dispatch.plan import cv_plan
from bushpc.dist import World
from bushpc.errors import ConfigError, DataError
from bushpc.ops.audit import audit_run
from bushpc.shards.manifest import Manifest, read_image

UNET = ("model=unet_small", "model.image_size=64")


@pytest.fixture
def mixed(make_cell, synthetic_folder):
    """mixed("data.real=false", …) → a tiny cell that trains on the synthetic folder besides, and its data."""

    def make(*overrides: str, name: str = "mixed"):
        cell_dir = make_cell(name, *UNET, f"data.synthetic={synthetic_folder}", *overrides)
        cell = CellConfig.load(cell_dir / "config.yaml")
        return cell, FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")

    return make


def divided(records):
    """(real keys, synthetic keys without their prefix)"""
    keys = [record.key for record in records]
    return [k for k in keys if not k.startswith(PREFIX)], [k.removeprefix(PREFIX) for k in keys if k.startswith(PREFIX)]


def test_a_mixture_is_the_real_part_and_the_first_synthetic_scans_for_each_of_it(mixed, make_cell, synthetic_folder):
    _, alone = mixed("data.synthetic_ratio=0")
    real, none = divided(alone.train)
    assert (len(real), none) == (len(alone.train), [])
    folder = [record.key for record in Manifest.load(synthetic_folder).lesions]
    for ratio in (0.5, 1.0):
        _, data = mixed(f"data.synthetic_ratio={ratio}", name=f"ratio{ratio}")
        assert divided(data.train) == (real, folder[: round(ratio * len(real))])
        assert [record.key for record in data.validation] == [record.key for record in alone.validation]
    _, data = mixed("data.real=false", name="synthetic_only")
    assert divided(data.train) == ([], folder[: len(real)])


def test_every_scan_of_both_folders_comes_once_an_epoch_with_its_own_pixels(mixed, phantom_folder, synthetic_folder):
    cell, data = mixed()
    count = len(data.train)
    cell = dataclasses.replace(cell, train=dataclasses.replace(cell.train, iterations=-(-count // 4)))
    keys: Counter[str] = Counter()
    for batch in training_batches(cell, data, World(), 0):
        for key, epoch, image_CHW in zip(batch.keys, batch.epochs, batch.image_BCHW, strict=True):
            folder = synthetic_folder if key.startswith(PREFIX) else phantom_folder
            record = Manifest.load(folder).record(key.removeprefix(PREFIX))
            image_HWC = read_image(folder, record)
            expected_HWC, _ = resize(image_HWC, np.zeros(image_HWC.shape[:2], np.uint8), 64)
            assert torch.equal(image_CHW.permute(1, 2, 0), torch.from_numpy(expected_HWC))
            keys[key] += epoch == 0
    assert keys == Counter(record.key for record in data.train)
    for batch in validation_batches(cell, data, "none", World()):
        assert not any(key.startswith(PREFIX) for key in batch.keys)


def test_the_global_batches_of_a_mixture_do_not_depend_on_ranks(mixed):
    cell, data = mixed()
    whole = [batch.keys for batch in training_batches(cell, data, World(), 0)]
    ranks = [[b.keys for b in training_batches(cell, data, World(rank=r, size=2), 0)] for r in range(2)]
    assert whole == [[key for pair in zip(*step, strict=True) for key in pair] for step in zip(*ranks, strict=True)]


def test_a_mixture_trains_to_its_end_and_its_ledger_proves_it(make_cell, synthetic_folder):
    cell_dir = make_cell("run", *UNET, "train.iterations=10", f"data.synthetic={synthetic_folder}")
    assert run_cell(cell_dir, World()) is None
    run_dir = cell_dir.parent.parent
    sha256 = hashlib.sha256((run_dir / "folds.csv").read_bytes()).hexdigest()
    run = {"folds": {"sha256": sha256}, "cells": [{"name": cell_dir.name, "fold": 0}]}
    (run_dir / "run.json").write_text(json.dumps(run))
    (audit,) = audit_run(run_dir).cells
    assert (audit.verdict, audit.epochs, audit.samples) == ("exact", 1, 40)
    assert PREFIX not in (cell_dir / "per_image.csv").read_text()
    config = yaml.safe_load((cell_dir / "config.yaml").read_text())
    config["data"]["synthetic_ratio"] = 0.5
    (cell_dir / "config.yaml").write_text(yaml.safe_dump(config))
    (audit,) = audit_run(run_dir).cells
    assert any("a synthetic scan beyond data.synthetic_ratio" in found for found in audit.violations)


def words(phantom_folder, *more):
    return [*UNET, "data=phantom", f"data.root={phantom_folder}", *more]


def test_a_cell_is_known_by_its_synthetic_scans_and_not_by_where_they_lie(phantom_folder, synthetic_folder, tmp_path):
    shutil.copytree(synthetic_folder, tmp_path / "copy")
    here, there = (
        cv_plan(compose(words(phantom_folder, f"data.synthetic={folder}")))
        for folder in (synthetic_folder, tmp_path / "copy")
    )
    assert {name: cell.hash for name, cell in here.cells.items()} == {n: c.hash for n, c in there.cells.items()}
    assert here.first.data.synthetic_sha256 == Manifest.load(synthetic_folder).hash
    assert here.first.name == there.first.name
    plain = cv_plan(compose(words(phantom_folder)))
    unmixed = cv_plan(compose(words(phantom_folder, f"data.synthetic={synthetic_folder}", "data.synthetic_ratio=0")))
    assert (plain.first.hash, plain.first.name) == (unmixed.first.hash, unmixed.first.name)
    assert here.first.hash != plain.first.hash
    assert here.first.name != plain.first.name


def test_each_fold_takes_the_generators_that_trained_on_it(phantom_folder, synthetic_folder, tmp_path):
    for fold in range(5):
        shutil.copytree(synthetic_folder, tmp_path / "of_folds" / f"fold{fold}")
    plan = cv_plan(compose(words(phantom_folder, f"data.synthetic={tmp_path / 'of_folds'}")))
    assert [cell.data.synthetic for cell in plan.cells.values()] == [
        str(tmp_path / "of_folds" / f"fold{fold}") for fold in range(5)
    ]
    shutil.rmtree(tmp_path / "of_folds" / "fold3")
    with pytest.raises(DataError, match=r"of_folds/fold3/manifest.json does not exist"):
        cv_plan(compose(words(phantom_folder, f"data.synthetic={tmp_path / 'of_folds'}")))


def test_no_fold_trains_on_what_a_generator_remembers_of_its_validation_part(
    phantom_folder, synthetic_folder, tmp_path
):
    made = tmp_path / "made"
    shutil.copytree(synthetic_folder, made)
    trained = {
        "manifest_sha256": Manifest.load(phantom_folder).hash,
        "folds_sha256": hashlib.sha256((phantom_folder / "folds.csv").read_bytes()).hexdigest(),
        "fold": 2,
        "data": None,
    }

    def plan(*more, **changes):
        (made / "generate.json").write_text(json.dumps({"trained_on": [{**trained, **changes}]}))
        return cv_plan(compose(words(phantom_folder, f"data.synthetic={made}", *more)))

    with pytest.raises(DataError, match=r"was trained on scans of fold 0's validation part, in fold 2\."):
        plan()
    assert plan("fold=2").wanted == ["fold2"]
    with pytest.raises(DataError, match=r"in fold 2 of other folds"):
        plan("fold=2", folds_sha256="0" * 64)
    assert len(plan(manifest_sha256="0" * 64).wanted) == 5  # trained on another dataset
    with pytest.raises(DataError, match=r"validation part, in fold 2\."):
        plan(manifest_sha256="0" * 64, data="phantom")  # the same one, packed in another way
    (made / "generate.json").unlink()
    with pytest.raises(DataError, match=r"made has no generate\.json"):
        cv_plan(compose(words(phantom_folder, f"data.synthetic={made}")))


def test_epochs_count_what_trains(phantom_folder, synthetic_folder):
    counted = words(phantom_folder, "train.epochs=2", "train.batch_size=1")
    alone, both = (
        cv_plan(compose([*counted, *more])).cells["fold0"].train.iterations
        for more in ((), (f"data.synthetic={synthetic_folder}",))
    )
    assert both == 2 * alone


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.synthetic_ratio=2"], r"data.synthetic_ratio=2 without data.synthetic"),
        (["data.real=false"], r"nothing is left to train on"),
        (["data.synthetic=x", "data.synthetic_ratio=-1"], r"data.synthetic_ratio=-1: must be ≥ 0"),
        (["data.synthetic=x", "data.synthetic_ratio=0", "data.real=false"], r"nothing is left to train on"),
        (["data.synthetic=x", "data.stream=y/"], r"a stream delivers one dataset"),
        (
            ["data.synthetic=x", "data.real=false", "train.stop_patience=2", "train.holdout=0.2"],
            r"the held-out scans are real ones",
        ),
        (["resume_changes=[data.synthetic_ratio]"], r"would skip some and repeat others"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_when_composed(phantom_folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(words(phantom_folder, *overrides))


def test_too_few_synthetic_scans_are_refused_before_the_queue_with_the_number_needed(phantom_folder, synthetic_folder):
    count = len(Manifest.load(synthetic_folder).lesions)
    with pytest.raises(DataError, match=rf"data.synthetic has {count}. Generate at least \d\d"):
        cv_plan(compose(words(phantom_folder, f"data.synthetic={synthetic_folder}", "data.synthetic_ratio=2")))
    with pytest.raises(DataError, match=r"comes to 0 synthetic ones"):
        cv_plan(compose(words(phantom_folder, f"data.synthetic={synthetic_folder}", "data.synthetic_ratio=0.001")))


def test_real_scans_do_not_pass_for_synthetic_ones(phantom_folder):
    with pytest.raises(DataError, match="not marked as synthetic"):
        cv_plan(compose(words(phantom_folder, f"data.synthetic={phantom_folder}")))


def test_scans_made_anew_are_not_those_that_a_run_began_with(synthetic_folder):
    with pytest.raises(DataError, match="its scans have been regenerated"):
        open_synthetic(synthetic_folder, 0, "0" * 64)


def test_scans_of_other_mask_classes_cannot_train_besides(phantom_folder, synthetic_folder):
    real = dataclasses.replace(Manifest.load(phantom_folder), mask_classes=["disc", "cup"])
    with pytest.raises(DataError, match="has the mask classes lesion, but phantom has disc, cup"):
        open_synthetic(synthetic_folder, 0).added_to(real)
