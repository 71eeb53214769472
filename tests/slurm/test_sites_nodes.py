"""Promises on a site that gives whole nodes of 4 GPUs: four one-GPU cells share a node, and each stays its own."""

from __future__ import annotations

import json
import shutil
import typing as t
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.sites import home, logs, run_folder, shares, words

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Sandbox

pytestmark = pytest.mark.real

NODE = ("cluster.gpus=4", "cluster.cells_per_job=4", "cluster.exclusive=true")


@pytest.fixture(scope="module")
def nodes(site: Callable[..., Sandbox], phantom_folder: Path) -> Sandbox:
    sandbox = site("gpus", "whole-nodes")
    shutil.copytree(phantom_folder, home(sandbox) / "phantom")
    return sandbox


def test_one_cell_of_a_node_fails_and_is_retried_while_the_others_go_on(nodes: Sandbox) -> None:
    long = words(nodes, "cv", "one-fails", *NODE, "train.iterations=200")
    run_dir = run_folder(nodes, "one-fails")
    nodes.run(["scontrol", "update", "PartitionName=low", "State=DOWN"])
    [answer] = nodes.bushpc(long)
    assert answer.status == 0, answer.said
    fails = run_dir / "cells" / "fold1" / "fails"
    fails.touch()
    nodes.run(["scontrol", "update", "PartitionName=low", "State=UP"])
    failed = fails.with_name("FAILED")
    nodes.until(failed.exists, what=lambda: logs(run_dir))
    fails.unlink()
    nodes.until(lambda: len(shares(run_dir)) == 5)

    status, retried = nodes.bushpc(["status", str(run_dir), "--json"], ["retry", str(run_dir), "fold1"])
    found = {cell["name"]: cell["state"] for cell in json.loads(status.said)["cells"]}
    assert found.pop("fold1") == "failed"
    assert "failed" not in found.values()
    assert "submitted: fold1\n" in retried.said

    nodes.until(lambda: len(list(run_dir.glob("cells/*/DONE"))) == 5, what=lambda: logs(run_dir))
    told = shares(run_dir)
    starts = {path.parent.name: len(path.read_text().splitlines()) for path in run_dir.glob("cells/*/share.jsonl")}
    assert starts == {"fold0": 1, "fold1": 2, "fold2": 1, "fold3": 1, "fold4": 1}
    assert told["fold1"]["job"] != told["fold0"]["job"]
