"""An ensemble on a dataset that no member saw: the mean of the members, and never their own scans."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_f1_score

from bushpc.cli import main
from bushpc.errors import ConfigError
from bushpc.evaluate.components import processed
from bushpc.evaluate.predictor import Predictor, load
from bushpc.runs.chosen import Chosen, Rule, stamp
from bushpc.runs.layout import RunDir
from bushpc.shards.manifest import Manifest, read_image, read_mask


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other scans: the phantom of another seed, which is another dataset to every check of lineage."""
    folder = tmp_path_factory.mktemp("elsewhere")
    assert main(["pack", "data=phantom", f"out={folder}", "count=6", "seed=7", "workers=1"]) == 0
    return folder


@pytest.mark.parametrize("exported", [False, True])
def test_the_mean_of_the_members_is_scored_on_the_original_scans(exported, whole_run, elsewhere, tmp_path) -> None:
    model = whole_run
    if exported:
        model = tmp_path / "model"
        assert main(["export", str(whole_run), str(model)]) == 0
    assert main(["test", str(model), str(elsewhere), str(tmp_path / "out"), "--device", "cpu"]) == 0
    with (tmp_path / "out" / "per_image.csv").open(newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    manifest = Manifest.load(elsewhere)
    assert sorted(rows) == sorted(record.key for record in manifest.lesions)
    members = [load(whole_run, fold=fold, device="cpu") for fold in (0, 1)]
    for record in manifest.lesions:
        prob_HW = np.mean([member(read_image(elsewhere, record)).prob_HW for member in members], axis=0)
        two = torch.from_numpy((prob_HW >= 0.5).astype(int)), torch.from_numpy(read_mask(elsewhere, record).astype(int))
        assert float(rows[record.key]["dice_original"]) == pytest.approx(float(binary_f1_score(*two)), abs=1e-3)
    content = json.loads((tmp_path / "out" / "test.json").read_text())
    assert list(content["members"]) == ["fold0", "fold1"]
    assert (content["grid"], content["postprocess"], content["tta"]) == ("original", "plain", "none")
    mean = np.mean([float(row["dice_original"]) for row in rows.values()])
    assert content["metrics"]["dice_original"]["mean"] == pytest.approx(mean)


def test_masks_after_post_processing_are_scored_beside_the_plain_ones(whole_run, elsewhere, tmp_path) -> None:
    run = RunDir(tmp_path / "pp")
    shutil.copytree(whole_run, run.path)
    rule = Rule(fill=True, smallest=0.01, largest=True)
    chosen = Chosen(
        **{"created": "", "metric": "dice", "source": "none", "grid": "network", "candidates": 2, "folds": []},
        cells={name: stamp(run.cell(name)) for name in ("fold0", "fold1")},
        for_all=rule,
        largest_difference=0.0,
    )
    run.postprocess(None).parent.mkdir()
    chosen.write(run.postprocess(None))
    assert main(["test", str(run.path), str(elsewhere), str(tmp_path / "out"), "--device", "cpu"]) == 0
    with (tmp_path / "out" / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    plain = load(run.path, device="cpu", postprocess=False)
    for row in rows:
        record = Manifest.load(elsewhere).record(row["key"])
        reference = torch.from_numpy(read_mask(elsewhere, record).astype(int))
        mask_HW = plain(read_image(elsewhere, record)).mask_HW
        for column, found_HW in (("dice_original", mask_HW), ("dice_original:chosen", processed(mask_HW, rule))):
            expected = float(binary_f1_score(torch.from_numpy(found_HW.astype(int)), reference))
            assert float(row[column]) == pytest.approx(expected, abs=1e-6)
    assert any(row["dice_original"] != row["dice_original:chosen"] for row in rows), "the rule changes nothing here"
    assert json.loads((tmp_path / "out" / "test.json").read_text())["postprocess"] == rule.words


@pytest.mark.parametrize("fold", [[], ["--fold", "1"]])
def test_scans_that_a_member_trained_on_are_refused_before_anything_is_written(
    fold, whole_run, two_folds_folder, tmp_path, capsys
) -> None:
    assert main(["test", str(whole_run), str(two_folds_folder), str(tmp_path / "out"), *fold]) == 2
    assert "trained on scans of phantom, which an ensemble with them may not judge" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()


def test_an_ensemble_of_differing_models_is_refused(whole_run, trained) -> None:
    unet, xbusnet = load(whole_run, fold=0, device="cpu"), load(trained.run, fold=0, device="cpu")
    with pytest.raises(ConfigError, match="an ensemble of differing models"):
        Predictor([*unet.members, *xbusnet.members], unet.recipe, device="cpu")
    with pytest.raises(ConfigError, match="reads images of 64 pixels a side alone"):
        load(trained.run, fold=0, device="cpu", tta="mirror_scale")
