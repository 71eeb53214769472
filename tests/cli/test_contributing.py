"""Promises of CONTRIBUTING.md: its examples are whole, and each works with the files it says and no other."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import bushpc.cli
import bushpc.models
from bushpc.cli import main
from bushpc.cli.app import groups
from bushpc.config import Settings, config_class, described, setting
from bushpc.errors import ConfigError

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(section: str, language: str) -> str:
    """The first code block of a language in a section."""
    text = TEXT.split(f"## {section}")[1].split("\n## ")[0]
    return textwrap.dedent(re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)[0])


def test_a_command_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "hello.py").write_text(example("Add a command: 1 file", "python"))
    monkeypatch.setattr(bushpc.cli, "__path__", [*bushpc.cli.__path__, str(tmp_path)])
    groups.cache_clear()
    try:
        assert main(["hello", "name=Ada", "times=2"]) == 0
        assert capsys.readouterr().out == "Hello Ada\nHello Ada\n"
        assert main(["hello", "who=Ada"]) == 2
        assert "did you mean 'name'? Write name=Ada." in capsys.readouterr().err
        assert main(["--help"]) == 0
        assert "hello          Greet somebody." in capsys.readouterr().out
    finally:
        groups.cache_clear()
        sys.modules.pop("bushpc.cli.hello", None)


@pytest.fixture
def mynet(tmp_path, monkeypatch):
    """The model of CONTRIBUTING.md, with its yaml in a folder of the user's own."""
    (tmp_path / "mynet.py").write_text(example("Add a model: 2 files", "python"))
    monkeypatch.setattr(bushpc.models, "__path__", [*bushpc.models.__path__, str(tmp_path)])
    yaml = tmp_path / "configs" / "model" / "mynet.yaml"
    yaml.parent.mkdir(parents=True)
    yaml.write_text(example("Add a model: 2 files", "yaml"))
    monkeypatch.setenv("BUSHPC_CONFIGS", str(tmp_path / "configs"))
    yield
    sys.modules.pop("bushpc.models.mynet", None)


def test_a_model_is_two_files(mynet, phantom_folder, tmp_path):
    words = ["model=mynet", "data=phantom", f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}", "name=x"]
    words += ["fold=0", "cluster=local", "train.iterations=3", "model.width=4", "evaluate.explain=0"]
    assert main(["train", *words]) == 0
    assert (tmp_path / "runs" / "x" / "cells" / "fold0" / "DONE").exists()


def test_a_metric_is_one_entry(monkeypatch):
    from bushpc.metrics import registry
    from bushpc.metrics.mask import MaskPair

    for table in ("METRICS", "IMAGE_METRICS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    metric = eval(example("Add a metric: 1 entry", "python"), {"Metric": registry.Metric})
    registry.register(metric)
    assert registry.IMAGE_METRICS["area_error"] is metric
    pair = MaskPair(prob=np.array([[0.9, 0.9], [0.9, 0.1]]), mask=np.array([[1, 0], [0, 0]]))
    assert metric.function(pair) == 0.5


def test_a_setting_is_one_field():
    namespace = {"config_class": config_class, "Settings": Settings, "setting": setting}
    field = example("Add a setting: 1 field", "python").strip()
    exec(f"@config_class\nclass Mine(Settings):\n    prefix = 'mine.'\n    {field}\n", namespace)
    mine = namespace["Mine"]
    assert mine().label_smoothing == 0.0
    with pytest.raises(ConfigError, match=r"mine.label_smoothing=1.*"):
        mine(label_smoothing=1.0)
    [described_field] = described(mine)
    assert described_field.about.sentence == "Share of each label that goes to the others."
