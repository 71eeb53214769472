"""What issue and paper ask of real BrEaST, seen end to end. Needs BUSHPC_DATA; skipped with that reason otherwise."""

from __future__ import annotations

import csv
import json

import pytest

from bushpc.cli import main

CASES = 24  # of 256, so that two steps at full size and their evaluation end within minutes on a CPU


@pytest.fixture(scope="module")
def breast_excerpt(real_data, tmp_path_factory):
    """The first cases of BrEaST, with the whole spreadsheet, packed as the excerpt that it is."""
    raw, packed = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("breast")
    images = raw / "BrEaST-Lesions_USG-images_and_masks"
    images.mkdir()
    [sheet] = (real_data / "breast").glob("*.xlsx")
    (raw / sheet.name).symlink_to(sheet)
    for path in (real_data / "breast" / images.name).iterdir():
        if int(path.name[4:7]) <= CASES:
            (images / path.name).symlink_to(path)
    assert main(["pack", "data=breast", f"src={raw}", f"out={packed}", "excerpt=true"]) == 0
    return packed


def test_full_size_xbusnet_trains_two_steps_and_is_evaluated_on_real_scans(breast_excerpt, tmp_path):
    """The paper's model at the paper's size (random weights: none can be staged here), on the paper's own folds."""
    words = ["model=xbusnet", "data=breast", f"data.root={breast_excerpt}", "folds=published", "fold=0", "name=full"]
    words += ["model.pretrained=false", "train.iterations=2", "train.log_every=1", "also_prompts=[]"]
    words += ["evaluate.explain=1"]  # a map takes three more passes
    words += [f"runs_dir={tmp_path}", f"loader.cache_dir={tmp_path / 'cache'}", "cluster.cpus_per_rank=2"]
    assert main(["cv", *words, "--wait"]) == 0
    cell_dir = tmp_path / "full" / "cells" / "fold0"
    with (cell_dir / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "full" / "folds.csv").open() as file:
        published = [row for row in csv.DictReader(file) if row["fold"] == "0"]
    assert {row["key"] for row in rows} == {row["key"] for row in published if int(row["key"][4:7]) <= CASES}
    assert len(rows) >= 3
    assert {row["prompts"] for row in rows} == {"first_pass"}
    assert all("shape" in row["attribute_prompt"] for row in rows)
    losses = [json.loads(line)["loss"] for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    summary = json.loads((tmp_path / "full" / "report" / "summary.json").read_text())
    assert summary["data"] == "breast (excerpt)", "the paper's figures for the whole dataset must not stand beside it"
