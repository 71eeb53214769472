"""Promises of `bushpc config find` and of completion: what is offered is valid, in a real bash too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.cli.app import commands
from bushpc.cli.find import offered
from bushpc.config import compose, described


def test_a_setting_is_found_by_what_it_means(capsys):
    assert main(["config", "find", "learning", "Rate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"train.lr", "train.schedule"} <= set(found)
    assert all("rate" in f"{key} {each['help']}".lower() for key, each in found.items())


def test_a_models_own_settings_are_found_with_the_model(capsys):
    assert main(["config", "find", "encoder", "model=unet"]) == 0
    assert "model.encoder:" in capsys.readouterr().out


def test_a_misspelt_word_gets_the_nearest_that_leads_somewhere(capsys):
    assert main(["config", "find", "learnig", "rate"]) == 1
    assert "Try: bushpc config find learning rate." in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["model=unet"]])
def test_nothing_to_look_for_is_an_error(words, capsys):
    assert main(["config", "find", *words]) == 2
    assert "Example: bushpc config find" in capsys.readouterr().err


def test_every_command_is_offered_and_every_second_word_of_two():
    assert {name.split()[0] for name in commands()} <= {word.split()[0] for word in offered(["bushpc", ""])}
    assert offered(["bushpc", "weights", "pu"]) == ["pull"]
    assert offered(["bushpc", "nonsense", ""]) == []


def test_offered_settings_and_names_are_valid():
    keys = {f"{each.key}=" for each in described()}
    assert set(offered(["bushpc", "cv", "train."])) == {key for key in keys if key.startswith("train.")}
    for word in offered(["bushpc", "cv", "engine="]):
        compose([word, "model=unet_small", "data=phantom"])
    assert "--dry-run" in offered(["bushpc", "cv", "model=unet", "--"])


def test_runs_are_offered(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").touch()
    (tmp_path / "runs" / "no-run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert offered(["bushpc", "status", "runs/"]) == ["runs/mine"]


@pytest.mark.parametrize(
    ("line", "words"), [("bushpc stat", {"status"}), ("bushpc cv model=xbusnet_s", {"xbusnet_small"})]
)
def test_bash_completes(line, words, tmp_path, capsys):
    """With `=` in COMP_WORDBREAKS, as it is by default, the answer is what follows it."""
    (tmp_path / "bushpc").write_text(f'#!/bin/sh\nexec {sys.executable} -m bushpc.cli "$@"\n')
    (tmp_path / "bushpc").chmod(0o755)
    main(["completion", "bash"])
    typed = f"COMP_LINE='{line}' COMP_POINT={len(line)}"
    script = f"{capsys.readouterr().out}\n{typed}\n_bushpc\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    bash = shutil.which("bash")
    assert bash
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    done = subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True)
    assert set(done.stdout.split()) == words, done.stderr


def test_with_json_an_error_has_its_code_for_scripts(capsys):
    assert main(["config", "model=nonsense", "--json"]) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["code"] == "config"
    assert said.err == f"bushpc: {error['message']}\n"
    assert main(["config", "model=nonsense"]) == 2
    assert capsys.readouterr().out == ""
