"""Promises of an exported model: it needs nothing but itself, and predicts what its run predicts, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import bushpc
from bushpc.cell import run_cell
from bushpc.cli import main
from bushpc.config import compose
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dist import World
from bushpc.errors import DataError
from bushpc.evaluate.export import export
from bushpc.nn.clip import TextEncoder
from bushpc.sample import Batch
from bushpc.shards.manifest import Manifest, read_image

pytestmark = pytest.mark.filterwarnings("ignore::bushpc.errors.BushpcWarning")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """The ensemble of both folds, exported from a copy of the run that is gone since, as are its shards."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(trained.run, folder / "run")
    shutil.copytree(trained.shards, folder / "shards")
    for config in (folder / "run" / "cells").glob("*/config.yaml"):
        config.write_text(config.read_text().replace(str(trained.shards), str(folder / "shards")))
    assert main(["export", str(folder / "run"), str(folder / "model")]) == 0
    shutil.rmtree(folder / "run")
    shutil.rmtree(folder / "shards")
    (folder / "model").rename(folder / "moved")
    return folder / "moved"


@pytest.fixture(scope="module")
def image(trained) -> np.ndarray:
    return read_image(trained.shards, Manifest.load(trained.shards).lesions[0])


def test_an_export_predicts_what_its_run_predicts_to_the_last_bit(trained, exported, image):
    for fold in (None, 1):
        there, here = bushpc.load(trained.run, fold=fold)(image), bushpc.load(exported, fold=fold)(image)
        assert (there.prob_HW == here.prob_HW).all()
        assert (there.mask_HW == here.mask_HW).all()
        assert there.conditions == here.conditions
    assert there.mask_HW.any(), "the case is degenerate"


def test_an_export_of_format_1_is_read_and_a_newer_one_named(exported, image, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "old")
    content = json.loads((folder / "export.json").read_text())
    for fold in content["folds"]:
        state = fold.pop("conditions")["spatial_prompts"]
        fold["size_bins"] = state["size_bins"]
    content["recipe"]["tau"] = state["tau"]
    (folder / "export.json").write_text(json.dumps({**content, "format": 1}))
    old, new = bushpc.load(folder)(image), bushpc.load(exported)(image)
    assert (old.prob_HW == new.prob_HW).all()
    assert old.conditions == new.conditions
    (folder / "export.json").write_text(json.dumps({**content, "format": 99, "bushpc": "7.0"}))
    with pytest.raises(DataError, match=r"format 99.*up to format 2\. It was written by bushpc 7\.0: use that version"):
        bushpc.load(folder)


def test_the_text_tower_travels_along(trained, image, tmp_path, monkeypatch):
    """It is in no checkpoint: a pretrained one comes from staged weights, here another seed stands for those."""
    with monkeypatch.context() as patched:
        patched.setattr(TextEncoder, "SEED", 7)
        export(trained.run, tmp_path / "model", fold=0)
        there = bushpc.load(trained.run, fold=0)(image)
    here, without = bushpc.load(tmp_path / "model")(image), bushpc.load(trained.run, fold=0)(image)
    assert (there.prob_HW == here.prob_HW).all()
    assert (without.prob_HW != here.prob_HW).any(), "the case is degenerate"


def test_nothing_in_an_export_names_a_folder_of_this_machine(exported, trained):
    for name in ("export.json", "config.yaml", "README.md"):
        text = (exported / name).read_text()
        assert str(trained.run.parent) not in text
        assert str(trained.shards) not in text
        assert "/tmp" not in text


def test_the_model_card_names_data_licence_scores_missing_folds_and_limits(exported, trained):
    card = (exported / "README.md").read_text()
    for part in ("XBusNet", "Licence of the data", "not done: fold2, fold3, fold4", "no medical device", "first_pass"):
        assert part in card
    lines = (trained.run / "cells" / "fold0" / "per_image.csv").read_text().splitlines()
    column = lines[0].split(",").index("dice")
    dice = np.mean([float(line.split(",")[column]) for line in lines[1:]])
    assert f"| first_pass | 0 | {len(lines) - 1} | {dice:.4f} |" in card


