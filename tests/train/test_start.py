"""Promises of `train.start_from`: fold for fold, from the very weights, and never from scans that are tested."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bushpc.cell import build_model, run_cell
from bushpc.cli import main
from bushpc.config import CellConfig, compose
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dist import World
from bushpc.errors import ConfigError, DataError, ResumeError
from bushpc.evaluate.export import export
from bushpc.files import sha256_of
from bushpc.runs import checkpoint
from bushpc.runs.layout import RunDir
from bushpc.runs.run_record import RunRecord
from bushpc.shards.card import PROJECT_SHARDS
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import make_folds, write_folds
from bushpc.train.start import load_start

TINY = (
    *("model=efficientnet_small", "data=phantom", "cluster=local", "model.image_size=32", "train.iterations=2"),
    *("train.batch_size=4", "train.warmup=0", "train.track=[]", "evaluate.metrics=[label_accuracy]"),
    "evaluate.explain=0",
)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory) -> Path:
    """Other scans than the phantom's, in two folds."""
    folder = tmp_path_factory.mktemp("other")
    assert main(["pack", "data=phantom", f"out={folder}", "count=20", "seed=7", "workers=1"]) == 0
    records = Manifest.load(folder).records
    write_folds(folder / "folds.csv", records, make_folds(records, k=2))
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory, two_folds_folder):
    place = tmp_path_factory.mktemp("runs")
    words = (*TINY, f"data.root={two_folds_folder}", f"runs_dir={place}", f"loader.cache_dir={place / 'cache'}")
    return lambda *more: cv_plan(compose([*words, *more]))


def written(plan) -> Path:
    write_run(plan.first.run_dir, plan, ["bushpc", "cv"])
    return plan.first.run_dir


@pytest.fixture(scope="module")
def source(plan) -> Path:
    """Both folds are done."""
    run_dir = written(plan("name=source"))
    for fold in ("fold0", "fold1"):
        assert run_cell(run_dir / "cells" / fold, World()) is None
    return run_dir


def learnt(run_dir: Path, fold: int, step: int = 2) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"cells/fold{fold}/checkpoints/step_{step:08d}/model.safetensors")


def first_weights(cell: CellConfig) -> dict[str, torch.Tensor]:
    model = build_model(cell)
    assert load_start(cell, model).problem == ""
    return model.state_dict()


def test_each_fold_starts_from_the_same_fold_and_run_json_says_so(plan, source, other_folder):
    target = plan("name=target", f"data.root={other_folder}", f"train.start_from={source}")
    for fold in (0, 1):
        cell, theirs = target.cells[f"fold{fold}"], learnt(source, fold)
        assert all(torch.equal(value, theirs[name]) for name, value in first_weights(cell).items())
    run_dir = written(target)
    for cell in json.loads((run_dir / "run.json").read_text())["cells"]:
        fold = cell["fold"]
        seal = source / f"cells/fold{fold}/checkpoints/step_00000002/seal.json"
        assert cell["started_from"] == {
            **{"kind": "run", "name": "source", "cell": f"fold{fold}", "fold": fold, "step": 2, "data": "phantom"},
            "sha256": sha256_of(seal),
        }
        manifests = [each["manifest_sha256"] for each in cell["trained_on"]]
        assert manifests == [Manifest.load(other_folder).hash, RunRecord.open(RunDir(source)).manifest_sha256]


def test_the_start_is_part_of_what_a_cell_learns_and_its_place_is_not(plan, source, other_folder, tmp_path):
    scratch = plan(f"data.root={other_folder}").cells
    started = plan(f"data.root={other_folder}", f"train.start_from={source}").cells
    moved = tmp_path / "moved"
    shutil.copytree(source, moved, symlinks=True)
    assert started["fold0"].training_hash != scratch["fold0"].training_hash
    again = plan(f"data.root={other_folder}", f"train.start_from={moved}").cells
    assert [cell.hash for cell in again.values()] == [cell.hash for cell in started.values()]


