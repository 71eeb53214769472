"""Promises of the layout: a cell knows its run also through a link, and no two versions of a cell share a folder."""

from __future__ import annotations

from bushpc.runs.layout import BEFORE_ITS_START, CellDir, RunDir


def test_a_cell_knows_its_run_and_a_run_its_cells(tmp_path):
    run = RunDir(tmp_path / "mine")
    cell = run.cell("fold0")
    assert cell.path == tmp_path / "mine" / "cells" / "fold0"
    assert cell.run == run
    assert (cell.name, cell.run.name) == ("fold0", "mine")
    cell.path.mkdir(parents=True)
    assert run.cell_dirs() == [cell]


def test_a_linked_cell_belongs_to_the_run_where_it_lies(tmp_path):
    mine, theirs = RunDir(tmp_path / "mine"), RunDir(tmp_path / "theirs")
    theirs.cell("fold0").path.mkdir(parents=True)
    mine.cells.mkdir(parents=True)
    link = mine.cell("fold0")
    link.path.symlink_to("../../theirs/cells/fold0")
    assert link.is_link()
    assert link.run == mine
    assert link.resolve().run == theirs.resolve()


def test_the_settings_that_a_run_asks_of_a_link_come_before_those_of_the_cell(tmp_path):
    run = RunDir(tmp_path)
    assert run.asked("fold0") == run.cell("fold0").config
    run.linked("fold0").parent.mkdir()
    run.linked("fold0").touch()
    assert run.asked("fold0") == run.linked("fold0")


def test_a_cell_that_is_set_aside_twice_keeps_both_versions(tmp_path):
    run = RunDir(tmp_path)
    first = run.free_place(run.stale, "fold0", "abc")
    first.mkdir(parents=True)
    assert run.free_place(run.stale, "fold0", "abc") not in (first, run.stale)


def test_only_sealed_checkpoints_count_as_saved(tmp_path):
    cell = CellDir(tmp_path)
    assert cell.newest_step() == 0
    for name in ("step_00000004", ".step_00000009", "unread_step_00000008", "step_x", "other"):
        (cell.checkpoints / name).mkdir(parents=True)
    assert cell.newest_step() == 4
    assert cell.checkpoint(4).is_dir()


def test_runs_beside_a_run_are_found_by_their_file(tmp_path):
    for name in ("b", "a", "no_run"):
        (tmp_path / name).mkdir()
    for name in ("b", "a"):
        RunDir(tmp_path / name).file.touch()
    assert [run.name for run in RunDir(tmp_path / "a").neighbours()] == ["a", "b"]


def test_a_cell_has_begun_once_anything_but_its_submission_is_there(tmp_path):
    cell = CellDir(tmp_path / "cell")
    assert cell.names() <= BEFORE_ITS_START
    cell.path.mkdir()
    for path in (cell.config, cell.job_note):
        path.touch()
        assert cell.names() <= BEFORE_ITS_START
    cell.lease(1).touch()
    assert not cell.names() <= BEFORE_ITS_START
