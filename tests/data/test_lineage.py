"""Promises of what models have learnt from: noted at every step on, and in no one's validation part."""

import json
import shutil

import pytest

from bushpc.config import compose
from bushpc.data.lineage import training
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.errors import ConfigError, DataError
from bushpc.files import sha256_of
from bushpc.models.tumor_generator import TumorGenerator
from bushpc.shards.manifest import Manifest

SMALL = (
    *("model=tumor_generator_small", "data=phantom", "cluster=local", "name=generator", "model.image_size=32"),
    *("model.vae_channels=[8,16]", "model.mask_channels=[8,16]", "model.unet_channels=[16,32]", "model.unet_heads=2"),
    *("model.text_width=16", "model.text_layers=1", "model.text_heads=2"),
)


@pytest.fixture
def export(tmp_path, phantom_folder):
    """Two folds of an export, each trained in that fold of the phantom, after another dataset."""
    folder = tmp_path / "export"
    folds = sha256_of(phantom_folder / "folds.csv")
    before = {"data": "busi", "manifest_sha256": "b" * 64, "folds_sha256": "f" * 64, "fold": 3}
    content = {"folds": []}
    for k in range(2):
        TumorGenerator(compose(SMALL).model).save_pretrained(folder / f"fold{k}")
        own = training(Manifest.load(phantom_folder), phantom_folder, folds, k)
        content["folds"].append({"name": f"fold{k}", "tensors_sha256": f"{k}" * 64, "trained_on": [own, before]})
    (folder / "export.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def plan(tmp_path, phantom_folder):
    def of(*words):
        return cv_plan(compose([*SMALL, f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}", *words]))

    return of


def test_a_fold_does_not_start_from_what_has_seen_its_validation_part(plan, export):
    for k in range(2):
        cell = plan(f"model.base={export}", f"fold={k}").cells[f"fold{k}"]
        assert cell.model.base == str(export / f"fold{k}")
    with pytest.raises(DataError, match=r"export/fold0 was trained on scans of fold 1's validation part.*whole export"):
        plan(f"model.base={export / 'fold0'}", "fold=1")
    with pytest.raises(ConfigError, match=r"model\.base=.*fold2 has no vae"):
        plan(f"model.base={export}")  # before anything is queued, for every fold that is to train


def test_a_run_notes_what_its_base_and_its_synthetic_scans_come_from(plan, export, synthetic_folder, tmp_path):
    mixed = plan(f"model.base={export}", "fold=0", f"data.synthetic={synthetic_folder}")
    write_run(tmp_path / "runs" / "generator", mixed, ["bushpc", "cv"])
    cells = json.loads((tmp_path / "runs" / "generator" / "run.json").read_text())["cells"]
    noted = [(each["data"], each["manifest_sha256"][:4], each["fold"]) for each in cells[0]["trained_on"]]
    own = (None, Manifest.load(mixed.first.data.folder).hash[:4], 0)
    scans = (None, Manifest.load(synthetic_folder).hash[:4], None)
    assert noted == [own, ("busi", "bbbb", 3), scans, ("busi", "bbbb", 0)]


def test_a_base_that_was_exported_anew_is_not_gone_on_with(plan, export):
    cell = plan(f"model.base={export}", "fold=0").cells["fold0"]
    assert cell.model.base_sha256 == "0" * 64
    assert cell.model.weight_files() == []
    content = json.loads((export / "export.json").read_text())
    content["folds"][0]["tensors_sha256"] = "c" * 64
    (export / "export.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"holds another export than model\.base_sha256=0000"):
        cell.model.weight_files()
    assert plan(f"model.base={export}", "fold=0").cells["fold0"].hash != cell.hash
    shutil.rmtree(export)
    with pytest.raises(ConfigError, match="has no vae"):
        cell.model.weight_files()
