"""Promises of `bushpc reproduce`: it names what is missing and how to get it, and runs every step in its turn."""

from __future__ import annotations

import pytest
import yaml

from bushpc.config import compose, config_names
from bushpc.config.gpu_memory import TABLE
from bushpc.dispatch.reproduce import load_paper, look_at
from bushpc.errors import ConfigError

PAPERS = ("hybrid_attention", "sam_multitask", "tumor_generator", "vit_diffusion", "xbusnet")
STEPS = """
title: Two steps
steps:
  first: {what: a, command: [cv, model=unet_small, data=breast]}
  kept: {what: b, command: [export, "{run:first}", "{export:unet}"]}
  second: {what: c, command: [cv, model=unet, data=breast, "train.start_from={export:unet}"]}
"""


@pytest.fixture
def paper(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(STEPS)
    words = [f"runs_dir={tmp_path / 'runs'}", f"data.root={tmp_path / 'none'}", f"weights_dir={tmp_path / 'weights'}"]
    return load_paper(str(file), words)


def test_every_paper_is_there_and_its_steps_are_commands():
    assert tuple(config_names("reproduce")) == PAPERS
    for name in PAPERS:
        assert load_paper(name).steps


def test_missing_data_and_weights_are_named_with_their_commands_and_nothing_is_written(paper, tmp_path):
    first, kept, second = look_at(paper)
    assert (first.state, kept.state, second.state) == ("missing", "waits", "missing")
    assert first.data == {"breast": False}
    assert "bushpc pack data=breast src=FOLDER out=" in first.missing[0]
    assert any("bushpc weights pull" in line and "model=unet" in line for line in second.missing)
    assert not (tmp_path / "runs").exists()
    assert (first.cells, first.gpu_hours, first.unknown) == (5, 0.0, 5)
    assert second.gpu_hours > 0
    assert "not measured" in second.sources[0]


def test_the_estimate_is_images_times_the_time_of_one(paper):
    image_s = next(row["image_s"] for row in yaml.safe_load(TABLE.read_text())["rows"] if row["name"] == "unet")
    second = look_at(paper)[2]
    cell = compose(second.command[1:2] + second.command[2:3])
    images = cell.train.iterations * cell.train.batch_size
    assert second.gpu_hours == pytest.approx(5 * images * image_s / 3600)


def test_words_that_the_steps_say_themselves_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown paper 'xbusnt'; did you mean 'xbusnet'"):
        load_paper("xbusnt")
    with pytest.raises(ConfigError, match=r"model=unet: the steps of xbusnet\.yaml say this"):
        load_paper("xbusnet", ["model=unet"])
    file = tmp_path / "bad.yaml"
    for text, said in (
        ("title: a\nsteps: {x: {what: b}}", "each step with what and command"),
        ("title: a\nsteps: {x: {what: b, command: [predict]}}", "must be one of cv, grid, export"),
        ('title: a\nsteps: {x: {what: b, command: [cv, "model.base={export:y}"]}}', "no step makes"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_paper(str(file))
