"""Promises about features of frozen parts: computed once, whole, by all together, and the same as without the store."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bushpc.cell import build_model, run_cell
from bushpc.config import CellConfig, compose
from bushpc.data import feature_files, features
from bushpc.data.batches import training_batches, validation_batches
from bushpc.data.cache import DecodingStopped
from bushpc.data.features import compute_features
from bushpc.data.loader import FoldData
from bushpc.dist import World
from bushpc.errors import ConfigError, DataError
from bushpc.files import write_atomically
from bushpc.models.sam_multitask import FrozenEncoder

FROZEN = (
    *("model=sam_multitask_small", "model.encoder=frozen", "model.image_size=64", "data.normals=false"),
    *(
        "train.epochs=null",
        "train.iterations=6",
        "train.batch_size=4",
        "model.curriculum=[1,1,1]",
        "evaluate.explain=0",
    ),
    *(f"augment.{change}=0" for change in ("hflip", "rotate", "zoom", "brightness", "contrast")),
    *("evaluate.metrics=[dice,label_ce]", "evaluate.batch_size=8"),
)
VARIED = ("augment.variants=2", "augment.strength.benign=0", "augment.hflip=1", "augment.rotate=20")


@pytest.fixture
def setting(make_cell, tmp_path, monkeypatch):
    """setting(*overrides) → (cell, model, data) with features in tmp_path/features; 20 samples in groups of 8."""
    monkeypatch.setattr(feature_files, "GROUP", 8)

    def make(*overrides):
        folder = f"loader.features_dir={tmp_path / 'features'}"
        cell_dir = make_cell(
            f"cell{len(list(tmp_path.iterdir()))}", *FROZEN, folder, "loader.features=true", *overrides
        )
        cell = CellConfig.load(cell_dir / "config.yaml")
        return cell, build_model(cell), FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")

    return make


def compute(cell, model, data, **kwargs):
    return compute_features(cell, model, data, torch.device("cpu"), contextlib.nullcontext, **kwargs)


def test_training_and_evaluation_with_stored_features_equal_those_without(make_cell, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "GROUP", 8)
    folder = f"loader.features_dir={tmp_path / 'features'}"
    stored = make_cell("stored", *FROZEN, *VARIED, "loader.features=true", folder)
    direct = make_cell("direct", *FROZEN, *VARIED, "loader.features=false")
    assert run_cell(direct, World()) is None
    assert run_cell(stored, World()) is None
    weights = [load_file(cell / "checkpoints/step_00000006/model.safetensors") for cell in (stored, direct)]
    assert not any(name.startswith("encoder") for name in weights[0])
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-4, atol=1e-5)
    ours, theirs = (list(csv.DictReader((cell / "per_image.csv").open())) for cell in (stored, direct))
    assert [row["key"] for row in ours] == [row["key"] for row in theirs]
    np.testing.assert_allclose(
        [float(row["prob_benign"]) for row in ours], [float(row["prob_benign"]) for row in theirs], rtol=1e-3
    )


def test_batches_carry_the_features_of_the_very_images_in_them(setting):
    cell, model, data = setting(*VARIED)
    found = compute(cell, model, data)
    data = dataclasses.replace(data, features=found)
    batches = [*training_batches(cell, data, World(), 0), *validation_batches(cell, data, "none", World())]
    for batch in batches:
        expected = model.features(batch.to("cpu").image_BCHW)
        assert batch.features.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(batch.features[name], tensor, rtol=1e-4, atol=1e-5)
    # The variants differ only where the label has them changed.
    by_label = {record.label: record.key for record in data.train}
    for label, changes in (("benign", False), ("malignant", True)):
        plain, varied = (found([by_label[label]], [variant])["neck"] for variant in (None, 0))
        assert torch.equal(plain, varied) != changes


def test_a_second_cell_never_runs_the_frozen_part(setting, monkeypatch):
    compute(*setting())

    def refuse(*_):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(FrozenEncoder, "__call__", refuse)
    cell, model, data = setting("train.lr=1e-3", "model.mask_guided=false")
    lines = []
    found = compute(cell, model, data, say=lines.append)
    assert found([data.train[0].key], [None])["neck"].shape == (1, 64, 8, 8)
    assert not lines


@pytest.mark.parametrize(
    "other",
    ["model.image_size=128", "model.depth=3", "model.decoder=sd", "engine.precision=bf16"],
)
def test_what_changes_the_features_changes_their_place(setting, other):
    more = ("model.skip_blocks=[0,1]", "model.global_blocks=[1]")
    places = {features._place(*setting(*more, *settings)).plain for settings in ((), (other,))}
    assert len(places) == 2


def test_a_killed_computation_goes_on_with_the_groups_that_are_missing(setting, tmp_path):
    cell, model, data = setting()

    def there():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")}

    with pytest.raises(DecodingStopped):
        compute(cell, model, data, keep_going=lambda: len(there()) < 2)
    before = there()
    assert len(before) == 2
    leftover = next(iter(before)).parent / ".00002.safetensors.elsewhere.1"
    leftover.touch()
    compute(cell, model, data)
    after = there()
    assert len(after) == 3
    assert before.items() <= after.items()
    assert not leftover.exists()


def test_a_group_that_another_process_holds_is_left_to_it_until_it_dies(setting):
    cell, model, data = setting()
    first = features._place(cell, model, data).file(0, None)
    first.parent.mkdir(parents=True)
    with first.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        computing = threading.Thread(target=compute, args=(cell, model, data))
        computing.start()
        deadline = time.monotonic() + 300
        others = {"00001.safetensors", "00002.safetensors"}
        while {path.name for path in first.parent.glob("*.safetensors")} != others:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        computing.join(0.5)
        assert computing.is_alive()
        assert not first.exists()
        fcntl.flock(held, fcntl.LOCK_UN)
        computing.join(300)
    assert first.exists()


def test_where_locks_do_nothing_two_that_compute_the_same_group_do_not_end_each_other(setting, monkeypatch):
    cell, model, data = setting()
    there = []

    def write(path, content):
        there.append(path)
        if len(there) == 1:  # the other one took what was half written for a leftover, and is at it now
            raise FileNotFoundError(path)
        write_atomically(path, content)

    monkeypatch.setattr(features, "write_atomically", write)
    found = compute(cell, model, data)
    assert there[0] in there[1:]
    assert all(found.file(group, None).exists() for group in range(3))


def test_damage_is_found_where_it_is_read_and_a_cut_file_is_made_again(setting):
    cell, model, data = setting()
    found = compute(cell, model, data)
    path = found.file(0, None)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    again = compute(cell, model, data)
    assert path.read_bytes() == content
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    feature_files._open.cache_clear()
    keys = [record.key for record in data.manifest.records[:8]]
    with pytest.raises(DataError, match=r"00000.safetensors is damaged.*Delete it"):
        again(keys, [None] * 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("augment.hflip=0.5", "augment.variants=0"), "augment.variants=0.*such as 4"),
        (("model.encoder=full",), "no frozen part.*loader.features=false"),
        (("model=unet_small",), "no frozen part"),
        (("data.stream=elsewhere/",), "data.stream"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_queued(overrides, message):
    words = [*FROZEN, "data=phantom", "loader.features=true", *overrides]
    if "model=unet_small" in overrides:
        words = ["model=unet_small", "data=phantom", "loader.features=true"]
    with pytest.raises(ConfigError, match=message):
        compose(words)
