"""Promises of `bushpc generate`: n samples, always the same ones, each made once, stored with all that it came from."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bushpc.cli import main
from bushpc.conditions.captions import caption
from bushpc.config import compose, compose_command
from bushpc.dispatch.plan import cv_plan
from bushpc.errors import DataError
from bushpc.evaluate.predictor import load_cell
from bushpc.files import exclusive, sha256_of
from bushpc.generate.config import GenerateConfig
from bushpc.generate.generate import find_generator
from bushpc.generate.priors import Priors
from bushpc.models.tumor_generator import TumorGenerator
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest, read_image, read_mask, verify
from tests.clone import bushpc, clone, grow

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
    own = {"data": None, "manifest_sha256": Manifest.load(phantom_folder).hash, "folds_sha256": folds, "fold": 0}
    assert noted == [own]
    words = ["model=unet_small", "data=phantom", f"data.root={phantom_folder}", f"data.synthetic={generated}"]
    words.append("data.synthetic_ratio=0.25")
    assert cv_plan(compose([*words, "fold=0"])).wanted == ["fold0"]
    with pytest.raises(DataError, match="validation part, in fold 0"):
        cv_plan(compose([*words, "fold=1"]))


def test_the_contact_sheet_is_a_picture(generated):
    with Image.open(generated / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 200


def test_a_later_version_with_a_setting_more_takes_the_set_for_the_same(generated, generator_run, tmp_path):
    later = clone(tmp_path)
    assert "GenerateConfig" in grow(later)
    words = ["generate", str(generator_run), f"out={generated}", *WORDS, "--check"]
    assert "0 of 3 batches are missing" in bushpc(later, *words)
    assert "priors.added was None, now 8" in _refused(later, *words, "priors.added=8")


def _refused(later: Path, *words: str) -> str:
    with pytest.raises(AssertionError) as error:
        bushpc(later, *words, status=0)
    return str(error.value)


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


def test_tars_that_are_no_longer_whole_are_made_again_the_same(generated, generator_run, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(generated, out)
    (tar,) = out.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:1000])
    assert main(["generate", str(generator_run), f"out={out}", *WORDS]) == 0
    assert contents(out) == contents(generated)
    assert f"{out} is damaged" in capsys.readouterr().err
    tar.unlink()
    assert main(["generate", "--check", str(generator_run), f"out={out}", *WORDS]) == 0
    assert "3 of 3 batches are missing" in capsys.readouterr().out


def test_another_set_under_the_same_path_is_made_of_its_own_batches(generator_run, tmp_path):
    out = tmp_path / "out"
    for seed in (3, 4):
        shutil.rmtree(out, ignore_errors=True)
        assert main(["generate", str(generator_run), f"out={out}", "n=2", "batch_size=2", f"seed={seed}"]) == 0
        priors = Priors(compose_command(GenerateConfig, "generate", []).priors, 32, seed)
        for index, record in enumerate(Manifest.load(out).records):
            assert np.array_equal(read_mask(out, record), priors(index).mask_SS)


def test_while_one_process_is_at_it_another_is_refused_and_the_lock_outlives_the_set(
    generator_run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = ["generate", str(generator_run), f"out={out}", *WORDS]
    with monkeypatch.context() as patched:
        patched.setattr("bushpc.generate.generate.write_shards", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    lock = out / ".generating" / ".lock"
    with exclusive(lock) as alone:
        assert alone
        assert main(command) == 2
        assert f"another process is generating into {out}" in capsys.readouterr().err
        held = lock.stat().st_ino
    assert main(command) == 0
    assert [path.stat().st_ino for path in lock.parent.iterdir()] == [held]


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


# --- what the samples depend on besides tensors -----------------------------------------------------------------


def test_the_same_weights_at_other_guidance_are_another_set(
    generated, generator_run, train_generator, tmp_path, monkeypatch, capsys
):
    twin = train_generator("twin", f"train.weights_from={generator_run}", "model.guidance=3")
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    with monkeypatch.context() as patched:
        patched.setattr("bushpc.generate.generate.write_shards", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["generate", str(generator_run), f"out={begun}", *WORDS])
    for flags in ((), ("--check",)):
        assert main(["generate", *flags, str(twin), f"out={begun}", *WORDS]) == 2
        assert "model.guidance was 2.0, now 3.0" in capsys.readouterr().err
    assert main(["generate", str(twin), f"out={whole}", *WORDS]) == 0
    ours, theirs = Manifest.load(whole).sources, Manifest.load(generated).sources
    assert ours["generator"] == theirs["generator"]
    assert ours["settings"] != theirs["settings"]


def test_what_a_gpu_began_no_cpu_goes_on_with_though_a_check_may_run_there(generated, generator_run, tmp_path, capsys):
    stated = json.loads((generated / "generate.json").read_text())
    assert (stated["device"], stated["precision"]) == ("cpu", "fp32")
    (tmp_path / "generate.json").write_text(json.dumps({**stated, "device": "cuda"}))
    before = contents(tmp_path)
    command = [str(generator_run), f"out={tmp_path}", *WORDS]
    assert main(["generate", "--check", *command]) == 0
    assert "5 scans can be made there; 3 of 3 batches are missing" in capsys.readouterr().out
    assert main(["generate", *command]) == 2
    assert "device was cuda, now cpu" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["generate.json"]


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(generator_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "base"
    assert main(["export", str(generator_run), str(out), "--fold", "0"]) == 0
    return out / "fold0"


@pytest.fixture(scope="module")
def adapter(train_generator, base) -> Path:
    return train_generator("adapter", "model.stage=lora", f"model.base={base}", "train.lr=0.1", "train.ema=0")


def test_an_adapter_of_the_same_base_changes_the_images_and_is_named_in_them(
    adapter, generator_run, generated, tmp_path
):
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


def as_another(adapter: Path, folder: Path, data: str | None = None, **content: object) -> Path:
    """A copy of the adapter's run whose one cell is of fold 2, changed where `run.json` says what the run is."""
    shutil.copytree(adapter, folder)
    run = json.loads((folder / "run.json").read_text())
    cell = next(cell for cell in run["cells"] if cell["fold"] == 0) | {"fold": 2, "row": "rank8", "hash": None}
    (folder / "run.json").write_text(json.dumps({**run, **content, "cells": [cell]}))
    if data:
        config = folder / "cells" / "fold0" / "config.yaml"
        config.write_text(config.read_text().replace("name: phantom", f"name: {data}"))
    return folder


