"""Promises of grids whose rows train on scans that the same grid's generators make: planned whole, before any exist."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from bushpc.dispatch.chains import depth
from bushpc.dispatch.grid_file import load_grid
from bushpc.dispatch.plan import Plan, grid_plan
from bushpc.dispatch.run_folder import read_plan, write_run
from bushpc.errors import ConfigError, DataError
from bushpc.runs.layout import RunDir
from bushpc.runs.run_record import RunRecord

GRID = """
base: [model=unet_small, synthesis.n=20, train.iterations=3, train.batch_size=4]
generators:
  ours: {set: {model: tumor_generator_small, evaluate.metrics: [denoising_mse], loader.features: false}}
  sgd: {set: {model: sgd, model.channels: [32, 64], model.groups: 8, evaluate.metrics: [denoising_mse],
    train.accumulate: 1}}
rows:
  real_only: {}
  ours_1: {scans: ours, set: {data.synthetic_ratio: 1}}
  ours_only: {scans: ours, set: {data.synthetic_ratio: 1, data.real: false}}
  sgd_1: {scans: sgd, set: {data.synthetic_ratio: 1}}
"""


@pytest.fixture
def planned(tmp_path, two_folds_folder):
    """planned(*words, grid=…) → the plan of a grid, by default GRID."""

    def plan(*words: str, grid: str = GRID) -> Plan:
        path = tmp_path / "trial.yaml"
        path.write_text(grid)
        where = (f"data.root={two_folds_folder}", f"runs_dir={tmp_path}", "name=run", "cluster=local")
        return grid_plan([f"grid={path}", "data=phantom", *where, *words])

    return plan


def test_a_row_follows_the_cell_that_makes_its_scans_in_the_same_fold(planned):
    plan = planned()
    assert len(plan.cells) == 2 * (2 * 3 + 4)
    row = plan.cells["ours_1-fold1"]
    assert row.source == "ours-fold1-generate"
    assert plan.cells[row.source].source == "ours-fold1"
    assert Path(str(row.data.synthetic)) == RunDir(row.run_dir).cell(row.source).scans
    assert [depth(plan.cells, f"{name}-fold0") for name in ("real_only", "ours", "ours_1")] == [0, 0, 2]
    for first, second in itertools.pairwise(["ours-fold0", "ours-fold0-generate", "ours_1-fold0"]):
        assert list(plan.cells).index(first) < list(plan.cells).index(second)


def test_rows_of_other_generators_or_numbers_of_scans_are_other_cells(planned):
    cells, fewer = planned().cells, planned("synthesis.n=19").cells
    alike = [
        dataclasses.replace(cells[name], data=dataclasses.replace(cells[name].data, synthetic_cell=None))
        for name in ("ours_1-fold0", "sgd_1-fold0")
    ]
    assert alike[0].hash == alike[1].hash
    assert cells["ours_1-fold0"].hash != cells["sgd_1-fold0"].hash
    assert cells["ours_1-fold0"].hash != fewer["ours_1-fold0"].hash
    assert cells["real_only-fold0"].hash == fewer["real_only-fold0"].hash


def test_the_run_records_what_trained_the_generators_and_is_read_back_as_it_was_planned(planned, tmp_path):
    plan = planned()
    write_run(tmp_path / "run", plan, ["bushpc", "grid"])
    record = RunRecord.open(RunDir(tmp_path / "run"))
    assert record.cell("ours_1-fold0").trained_on == record.cell("ours-fold0").trained_on
    again = read_plan(tmp_path / "run")
    assert again.grid is not None
    assert [row.scans for row in again.grid.rows] == [None, "ours", "ours", "sgd"]
    assert {name: cell.hash for name, cell in again.cells.items()} == {n: c.hash for n, c in plan.cells.items()}
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    row = read_plan(moved).cells["ours_1-fold0"]
    assert Path(str(row.data.synthetic)).is_relative_to(moved)


def test_rows_left_out_leave_out_their_generator(planned):
    assert {plan_row for plan_row in planned("rows=[real_only,sgd_1]").row_of.values()} == {"real_only", "sgd_1", "sgd"}


def test_a_word_changes_one_row_alone(planned):
    plan = planned("rows.ours.train.lr=0.5", "rows.sgd_1.train.lr=0.25")
    lr = {name: plan.cells[f"{name}-fold0"].train.lr for name in ("ours", "sgd", "sgd_1")}
    assert (lr["ours"], lr["sgd_1"]) == (0.5, 0.25)
    assert lr["sgd"] < 0.25


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["synthesis.n=9"], "synthesis.n=10"),
        (["synthesis.n=0"], "say how many, such as synthesis.n=1000"),
        (["rows.our.train.lr=1"], "unknown row 'our'; did you mean 'ours'"),
        (["rows.ours=1"], "rows.ours.train.lr=1e-3"),
        (["rows.ours.folds=grouped"], "the same for all rows"),
        (["rows.ours.model=unet_small", "rows.ours.evaluate.metrics=[dice]"], "generates no scans"),
    ],
)
def test_what_cannot_run_is_refused_with_what_would(planned, words, said):
    with pytest.raises((ConfigError, DataError)) as refused:
        planned(*words)
    assert said in str(refused.value)


def test_steps_that_depend_on_labels_of_scans_to_come_are_refused(planned):
    with pytest.raises(ConfigError, match=r"set train\.iterations"):
        planned("train.balance=true", grid=GRID.replace("train.iterations=3", "train.epochs=2"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("scans: sgd", "scans: sdg", "unknown generator 'sdg'; did you mean 'sgd'"),
        ("  sgd_1: {scans: sgd, set: {data.synthetic_ratio: 1}}\n", "", "no row has `scans: sgd`"),
        ("sgd_1: {scans", "sgd: {scans", "two rows are called sgd"),
        ("ours: {set", "ours: {scans: sgd, set", "unknown key 'scans'"),
    ],
)
def test_a_grid_file_that_cannot_be_meant_is_refused(tmp_path, old, new, said):
    path = tmp_path / "trial.yaml"
    path.write_text(GRID.replace(old, new))
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        load_grid(str(path))


@pytest.mark.parametrize("table", ["tumor_generator_table3", "tumor_generator_table4"])
def test_the_papers_tables_are_one_graph_of_cells(table):
    grid = load_grid(table)
    assert all(row.scans in {None, *(each.name for each in grid.generators)} for row in grid.rows)
    assert grid.baseline in {row.name for row in grid.rows}
