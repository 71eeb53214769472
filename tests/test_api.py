"""Promises of `bushpc` as a Python package, by the notebook of the tutorial as it stands."""

from __future__ import annotations

import ast
import csv
import json
import threading
import typing as t
from pathlib import Path

import numpy as np
import pytest

import bushpc
from bushpc.errors import BushpcWarning, ConfigError, DataError

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial" / "python.ipynb"


def run_cells(path: Path) -> tuple[dict[str, t.Any], list[t.Any]]:
    """The variables after the last cell, and what each cell shows: the value of its last expression."""
    names: dict[str, t.Any] = {}
    shown = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, path.name, "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    return names, shown


def test_the_notebook_runs_and_each_entry_point_gives_what_its_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, shown = run_cells(NOTEBOOK)
    shards, record, cell, predictor = (names[name] for name in ("shards", "record", "cell", "predictor"))

    assert shown[0] == (24, record.label, (160, 200, 3), record.lesion_pixels)  # 20 lesions and the card's 4 normals
    assert [each.key for each in bushpc.open_shards(shards.folder)] == [each.key for each in shards]
    folds = shards.folds()
    assert folds.keys() == {each.key for each in shards.manifest.lesions}

    with (cell.path / "per_image.csv").open(newline="") as file:
        written = {(line["key"], line["prompts"]): float(line["dice"]) for line in csv.DictReader(file)}
    rows = names["rows"]
    assert dict(zip(zip(rows["key"], rows["prompts"], strict=True), rows["dice"], strict=True)) == written
    assert set(rows["key"]) == {key for key, fold in folds.items() if fold == 0}
    with pytest.warns(BushpcWarning, match="fold1: "):  # only fold 0 was trained
        bushpc.read_results(cell.run)
    with pytest.raises(ConfigError, match="unet_small"):
        bushpc.read_results(cell.run, row="unet")

    result = names["result"]
    assert result.mask_HW.shape == result.prob_HW.shape == (record.height, record.width)
    assert result.area_mm2 == pytest.approx(result.mask_HW.sum() * record.pixel_mm**2)
    with pytest.warns(BushpcWarning):  # the other folds are missing
        of_run = bushpc.load(cell.run)
    assert predictor.members[0].sha256 == of_run.members[0].sha256
    np.testing.assert_array_equal(of_run(shards.image(record)).prob_HW, result.prob_HW)


def test_misuse_is_answered_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match="bushpc pack"):
        bushpc.open_shards(tmp_path)
    with pytest.raises(DataError, match="is not a run folder"):
        bushpc.read_results(tmp_path)
    with pytest.raises(ConfigError, match="fold=0"):
        bushpc.train_cell("model=unet_small", "data=phantom", "cluster=local", f"runs_dir={tmp_path}")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = bushpc.trian
    said: list[Exception] = []

    def train() -> None:
        try:
            bushpc.train_cell("fold=0")
        except ConfigError as error:
            said.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert "main thread" in str(said[0])
