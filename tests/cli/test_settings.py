"""Promises of `bushpc config`: every value with its source, every setting with its meaning, nothing written."""

from __future__ import annotations

import json

import pytest

from bushpc.cli import main

RUN = ["config", "model=unet_small", "data=phantom", "cluster=slurm", "train.lr=3e-4"]


def test_every_value_says_where_it_comes_from(capsys):
    assert main([*RUN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train.lr"] == {"value": 3e-4, "source": "train.lr=3e-4"}
    assert found["train.iterations"]["source"].startswith("configs/model/unet_small.yaml:")
    assert found["cluster.executor"]["value"] == "slurm"
    assert found["cluster.executor"]["source"].startswith("configs/cluster/slurm.yaml:")
    assert found["seed"]["value"] == 0

    assert main([*RUN, "--only", "train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["setting", "value", "from"]
    assert "train.lr 0.0003 train.lr=3e-4" in [" ".join(line.split()) for line in lines]
    assert all(line.startswith("train.") for line in lines[1:])


def test_a_text_is_shown_as_it_was_typed(capsys):
    for text in ("2026_11_30", "71e3442", "010", "12:30"):
        assert main([*RUN, f"cluster.account={text}", "--json", "--only", "cluster.account"]) == 0
        assert json.loads(capsys.readouterr().out)["cluster.account"]["value"] == text


def test_all_lists_every_setting_with_type_default_and_meaning(capsys):
    assert main([*RUN, "--all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"train.lr", "cluster.partition", "evaluate.metrics", "model.image_size", "seed"} <= found.keys()
    assert not {"model_class", "choices"} & found.keys()
    assert all(setting["help"] and setting["allowed"] for setting in found.values())
    assert found["cluster.time_min"]["affects"] == "nothing"

    assert main([*RUN, "--all", "--only", "train.lr"]) == 0
    assert "train.lr: float" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "trian"], "unknown --only 'trian'; did you mean 'train'?"),
        (["train.iteration=3"], "did you mean 'train.iterations'"),
        (["model=unett"], "did you mean 'unet'"),
    ],
)
def test_a_wrong_name_is_refused(words, said, capsys):
    assert main(["config", *words]) == 2
    assert said in capsys.readouterr().err
