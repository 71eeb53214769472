"""What issue and paper ask of real BrEaST, seen end to end. Needs BUSHPC_DATA; skipped with that reason otherwise."""

from __future__ import annotations

import csv
import json

import pytest

from bushpc.cli import main


@pytest.fixture(scope="module")
def breast_folder(real_data, tmp_path_factory):
    """BrEaST, packed."""
    folder = tmp_path_factory.mktemp("breast")
    assert main(["pack", "data=breast", f"src={real_data / 'breast'}", f"out={folder}"]) == 0
    return folder


def test_full_size_xbusnet_trains_two_steps_and_is_evaluated_on_real_scans(breast_folder, tmp_path):
    """The paper's model at the paper's size (random weights: none can be staged here), on the paper's own folds."""
    words = ["model=xbusnet", "data=breast", f"data.root={breast_folder}", "folds=published", "fold=0", "name=full"]
    words += ["model.pretrained=false", "train.iterations=2", "train.log_every=1", "also_prompts=[]"]
    words += [f"runs_dir={tmp_path}", f"loader.cache_dir={tmp_path / 'cache'}", "cluster.cpus_per_rank=2"]
    assert main(["cv", *words, "--wait"]) == 0
    cell_dir = tmp_path / "full" / "cells" / "fold0"
    with (cell_dir / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 51
    assert {row["prompts"] for row in rows} == {"first_pass"}
    assert all("shape" in row["attribute_prompt"] for row in rows)
    losses = [json.loads(line)["loss"] for line in (cell_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert (tmp_path / "full" / "report" / "index.html").exists()
