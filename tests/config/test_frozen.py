"""Promises of frozen settings: report and audit read any run's settings without its model, and without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from bushpc.config import compose
from bushpc.config.frozen import FrozenSettings, flat_settings
from bushpc.errors import ConfigError


def test_what_a_cell_was_composed_of_is_read_again_without_its_model():
    cell = dataclasses.replace(compose(["model=unet_small", "data=phantom", "train.balance=true", "seed=7"]), fold=0)
    frozen = FrozenSettings.parse(cell.to_yaml())
    assert frozen.seed == 7
    assert (frozen.train, frozen.data, frozen.evaluate) == (cell.train, cell.data, cell.evaluate)
    settings = flat_settings(cell.to_yaml(), {})
    assert settings["model.image_size"] == cell.model.image_size
    assert settings["train.balance"] is True


def test_what_a_file_lacks_has_its_default_and_what_nobody_knows_is_passed_over():
    text = "train:\n  batch_size: 3\n  of_tomorrow: 1\nnew: {group: 2}\n"
    frozen, settings = FrozenSettings.parse(text), flat_settings(text, {"prompts": "none"})
    assert frozen.train.batch_size == settings["train.batch_size"] == 3
    assert frozen.evaluate.threshold == settings["evaluate.threshold"]
    assert (settings["new.group"], settings["prompts"]) == (2, "none")


def test_a_value_that_this_version_refuses_hides_no_other():
    assert flat_settings("train: {lr: a}\nevaluate: {metrics: [dice]}\n", {})["evaluate.metrics"] == ["dice"]


@pytest.mark.parametrize("text", ["", "3", "train: 3", "train: {batch_size: x}", "a: [", "\0", "seed: x"])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(ConfigError):
        FrozenSettings.parse(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        FrozenSettings.load(tmp_path / "config.yaml")


def test_no_torch_is_imported_for_it():
    code = "import sys, bushpc.config.frozen; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
