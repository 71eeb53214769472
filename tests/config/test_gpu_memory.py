"""Promises of the memory check: the hand-worked numbers of a small table, and silence where nobody knows."""

from __future__ import annotations

import pytest
import yaml

from bushpc.config import compose, gpu_memory
from bushpc.config.gpu_memory import estimate, memory_settings, too_large
from bushpc.config.gpus import memory_gb

WORDS = ("model=xbusnet", "model.pretrained=false", "data=phantom", "cluster.gpus=a100:1", "cluster.executor=slurm")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A step takes 4 GB and 1 GB an image, but at least 6."""
    settings = memory_settings(compose(WORDS))
    row = {"name": "xbusnet", "floor_gb": 6.0, "base_gb": 4.0, "image_gb": 1.0, "settings": settings}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"rows": [row]}))
    monkeypatch.setattr(gpu_memory, "TABLE", tmp_path / "table.yaml")
    gpu_memory._table.cache_clear()
    yield
    gpu_memory._table.cache_clear()


def test_a_step_takes_what_its_line_says(table):
    found = estimate(compose(WORDS))
    assert [found.peak_gb(images) for images in (1, 2, 10)] == [6, 6, 14]
    assert (found.fits(40), found.fits(80), found.fits(6)) == (32, 68, 0)  # of nine tenths


def test_a_step_that_does_not_fit_is_refused_with_the_parts_that_do(table):
    cell = compose([*WORDS, "train.batch_size=64"])
    assert too_large(cell, ["a100", "h100"]).startswith(
        "a step of 64 image(s) takes about 68 GB, and a100 has 40 GB (32 "
    )
    assert "train.accumulate=2 or more" in too_large(cell, ["a100"])
    assert too_large(cell, ["nvidia_a100-sxm4-80gb"]) is None
    assert too_large(compose([*WORDS, "train.batch_size=64", "train.accumulate=2"]), ["a100"]) is None


@pytest.mark.parametrize(
    "word",
    [
        *("model.image_size=320", "engine.precision=fp32", "engine.recompute=true", "engine=zero1", "train.ema=0.9"),
        "train.freeze=[encoder]",
    ],
)
def test_other_networks_and_trainings_have_no_estimate(table, word):
    assert estimate(compose([*WORDS, word])) is None


def test_weights_first_values_and_gpus_without_a_name_change_nothing(table):
    assert estimate(compose([*WORDS, "model.bce_weight=0.5", "train.lr=1e-3", "engine.precision=fp16"])) is not None
    imported = ("model.weights=mine.safetensors", f"model.weights_sha256={'0' * 64}")
    assert estimate(compose([*WORDS, *imported])) is not None
    assert too_large(compose([*WORDS, "train.batch_size=64"]), ["mi250"]) is None


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("a100", 40), ("NVIDIA A100-SXM4-80GB", 80), ("nvidia_a100_3g.20gb", 20), ("GH200 480GB", 96), ("v100-32g", 32)],
)
def test_memory_is_read_from_a_gpus_name(name, gigabytes):
    assert memory_gb(name) == gigabytes


def test_the_shipped_table_knows_the_papers_models():
    known = yaml.safe_load(gpu_memory.TABLE.read_text())["rows"]
    assert {"XBusNet", "SamMultitask"} <= {row["settings"]["model"] for row in known}
    assert all(min(row["image_gb"], row["floor_gb"]) > 0 for row in known)
    expected = estimate(compose([*WORDS, "engine.precision=bf16"]))
    assert expected is not None
    assert expected.fits(40) > 4  # the paper's batch