def test_the_adapters_fold_and_row_are_chosen_by_words_of_their_own(adapter, generator_run, tmp_path, capsys):
    one = as_another(adapter, tmp_path / "one")
    grid = as_another(adapter, tmp_path / "grid", grid={"rows": [{"name": "rank8", "settings": {}}]})
    several = write_done_run(tmp_path / "several", generator_run, 3, "")
    run = json.loads((several / "run.json").read_text())
    (several / "run.json").write_text(json.dumps({"cells": run["cells"][1:]}))
    command = ["generate", "--check", str(generator_run), "fold=0", f"out={tmp_path / 'out'}", *WORDS]
    for words in (
        [f"adapter={adapter}"],
        [f"adapter={one}"],
        [f"adapter={one}", "adapter_fold=2"],
        [f"adapter={grid}", "adapter_row=rank8"],
    ):
        assert main([*command, *words]) == 0
    capsys.readouterr()
    for words, said in (
        ([f"adapter={one}", "adapter_fold=0"], "fold 0 does not exist"),
        ([f"adapter={grid}"], "adapter_row="),
        ([f"adapter={several}"], "choose one with adapter_fold= (one of 1, 2)"),
        (["adapter_fold=2"], "adapter_fold=2 needs adapter="),
        (["adapter_row=rank8"], "adapter_row=rank8 needs adapter="),
    ):
        assert main([*command, *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card_is_named_after_the_adapters_data_and_states_both_licences(adapter, generator_run, tmp_path):
    out = tmp_path / "out"
    udiat = as_another(adapter, tmp_path / "of_udiat", data="udiat")
    assert main(["generate", str(generator_run), f"adapter={udiat}", f"out={out}", *WORDS]) == 0
    card = Card.load(out)
    assert card.name == Manifest.load(out).dataset == "synthetic_udiat"
    assert "phantom: Apache-2.0" in card.licence
    assert "udiat: research only" in card.licence
    assert "run generator, fold 0, step 2, adapted by run of_udiat, fold 2, step 2" in card.what


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
        (["n=0"], "n=0: must be ≥ 1"),
        (["n=many"], "n='many' is a str; allowed: int"),
        (["m=3"], "unknown word 'm'"),
        (["fold=4"], "fold4 of"),
        (["fold=9"], "fold 9 does not exist"),
        (["fold=x"], "fold=x: a whole number is needed"),
        (["row=a"], "is no grid"),
        (["adapter=/nowhere"], "/nowhere is neither a run folder"),
        (["priors.sizes_mm.large=[20,80]"], "outside a frame of 42 mm"),
        (["priors.frame_mm=400"], "has zero size"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_written(generator_run, tmp_path, capsys, words, said):
    for flags in ((), ("--check",)):
        assert main(["generate", *flags, str(generator_run), f"out={tmp_path / 'out'}", *words]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to_is_said_in_words(generator_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for flags in ((), ("--check",)):
            assert main(["generate", *flags, str(generator_run), f"out={out}", *WORDS]) == 2
            assert f"{tmp_path / 'file'} is a file; choose a new folder" in capsys.readouterr().err

    command = ["generate", str(generator_run), f"out={tmp_path / 'out'}", *WORDS]
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: path != tmp_path)
        assert main(command) == 2
        assert f"no permission in {tmp_path}" in capsys.readouterr().err

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    for writer in ("write_atomically", "write_sheet"):  # at the first batch or before it, and at the end
        with monkeypatch.context() as patched:
            patched.setattr(f"bushpc.generate.generate.{writer}", lambda *args: full(*args[:2]))
            assert main(command) == 2
        assert "cannot be written ([Errno 28] No space left on device). Fix that" in capsys.readouterr().err
    assert main(command) == 0


def test_a_place_has_to_be_named(generator_run, capsys):
    assert main(["generate", str(generator_run), "n=3"]) == 2
    said = capsys.readouterr().err
    assert "out= is missing" in said
    assert "Example: bushpc generate" in said


def test_another_set_of_samples_does_not_go_into_the_same_folder(generated, generator_run, capsys):
    before = contents(generated)
    words = ["n=6", "batch_size=2", "seed=3", "priors.malignant_share=0.9"]
    assert main(["generate", str(generator_run), f"out={generated}", *words]) == 2
    assert "contains other samples: n was 5, now 6; priors.malignant_share was 0.5, now 0.9" in capsys.readouterr().err
    assert contents(generated) == before


def test_a_folder_with_anything_else_in_it_is_left_alone(generator_run, phantom_folder, capsys):
    before = contents(phantom_folder)
    assert main(["generate", str(generator_run), f"out={phantom_folder}", *WORDS]) == 2
    assert "contains other files: choose a new folder" in capsys.readouterr().err
    assert contents(phantom_folder) == before


def test_slurms_script_queues_a_job_only_if_the_check_passes(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "generate.sh", tmp_path / "slurm")
    for tool in (tmp_path / ".venv" / "bin" / "bushpc", tmp_path / "sbatch"):
        tool.write_text(f'#!/bin/sh\necho "{tool.name} $@"\nexit "${{{tool.name}_status:-0}}"\n')
        tool.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    words = ["runs/a run", "out=there", "n=5"]
    command = ["bash", str(tmp_path / "slurm" / "generate.sh"), "--nodes=4", *words]
    checked = f"bushpc generate --check {' '.join(words)}\n"
    queued = f"sbatch --nodes=4 slurm/generate.sh {' '.join(words)}\n"
    for status, said in (("0", checked + queued), ("2", checked)):
        done = subprocess.run(command, env={**env, "bushpc_status": status}, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (int(status), said), done.stderr


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
    assert "has a generator for each fold: choose one with fold= (one of 0, 1, 2)" in capsys.readouterr().err
