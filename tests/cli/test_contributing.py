"""Promises of CONTRIBUTING.md: its examples are whole, and each works with the files it says and no other."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bushpc.cli
import bushpc.models
from bushpc.cli import main
from bushpc.cli.app import groups
from bushpc.config import Settings, config_class, described, setting
from bushpc.errors import ConfigError
from tests.clone import bushpc as bushpc_in
from tests.clone import clone, python

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(section: str, language: str, number: int = 0) -> str:
    """A code block of a language in a section."""
    text = TEXT.split(f"## {section}")[1].split("\n## ")[0]
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return textwrap.dedent(blocks[number])


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
        assert "hello           Greet somebody." in capsys.readouterr().out
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


def test_a_dataset_is_three_files_and_a_test(tmp_path):
    section, there = "Add a dataset: 3 files and a test", clone(tmp_path / "clone")
    files = {
        "shards/mydata/card.yaml": ("yaml", 0),
        "bushpc/shards/sources/mydata.py": ("python", 0),
        "configs/data/mydata.yaml": ("yaml", 1),
        "tests/shards/sources/test_mydata.py": ("python", 1),
    }
    for name, (language, number) in files.items():
        assert f"`{name}`" in TEXT
        path = there / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(example(section, language, number))
    tests = python(there, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/shards/sources/test_mydata.py")
    assert "2 passed" in tests

    raw = tmp_path / "raw"
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (raw / folder).mkdir(parents=True)
    rows = [(f"{i:03d}.png", f"p{i}", "benign" if i < 60 else "malignant") for i in range(100)]
    (raw / "list.csv").write_text("file,patient,label\n" + "".join(",".join(row) + "\n" for row in rows))
    for name, _, _ in rows:
        mask = np.zeros((24, 24), np.uint8)
        mask[6:14, 8:20] = 255
        Image.fromarray(rng.integers(0, 255, (24, 24), np.uint8)).save(raw / "images" / name)
        Image.fromarray(mask).save(raw / "masks" / name)
    assert "100 scans" in bushpc_in(there, "pack", "data=mydata", f"src={raw}")
    assert "mydata" in bushpc_in(there, "shards", "list")
    assert '"mydata"' in bushpc_in(there, "config", "model=unet_small", "data=mydata", "--json", "--only", "data.name")


def test_a_cluster_backend_is_one_file(tmp_path, phantom_folder):
    there = clone(tmp_path / "clone")
    (there / "bushpc" / "cluster" / "mysite.py").write_text(example("Add a cluster backend: 1 file", "python"))
    run_dir = tmp_path / "runs" / "x"
    words = ["model=unet_small", "data=phantom", f"data.root={phantom_folder}", f"runs_dir={run_dir.parent}", "name=x"]
    words += ["cluster=local", "cluster.executor=mysite", "model.image_size=32", "train.iterations=3", "fold=0"]
    bushpc_in(there, "cv", *words, "evaluate.explain=0", "train.track=[]")
    cell, deadline = run_dir / "cells" / "fold0", time.monotonic() + 300
    while not (cell / "DONE").exists():
        assert not (cell / "FAILED").exists(), (cell / "FAILED").read_text()
        assert time.monotonic() < deadline, list(run_dir.rglob("*"))
        time.sleep(0.2)
    assert json.loads((cell / "job.json").read_text())["executor"] == "mysite"
    found = json.loads(bushpc_in(there, "status", str(run_dir), "--json", status=1))["cells"][0]  # 1: folds are missing
    assert (found["state"], found["step"]) == ("done", 3)


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
