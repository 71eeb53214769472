"""Promises of `bushpc generate`: n samples, always the same ones, each made once, stored with all that it came from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bushpc.cli import main
from bushpc.config import compose, compose_command
from bushpc.data.captions import caption
from bushpc.dispatch.grid import cv_plan
from bushpc.errors import DataError
from bushpc.evaluate.predictor import load_cell
from bushpc.files import sha256_of
from bushpc.generate.generate import GenerateConfig, find_generator
from bushpc.generate.priors import Priors
from bushpc.models.tumor_generator import TumorGenerator
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest, read_image, read_mask, verify

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("n=5", "batch_size=2", "seed=3")


@pytest.fixture(scope="module")
def generated(generator_run, tmp_path_factory) -> Path:
    """What one process makes without a break."""
    out = tmp_path_factory.mktemp("generated") / "synthetic"
    assert main(["generate", str(generator_run), f"out={out}", *WORDS]) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_there_are_exactly_n_samples_in_ordinary_shards_that_are_marked(generated):
    manifest = Manifest.load(generated)
    verify(generated, manifest, deep=True)
    assert [record.key for record in manifest.records] == [f"synthetic{index:06d}" for index in range(5)]
    assert manifest.synthetic
    card = Card.load(generated)
    assert (card.synthetic, card.name, sum(card.counts.values())) == (True, manifest.dataset, 5)
    assert set(contents(generated)) == {
        *("card.yaml", "contact_sheet.png", "generate.json", "lesion-000000.tar", "manifest.json"),
    }


def test_a_sample_is_what_its_prior_and_its_noise_make_and_says_so(generated, generator_run):
    manifest = Manifest.load(generated)
    member = load_cell(find_generator(generator_run, None, None).cells[0])
    priors = Priors(compose_command(GenerateConfig, "generate", []).priors, 32, 3)
    for first, last in ((0, 2), (2, 4), (4, 5)):
        records, drawn = manifest.records[first:last], [priors(index) for index in range(first, last)]
        for record, each in zip(records, drawn, strict=True):
            assert (record.label, caption(record.label, record.attributes)) == (each.label, each.caption)
            assert record.attributes.items() >= each.attributes.items()
            assert record.attributes["generator"] == member.sha256[:16]
            assert np.array_equal(read_mask(generated, record), each.mask_SS)
        model = member.model.eval()
        with torch.inference_mode():
            image_BCHW = model.generate(
                torch.from_numpy(np.stack([each.mask_SS for each in drawn])).float(),
                [each.caption for each in drawn],
                [record.attributes["seed"] for record in records],
            )
        stored = np.stack([read_image(generated, record) for record in records])
        assert np.abs(stored / 255 - image_BCHW.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6
    assert len({record.attributes["seed"] for record in manifest.records}) == 5


def test_only_the_fold_that_trained_the_generator_may_train_on_its_samples(generated, phantom_folder):
    noted = json.loads((generated / "generate.json").read_text())["trained_on"]
    folds = sha256_of(phantom_folder / "folds.csv")
    assert noted == [{"manifest_sha256": Manifest.load(phantom_folder).hash, "folds_sha256": folds, "fold": 0}]
    words = ["model=unet_small", "data=phantom", f"data.root={phantom_folder}", f"data.synthetic={generated}"]
    words.append("data.synthetic_ratio=0.25")
    assert cv_plan(compose([*words, "fold=0"])).wanted == ["fold0"]
    with pytest.raises(DataError, match="it was that of fold 0"):
        cv_plan(compose([*words, "fold=1"]))


def test_the_contact_sheet_is_a_picture(generated):
    with Image.open(generated / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 200


def test_stopped_anywhere_it_goes_on_to_the_same_bytes_and_makes_nothing_twice(
    generated, generator_run, tmp_path, monkeypatch, capsys
):
    made, stops = [], [0, 2, 4, None]
    real = TumorGenerator.generate

    def until_killed(self, mask_BHW, captions, seeds):
        if len(made) == stops[0]:
            raise KeyboardInterrupt
        made.extend(seeds)
        return real(self, mask_BHW, captions, seeds)

    monkeypatch.setattr(TumorGenerator, "generate", until_killed)
    command = ["generate", str(generator_run), f"out={tmp_path / 'out'}", *WORDS]
    while stops[0] is not None:
        assert main(command) == 130
        stops.pop(0)
        # What a kill in the middle of writing leaves behind.
        (tmp_path / "out" / ".generating" / ".batch-000001.npz.host.1").write_bytes(b"half")
    assert main(command) == 0
    assert len(made) == len(set(made)) == 5
    assert contents(tmp_path / "out") == contents(generated)
    capsys.readouterr()
    assert main(command) == 0
    assert len(made) == 5
    assert "5 scans" in capsys.readouterr().out


def test_killed_between_images_and_shards_it_packs_what_is_there(generated, generator_run, tmp_path, monkeypatch):
    command = ["generate", str(generator_run), f"out={tmp_path / 'out'}", *WORDS]
    with monkeypatch.context() as patched:
        patched.setattr("bushpc.generate.generate.write_shards", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    monkeypatch.setattr(TumorGenerator, "generate", None)
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(generated)


@pytest.mark.real
def test_two_ranks_make_the_same_samples_as_one(generated, generator_run, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "bushpc.cli", "generate", str(generator_run), f"out={tmp_path / 'out'}", *WORDS],
            cwd=ROOT,
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "5 scans" in said[0]
    assert said[1].count("scans") == 0
    assert contents(tmp_path / "out") == contents(generated)


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(generator_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "base"
    assert main(["export", str(generator_run), str(out), "--fold", "0"]) == 0
    return out / "fold0"


def test_an_adapter_of_the_same_base_changes_the_images_and_is_named_in_them(
    train_generator, generator_run, base, generated, tmp_path
):
    adapter = train_generator("adapter", "model.stage=lora", f"model.base={base}", "train.lr=0.1", "train.ema=0")
    out = tmp_path / "out"
    assert main(["generate", str(generator_run), f"adapter={adapter}", f"out={out}", *WORDS]) == 0
    adapted, plain = Manifest.load(out), Manifest.load(generated)
    assert {"generator", "adapter", "settings"} == adapted.sources.keys()
    assert len(json.loads((out / "generate.json").read_text())["trained_on"]) == 1  # one fold for base and adapter
    for ours, theirs in zip(adapted.records, plain.records, strict=True):
        assert ours.attributes["generator"] == theirs.attributes["generator"]
        assert len(ours.attributes["adapter"]) == 16
        assert np.array_equal(read_mask(out, ours), read_mask(generated, theirs))
    assert any(
        not np.array_equal(read_image(out, ours), read_image(generated, theirs))
        for ours, theirs in zip(adapted.records, plain.records, strict=True)
    )


def test_an_adapter_of_another_base_and_one_that_is_none_are_refused(
    train_generator, base, generator_run, tmp_path, capsys
):
    other = train_generator("other", "seed=1")
    adapter = train_generator("of_base", "model.stage=lora", f"model.base={base}", "train.iterations=1")
    for run, of, said in ((other, adapter, "was trained on another base"), (generator_run, other, "only lora trains")):
        assert main(["generate", str(run), f"adapter={of}", f"out={tmp_path / 'out'}", *WORDS]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["n=0"], "n=0: allowed is 1"),
        (["n=many"], "n='many' is a str; allowed: int"),
        (["m=3"], "unknown setting 'm'"),
        (["fold=4"], "fold4 of"),
        (["fold=9"], "fold 9 does not exist"),
        (["fold=x"], "fold=x: a number is needed"),
        (["row=a"], "is no grid"),
        (["adapter=/nowhere"], "/nowhere is neither a run folder"),
        (["priors.sizes_mm.large=[20,80]"], "outside a frame of 42 mm"),
        (["priors.frame_mm=400"], "has zero size"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_written(generator_run, tmp_path, capsys, words, said):
    assert main(["generate", str(generator_run), f"out={tmp_path / 'out'}", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_has_to_be_named(generator_run, capsys):
    assert main(["generate", str(generator_run), "n=3"]) == 2
    assert "say where to: bushpc generate RUN out=FOLDER" in capsys.readouterr().err


def test_another_set_of_samples_does_not_go_into_the_same_folder(generated, generator_run, capsys):
    before = contents(generated)
    words = ["n=6", "batch_size=2", "seed=3", "priors.malignant_share=0.9"]
    assert main(["generate", str(generator_run), f"out={generated}", *words]) == 2
    assert "holds other samples: n was 5, now 6; priors.malignant_share was 0.5, now 0.9" in capsys.readouterr().err
    assert contents(generated).items() >= before.items()


def test_a_folder_with_anything_else_in_it_is_left_alone(generator_run, phantom_folder, capsys):
    before = contents(phantom_folder)
    assert main(["generate", str(generator_run), f"out={phantom_folder}", *WORDS]) == 2
    assert "holds other files: choose a new folder" in capsys.readouterr().err
    assert contents(phantom_folder) == before


def write_done_run(folder: Path, generator_run: Path, folds: int, model: str) -> Path:
    """A run as far as a look at it goes: cells that are done, of a model that `model` names in their settings."""
    text = (generator_run / "cells" / "fold0" / "config.yaml").read_text()
    for fold in range(folds):
        cell = folder / "cells" / f"fold{fold}"
        cell.mkdir(parents=True)
        (cell / "DONE").write_text('{"step": 2}')
        (cell / "config.yaml").write_text(model or text)
    cells = [{"name": f"fold{fold}", "fold": fold} for fold in range(folds)]
    (folder / "run.json").write_text(json.dumps({"cells": cells}))
    return folder


def test_a_run_that_is_no_generator_is_refused(generator_run, phantom_folder, tmp_path, capsys):
    where = [f"data.root={phantom_folder}", f"runs_dir={tmp_path}"]
    for name, words in (("unet", ["model=unet_small"]), ("vae", ["model=tumor_generator_vae_small"])):
        text = compose(["data=phantom", *where, *words]).to_yaml()
        run = write_done_run(tmp_path / name, generator_run, 1, text)
        assert main(["generate", str(run), f"out={tmp_path / 'out'}", *WORDS]) == 2
        assert f"{run} is no generator" in capsys.readouterr().err


def test_one_of_several_generators_has_to_be_chosen(generator_run, tmp_path, capsys):
    run = write_done_run(tmp_path / "several", generator_run, 3, "")
    assert main(["generate", str(run), f"out={tmp_path / 'out'}", *WORDS]) == 2
    assert "several generators, one of each fold: choose one with fold=, of 0, 1, 2" in capsys.readouterr().err