def test_an_export_is_whole_or_not_there_and_the_same_call_again_finds_it(trained, tmp_path, monkeypatch, capsys):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("bushpc.evaluate.export.model_card", full)
        assert main(["export", str(trained.run), str(tmp_path / "out"), "--fold", "0"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(trained.run), str(tmp_path / "out"), "--fold", "0"]) == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main(["export", str(trained.run), str(tmp_path / "out"), "--fold", "0"]) == 0
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main(["export", str(trained.run), str(tmp_path / "out"), "--fold", "1"]) == 2
    assert "is not this export" in capsys.readouterr().err


def test_an_export_that_was_damaged_since_is_not_taken_for_done(trained, tmp_path, capsys):
    command = ["export", str(trained.run), str(tmp_path / "out"), "--fold", "0"]
    assert main(command) == 0
    [weights] = (tmp_path / "out").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(command) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_cell_that_has_other_settings_by_now_is_not_used(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run, symlinks=True)
    content = json.loads((run / "run.json").read_text())
    for cell in content["cells"]:
        cell["hash"] = "0" * 12 if cell["fold"] == 1 else cell["hash"]
    (run / "run.json").write_text(json.dumps(content))
    assert main(["export", str(run), str(tmp_path / "out"), "--fold", "1"]) == 2
    assert "fold1 (which has other settings than the run)" in capsys.readouterr().err
    assert [member.name for member in bushpc.load(run).members] == ["fold0"]


@pytest.mark.parametrize("damage", ["flipped bit", "missing weights", "other format", "torn json"])
def test_a_damaged_export_is_refused(exported, tmp_path, damage):
    shutil.copytree(exported, tmp_path / "model")
    weights, facts = tmp_path / "model" / "fold0" / "model.safetensors", tmp_path / "model" / "export.json"
    if damage == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "other format":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 99}))
    else:
        facts.write_text(facts.read_text()[:300])
    with pytest.raises(DataError):
        bushpc.load(tmp_path / "model")


def test_a_model_of_sentences_and_two_passes_is_refused_as_one_graph(trained, tmp_path, capsys):
    assert main(["export", str(trained.run), str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "XBusNet reads attribute_prompts, spatial_prompts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_graphs_of_an_image_model_give_its_probabilities(tmp_path, phantom_folder):
    import onnxruntime

    config = compose(
        [
            *("model=unet_small", "data=phantom", "cluster=local", "model.image_size=32", "name=unet"),
            *("train.iterations=2", "train.batch_size=2", "evaluate.explain=0"),
            *(f"data.root={phantom_folder}", f"runs_dir={tmp_path}", f"loader.cache_dir={tmp_path / 'cache'}"),
        ]
    )
    write_run(tmp_path / "unet", cv_plan(config), ["bushpc", "cv"])
    run_cell(tmp_path / "unet" / "cells" / "fold0", World())
    words = ["export", str(tmp_path / "unet"), str(tmp_path / "out"), "--format", "torch", "onnx"]
    assert main(words) == 0
    folder = tmp_path / "out" / "fold0"
    model = bushpc.load(tmp_path / "out", device="cpu").members[0].model
    image_BCHW = torch.rand(5, 3, 32, 32)
    batch = Batch(
        keys=["a"] * 5,
        epochs=[0] * 5,
        image_BCHW=image_BCHW,
        mask_BKHW=torch.zeros(5, 1, 32, 32),
        label_B=torch.zeros(5, dtype=torch.int64),
        conditions={"spatial_prompts": [""] * 5, "attribute_prompts": [""] * 5, "captions": [""] * 5},
    )
    with torch.inference_mode():
        expected = model.predict(batch).prob_BKHW
        of_torch = torch.export.load(folder / "model.pt2").module()(image_BCHW)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (of_onnx,) = session.run(None, {"image": image_BCHW.numpy()})
    assert np.abs(of_torch.numpy() - expected.numpy()).max() < 1e-6
    assert np.abs(of_onnx - expected.numpy()).max() < 1e-4
