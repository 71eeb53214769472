"""Promises of formats: what an older version wrote is read, what a newer one wrote is named, and hashes stay."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from bushpc.config import CellConfig, compose, config_class, model_of, setting
from bushpc.config.fields import fields_of
from bushpc.config.fields import group as settings_group
from bushpc.config.freeze import CONFIG, Format
from bushpc.errors import ConfigError, DataError
from bushpc.shards.manifest import Manifest

HASHES = json.loads((Path(__file__).parent / "hashes_71c433b.json").read_text())
SMALL = ["model=xbusnet_small", "data=phantom"]


@pytest.mark.parametrize("words", HASHES)
def test_every_shipped_config_has_the_hashes_of_format_1(words):
    cell = compose(words.split())
    assert [cell.hash, cell.training_hash] == HASHES[words]


def test_a_config_of_71c433b_is_read(tmp_path):
    content = compose(SMALL).to_dict()  # without a stamp, as it was then
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert CellConfig.load(tmp_path / "config.yaml") == compose(SMALL)


def test_a_config_states_its_format_and_one_of_a_newer_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(compose(SMALL).to_yaml())
    stated = yaml.safe_load(path.read_text())
    assert stated["format"] == CONFIG.number
    path.write_text(yaml.safe_dump({**stated, "format": 99, "bushpc": "7.0"}))
    with pytest.raises(ConfigError, match=r"format 99.* up to format 2\. It was written by bushpc 7\.0: use"):
        CellConfig.load(path)


def test_an_unknown_field_of_todays_format_is_refused_with_the_nearest_name():
    content = compose(SMALL).to_dict()
    content["train"]["itrations"] = 3
    with pytest.raises(ConfigError, match=r"unknown setting 'train.itrations'; did you mean 'train.iterations'"):
        CellConfig.from_dict(content)


def test_an_older_format_is_brought_up_step_by_step():
    steps = {1: lambda content: {"new": content["old"]}, 2: lambda content: content | {"more": content["new"] + 1}}
    third = Format(kind="note", number=3, error=DataError, migrations=steps)
    assert third.read({"old": 1}) == {"new": 1, "more": 2}
    assert third.read({"format": 2, "new": 1}) == {"new": 1, "more": 2}
    with pytest.raises(DataError, match="format 'x': it is damaged"):
        third.read({"format": "x"})


GROUPS = ["train", "data", "prompting", "augment", "evaluate", "loader", "engine", "cluster"]


@pytest.mark.parametrize("group", [*GROUPS, "model"])
def test_a_field_more_in_any_group_changes_no_run_and_no_export(group, monkeypatch):
    cell = compose(SMALL)
    frozen, model = cell.to_dict(), cell.to_dict()["model"]
    more = setting(7, "Added in a later version.", ge=1, since=2)
    if group == "model":
        _add_to_model(monkeypatch, cell.model_class, more)
        grown: type[CellConfig] = CellConfig
    else:
        grown = _with_a_field_more(group, more)
    read = grown.from_dict(frozen)
    assert getattr(read, group).added == 7
    assert (read.hash, read.training_hash, read.settings) == (cell.hash, cell.training_hash, cell.settings)
    changed = dataclasses.replace(read, **{group: dataclasses.replace(getattr(read, group), added=8)})
    assert changed.hash != cell.hash
    assert grown.from_dict(changed.to_dict()).hash == changed.hash
    with pytest.raises(ConfigError, match=re.escape(f"{group}.added=0: must be ≥ 1; for example {group}.added=7")):
        grown.from_dict({**frozen, group: {**frozen[group], "added": 0}})
    assert model_of(model)[1].image_size == cell.model.image_size  # what an export states of its model


def _add_to_model(monkeypatch, model_class, more) -> None:
    body = {"__module__": __name__, "__annotations__": {"added": int}, "added": more}
    grown = config_class(type(model_class.Config.__name__, (model_class.Config,), body))
    monkeypatch.setattr(model_class, "Config", grown)


def _with_a_field_more(group: str, more) -> type[CellConfig]:
    before = fields_of(CellConfig)[group].annotation
    body = {"__module__": __name__, "__annotations__": {"added": int}, "added": more}
    inner = config_class(type(before.__name__, (before,), body))
    outer = {"__module__": __name__, "__annotations__": {group: inner}, group: settings_group(inner, "Grown.")}
    return config_class(type("CellConfig", (CellConfig,), outer))


def test_a_manifest_of_71c433b_is_read_and_a_newer_one_named(phantom_folder, tmp_path):
    text = (phantom_folder / "manifest.json").read_text()
    content = json.loads(text)
    assert content.pop("format") == 1
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert Manifest.load(tmp_path).hash == Manifest.load(phantom_folder).hash
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(DataError, match="has format 9, and bushpc"):
        Manifest.load(tmp_path)
