"""Promises of grids that are a paper's table of rivals: every row is there, run or quoted with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.dispatch.grid_file import load_grid
from bushpc.dispatch.plan import grid_plan
from bushpc.dispatch.run_folder import read_plan, write_run
from bushpc.errors import ConfigError
from bushpc.report.published import generator_rows, names_in

SMALL = ("model=unet_small", "data=phantom", "cluster=local", "model.image_size=32")
TABLE = """
paper: xbusnet
rows:
  kan: {label: U-KAN, quoted: "no description"}
  first: {label: ours, paper: XBusNet, set: {train.lr: 1.0e-3}}
  sam: {label: BUSSAM, quoted: "no weights"}
  second: {label: classic, paper: [UNet], set: {train.lr: 2.0e-3}}
  res: {label: U-ResNet, quoted: "no citation"}
"""


@pytest.fixture
def words(tmp_path: Path, phantom_folder: Path) -> list[str]:
    (tmp_path / "trial.yaml").write_text(TABLE)
    places = (f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}")
    return [f"grid={tmp_path / 'trial.yaml'}", *SMALL, *places]


def load(tmp_path: Path, rows: str, paper: str = "xbusnet"):
    path = tmp_path / "trial.yaml"
    path.write_text(f"paper: {paper}\nrows:\n  a: {{set: {{train.lr: 1.0e-3}}}}\n  {rows}\n")
    return load_grid(str(path))


@pytest.mark.parametrize("paper", ["xbusnet", "hybrid_attention", "vit_diffusion", "sam_multitask"])
def test_every_row_of_the_papers_tables_is_in_its_grid_once(paper):
    grid = load_grid(f"{paper}_rivals")
    named = [name for row in (*grid.rows, *grid.quoted) for name in row.printed_as]
    assert sorted(named) == sorted(names_in(paper))
    assert all(row.printed_as for row in grid.rows)
    assert grid.paper == paper


def test_the_compared_generators_are_run_or_quoted_once():
    """Ours without mask or without text are rows of tumor_generator_table1."""
    grid = load_grid("tumor_generator_rivals")
    named = [name for row in (*grid.rows, *grid.quoted) for name in row.printed_as]
    printed = {row.label for row in generator_rows("busi")}
    assert sorted(named) == sorted(printed - {"Ours-t", "Ours-m"})
    (quoted,) = grid.quoted
    assert (quoted.label, quoted.before) == ("MT-DDPM", "sgd")
    assert "was not written here" in quoted.reason


def test_quoted_rows_are_no_cells_and_keep_their_place_in_the_run_folder(words):
    plan = grid_plan(words)
    assert {*plan.row_of.values()} == {"first", "second"}
    write_run(plan.first.run_dir, plan, ["bushpc", "grid"])
    kept = read_plan(plan.first.run_dir).grid
    assert [(row.label, row.before) for row in kept.quoted] == [
        ("U-KAN", "first"), ("BUSSAM", "second"), ("U-ResNet", None)
    ]  # fmt: skip
    assert kept.quoted == plan.grid.quoted
    assert [row.printed_as for row in kept.rows] == [("XBusNet",), ("UNet",)]
    recorded = json.loads((plan.first.run_dir / "run.json").read_text())["grid"]
    assert recorded["quoted"][0]["reason"] == "no description"


def test_rows_that_are_left_out_stay_in_the_table_with_that_reason(words):
    whole, part = grid_plan(words), grid_plan([*words, "rows=[second]"])
    assert {*part.row_of.values()} == {"second"}
    assert part.grid.baseline == "second"
    assert [(row.label, row.before) for row in part.grid.quoted] == [
        ("U-KAN", "second"), ("ours", "second"), ("BUSSAM", "second"), ("U-ResNet", None)
    ]  # fmt: skip
    assert "rows=" in part.grid.quoted[1].reason
    assert part.first.run_dir != whole.first.run_dir  # neither sets the other's cells aside
    assert part.cells["second-fold0"].hash == whole.cells["second-fold0"].hash


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('b: {label: U-KAN, quoted: ""}', "the reason why"),
        ("b: {label: U-KAN, quoted: why, set: {train.lr: 1.0e-4}}", "in place of `set`"),
        ("b: {label: U-KAM, quoted: why}", "no row 'U-KAM'"),
        ("b: {label: x, paper: U-KAM, set: {train.lr: 1.0e-4}}", "did you mean 'U-KAN'"),
        ("b: {label: x, paper: {U-KAN: 1}, set: {train.lr: 1.0e-4}}", "or a list"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(tmp_path, rows, said):
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, rows)


def test_a_paper_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'xbusnet'"):
        load(tmp_path, "b: {}", paper="xbusnets")


@pytest.mark.parametrize(("chosen", "said"), [("[thrid]", "Valid: first, second"), ("[]", "name one row")])
def test_rows_that_the_grid_lacks_are_refused(words, chosen, said, capsys):
    assert main(["grid", *words, f"rows={chosen}", "--list"]) == 2
    assert said in capsys.readouterr().err


def test_rows_that_cannot_take_the_data_are_refused_with_those_that_can(words, tmp_path, capsys):
    (tmp_path / "trial.yaml").write_text(TABLE.replace("train.lr: 2.0e-3", "model: classic_unet, model.image_size: 40"))
    assert main(["grid", *words, "--list"]) == 2
    said = capsys.readouterr().err
    assert "1 of 2 rows cannot be run; nothing was queued" in said
    assert "model.image_size=40 is not a multiple of 16" in said
    assert "add rows=[first]" in said
    assert not (tmp_path / "runs").exists()