def test_a_resumed_run_needs_its_start_no_more_and_ends_in_the_same_weights(plan, source, other_folder, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(source, gone, symlinks=True)
    words = (f"data.root={other_folder}", "fold=0", f"train.start_from={gone}", "train.save_every=1", "train.keep=5")
    whole, parted = written(plan("name=whole", *words)), written(plan("name=parted", *words))
    assert run_cell(whole / "cells/fold0", World()) is None
    checkpoints = parted / "cells/fold0/checkpoints"
    checkpoints.mkdir()
    checkpoint.share(whole / "cells/fold0/checkpoints/step_00000001", checkpoints)
    (parted / "cells/fold0/ledger").mkdir()
    for path in (whole / "cells/fold0/ledger").iterdir():
        shutil.copy(path, parted / "cells/fold0/ledger")
    shutil.rmtree(gone)
    assert run_cell(parted / "cells/fold0", World()) is None
    assert all(torch.equal(value, learnt(whole, 0)[name]) for name, value in learnt(parted, 0).items())

    shutil.rmtree(checkpoints)
    (parted / "cells/fold0/DONE").unlink()
    with pytest.raises(ResumeError, match=r"does not exist.*bring it back"):
        run_cell(parted / "cells/fold0", World())


def test_scans_that_trained_the_start_test_nothing_that_starts_from_it(plan, source, other_folder, two_folds_folder):
    plan(f"train.start_from={source}")  # the same folds of the same scans: fold k has not seen its validation part
    with pytest.raises(DataError, match=r"fold0 of run source .* trained on 10 of the 10 scans of the validation part"):
        plan(f"train.start_from={source}/cells/fold0")
    assert plan(f"train.start_from={source}/cells/fold0", "fold=0").wanted == ["fold0"]
    with pytest.raises(DataError, match=r"12 of the 24 scans of the external test on"):
        plan(f"data.root={other_folder}", f"train.start_from={source}", f"evaluate.external=[{two_folds_folder}]")


def test_other_folds_of_the_same_scans_are_counted(plan, source, two_folds_folder, tmp_path):
    folder = tmp_path / "three"
    shutil.copytree(two_folds_folder, folder)
    records = Manifest.load(folder).lesions
    theirs = {line.split(",")[0]: line.split(",")[3] for line in (source / "folds.csv").read_text().split()}
    write_folds(folder / "folds.csv", Manifest.load(folder).records, make_folds(Manifest.load(folder).records, 3, 5))
    ours = {line.split(",")[0]: line.split(",")[3] for line in (folder / "folds.csv").read_text().split()}
    tested = [record.key for record in records if ours[record.key] == "0"]
    seen = [key for key in tested if theirs[key] != "0"]
    assert 0 < len(seen) < len(tested)
    with pytest.raises(DataError, match=rf"trained on {len(seen)} of the {len(tested)} scans of the validation"):
        plan(f"data.root={folder}", "fold=0", f"train.start_from={source}")


def test_equal_pixels_in_another_dataset_are_found_or_the_plan_warns(plan, source, tmp_path, two_folds_folder):
    """The same scans packed under another name, as another dataset."""
    folder = tmp_path / "renamed"
    shutil.copytree(two_folds_folder, folder)
    manifest = Manifest.load(folder)
    dataclasses.replace(manifest, dataset="renamed").save(folder)
    card = (PROJECT_SHARDS / "phantom" / "card.yaml").read_text()
    (folder / "card.yaml").write_text(card.replace("name: phantom", "name: renamed"))
    words = (f"data.root={folder}", "data=phantom", "fold=1")
    with pytest.raises(DataError, match=r"trained on 10 of the 10 scans"):
        plan(*words, f"train.start_from={source}/cells/fold0")

    away = tmp_path / "away"  # the same run, copied from a machine that has the shards
    shutil.copytree(source, away, symlinks=True)
    record = json.loads((away / "run.json").read_text())
    (away / "run.json").write_text(json.dumps({**record, "shards": str(tmp_path / "elsewhere")}))
    [warning] = plan(*words, f"train.start_from={away}/cells/fold0").warnings
    assert "renamed was not compared with generated scans" in warning


def test_an_export_starts_what_its_run_starts(plan, source, other_folder, tmp_path):
    export(source, tmp_path / "export", say=lambda _: None)
    of_export = plan(f"data.root={other_folder}", f"train.start_from={tmp_path / 'export'}").cells
    of_run = plan(f"data.root={other_folder}", f"train.start_from={source}").cells
    for name, cell in of_export.items():
        ours, theirs = first_weights(cell), first_weights(of_run[name])
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    one = plan(f"data.root={other_folder}", f"train.start_from={tmp_path / 'export' / 'fold1'}").cells
    assert one["fold0"].train.start_sha256 == of_export["fold1"].train.start_sha256


def test_imported_weights_of_a_run_keep_its_lineage(plan, source, other_folder, tmp_path, capsys):
    out = tmp_path / "imported.safetensors"
    given = [f"{source}/cells/fold0", *TINY[:4], f"out={out}"]
    assert main(["weights", "import", *given]) == 0
    assert "run source/fold0" in capsys.readouterr().out
    with pytest.raises(DataError, match="trained on 10 of the 10 scans of the validation part of fold 1"):
        plan(f"model.weights={out}")
    run_dir = written(plan("name=from_import", f"data.root={other_folder}", f"model.weights={out}"))
    cell = json.loads((run_dir / "run.json").read_text())["cells"][0]
    assert cell["started_from"]["imported_sha256"] == sha256_of(out)
    assert len(cell["trained_on"]) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model=unet_small"], "is a EfficientNet, and this run trains a UNet"),
        (["model.network=efficientnet_b0"], r"lacks net.*model.network: test_efficientnet there, efficientnet_b0 here"),
        (["train.start_row=full"], "unknown row"),
        (["model.weights={place}/some.safetensors"], "both give the weights"),
        ([f"train.start_sha256={'0' * 64}"], "not train.start_sha256"),
        (["train.weights_from={source}"], "both give the weights"),
        (["model=nnunet_small"], "trained by its own package"),
        (["train.start_from={place}"], "give a run folder"),
        (["train.start_from={place}/nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_a_start_is_refused_before_the_queue(plan, source, other_folder, tmp_path, words, reason):
    (tmp_path / "some.safetensors").write_bytes(b"")
    filled = [word.format(place=tmp_path, source=source) for word in words]
    with pytest.raises(ConfigError, match=reason):
        plan(f"data.root={other_folder}", f"train.start_from={source}", *filled)


def test_a_fold_that_is_not_done_or_lost_its_checkpoint_starts_nothing(plan, source, other_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken, symlinks=True)
    (broken / "cells/fold1/DONE").unlink()
    words = (f"data.root={other_folder}", f"train.start_from={broken}")
    with pytest.raises(ConfigError, match=r"fold1 is not done; see `bushpc status"):
        plan(*words)
    assert plan(*words, "fold=0").wanted == ["fold0"]
    file = broken / "cells/fold0/checkpoints/step_00000002/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"damaged: model\.safetensors changed"):
        plan(*words, "fold=0")
    shutil.rmtree(file.parent)
    with pytest.raises(ConfigError, match="nothing is left to start from"):
        plan(*words, "fold=0")
