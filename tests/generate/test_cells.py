"""Promises of cells that follow a generator's training: planned once, in order, and no part of the training."""

from __future__ import annotations

import dataclasses

import pytest

from bushpc.config import compose
from bushpc.dispatch.chains import following
from bushpc.errors import TrainingError
from bushpc.report.published import generator_rows
from bushpc.runs.layout import RunDir
from bushpc.runs.source import wait_for_source

SMALL = ("model=tumor_generator_small", "data=phantom", "cluster=local", "fold=0")


def test_a_generator_is_followed_by_generation_and_quality_each_reading_the_one_before():
    cell = compose([*SMALL, "synthesis.n=8"])
    generate, quality = following("ours-fold0", cell).items()
    assert [generate[0], generate[1].work, generate[1].source] == ["ours-fold0-generate", "generate", "ours-fold0"]
    assert [quality[0], quality[1].work, quality[1].source] == ["ours-fold0-quality", "quality", generate[0]]
    assert len({cell.hash, generate[1].hash, quality[1].hash}) == 3
    assert following("fold0", compose(list(SMALL))) == {}
    assert following("fold0", compose(["model=unet_small", *SMALL[1:], "synthesis.n=8"])) == {}
    assert following("fold0", compose(["model=tumor_generator_vae_small", *SMALL[1:], "synthesis.n=8"])) == {}


def test_the_number_of_scans_changes_no_training_and_the_scans():
    eight, nine, none = (compose([*SMALL, f"synthesis.n={n}"]) for n in (8, 9, 0))
    assert eight.hash == nine.hash == none.hash
    of = [dataclasses.replace(cell, work="generate", source="fold0").hash for cell in (eight, nine)]
    assert of[0] != of[1]


def test_a_cell_whose_source_failed_says_so_and_does_not_wait(tmp_path):
    run = RunDir(tmp_path)
    run.cell("fold0").path.mkdir(parents=True)
    run.cell("fold0").failed.write_text("out of memory")
    with pytest.raises(TrainingError, match="fold0 is not done, and no job works on it"):
        wait_for_source("fold0", run, lambda: True, lambda: None)


def test_the_papers_rows_are_those_of_its_tables():
    busi = {row.label: (row.fid, row.kid) for row in generator_rows("busi")}
    assert busi["Ours"] == (6.858, 0.022)
    assert len(busi) == 9
    assert {row.label: row.fid for row in generator_rows("udiat")}["LoRA, r = 8"] == 7.316
    assert generator_rows("breast") == []
