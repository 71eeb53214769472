"""Promises of the synthetic mark: packing keeps it, real data do not have it, and nothing that has it enters a fold."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bushpc.cli import main
from bushpc.config import CellConfig, compose
from bushpc.data.loader import FoldData
from bushpc.dispatch.plan import cv_plan
from bushpc.errors import DataError
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import FILE_BY_SOURCE, make_folds, write_folds


def test_the_mark_on_the_card_becomes_the_manifests(synthetic_folder, phantom_folder):
    assert Manifest.load(synthetic_folder).synthetic
    assert not Manifest.load(phantom_folder).synthetic


def test_a_manifest_from_before_the_mark_reads_and_keeps_its_hash(phantom_folder):
    content = json.loads((phantom_folder / "manifest.json").read_text())
    assert "synthetic" not in content
    assert Manifest.load(phantom_folder).hash == content["hash"]


def test_a_mark_that_is_taken_off_or_put_on_is_noticed(synthetic_folder, tmp_path):
    text = (synthetic_folder / "manifest.json").read_text()
    assert '"synthetic": true' in text
    (tmp_path / "manifest.json").write_text(text.replace('"synthetic": true', '"synthetic": false'))
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(tmp_path)


def test_no_folds_are_drawn_for_synthetic_data(synthetic_folder):
    assert not [name for name in FILE_BY_SOURCE.values() if (synthetic_folder / name).exists()]


def test_a_run_on_synthetic_data_is_refused_on_the_login_node_even_with_folds(synthetic_folder, tmp_path, capsys):
    manifest = Manifest.load(synthetic_folder)
    folds = synthetic_folder / "folds.csv"
    write_folds(folds, manifest.records, make_folds(manifest.records))
    try:
        with pytest.raises(DataError, match=r"(?s)holds synthetic images.*data\.synthetic="):
            cv_plan(compose(["model=unet_small", "data=phantom", f"data.root={synthetic_folder}"]))
        words = ["model=unet_small", "data=phantom", f"data.root={synthetic_folder}", f"runs_dir={tmp_path}"]
        assert main(["cv", *words]) == 2
        assert "They have no folds" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    finally:
        folds.unlink()


def test_a_fold_of_synthetic_data_opens_nowhere(synthetic_folder, make_cell):
    cell_dir = make_cell("fold", "model=unet_small")
    cell = CellConfig.load(cell_dir / "config.yaml")
    cell = dataclasses.replace(cell, data=dataclasses.replace(cell.data, root=str(synthetic_folder)))
    with pytest.raises(DataError, match="holds synthetic images"):
        FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")


def test_folds_without_near_duplicates_are_not_drawn_either(synthetic_folder, capsys):
    assert main(["shards", "folds", f"data={synthetic_folder}", "duplicates=group"]) == 2
    assert "holds synthetic images" in capsys.readouterr().err
