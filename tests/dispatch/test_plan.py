"""Promises of grids: every row is checked before anything is queued, and no cell is trained twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.config import CellConfig, Composer, compose, config_names
from bushpc.dispatch.grid_file import load_grid
from bushpc.dispatch.plan import Plan, cv_plan, grid_plan
from bushpc.dispatch.run_folder import read_plan, write_run
from bushpc.dispatch.status import read_status, report_is_current
from bushpc.errors import ConfigError, DataError
from bushpc.sample import UNLABELLED
from bushpc.shards.sources import phantom
from bushpc.shards.split import ensure_folds
from bushpc.shards.write import pack

SMALL = ("model=unet_small", "data=phantom", "cluster=local", "model.image_size=32")


@pytest.fixture
def where(tmp_path, phantom_folder) -> tuple[str, ...]:
    return f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}"


@pytest.fixture
def plan_of(tmp_path, where):
    """plan_of(yaml, "override", …) → the plan of a grid file with this content."""

    def make(content: str, *words: str) -> Plan:
        path = tmp_path / "trial.yaml"
        path.write_text(content)
        return grid_plan([f"grid={path}", *SMALL, *where, *words])

    return make


def rows_of(plan: Plan) -> dict[str, dict[str, object]]:
    assert plan.grid is not None
    return {row.name: row.settings for row in plan.grid.rows}


def write(plan: Plan) -> Path:
    write_run(plan.first.run_dir, plan, ["bushpc", "grid"])
    return plan.first.run_dir


def finish(run_dir: Path, cell: str) -> Path:
    """As a cell does when it is done. Returns its folder."""
    folder = (run_dir / "cells" / cell).resolve()
    (folder / "DONE").write_text(json.dumps({"config": CellConfig.load(folder / "config.yaml").hash}))
    return folder


def states(run_dir: Path) -> dict[str, str]:
    return {cell.name: cell.state for cell in read_status(run_dir).cells}


TABLE = "rows:\n  a: {label: first, set: {train.lr: 1.0e-3}}\n  b: {set: {train.lr: 2.0e-3}}\n"


def test_prompts_that_a_model_lacks_are_refused_and_a_grids_rows_without_them_go_on(plan_of, where):
    """They become `none`, which sees no ground truth either; a model that reads no prompts follows any."""
    xbusnet = ("model=xbusnet_small", "model.image_size=64")
    no_spatial = [*SMALL, *xbusnet, "model.gfe=false", *where]
    with pytest.raises(
        ConfigError, match=r"prompts=oracle: XBusNet .* set prompts to one of none, shuffled_attributes"
    ):
        cv_plan(compose([*no_spatial, "prompts=oracle"]))
    assert cv_plan(compose(no_spatial)).first.variants[0].name == "none"
    assert cv_plan(compose([*SMALL, *where, "prompts=oracle"])).first.variants[0].name == "none"
    grid = plan_of(
        "rows: {a: {set: {model.gfe: true}}, b: {set: {model.gfe: false}}}",
        *(*xbusnet, "prompts=oracle", "also_prompts=[]"),
    )
    assert {grid.row_of[name]: cell.variants[0].name for name, cell in grid.cells.items()} == {
        "a": "oracle",
        "b": "none",
    }


def test_a_model_that_reads_every_label_is_refused_where_scans_have_none(tmp_path, monkeypatch):
    planned = phantom.plan

    def without_labels(*args, **how):
        items = [type(item)(key=item.key, label=UNLABELLED, recipe=item.recipe) for item in planned(*args, **how).items]
        return planned(*args, **how)._replace(items=items)

    load = phantom.load
    monkeypatch.setattr(phantom, "plan", without_labels)
    monkeypatch.setattr(phantom, "load", lambda item: dataclasses.replace(load(item), label=UNLABELLED))
    folder = tmp_path / "phantom"
    ensure_folds(folder, pack("phantom", None, folder, parameters={"count": 10, "normals": 0}))
    words = ["data=phantom", "cluster=local", "model.image_size=32", f"data.root={folder}"]
    with pytest.raises(
        DataError, match="model=cgan reads the label of every scan, and 8 of the 8 that train in fold 0"
    ):
        cv_plan(compose(["model=cgan", *words]))
    assert len(cv_plan(compose(["model=gan", *words])).cells) == 5


def test_axes_are_multiplied_out_and_rows_come_besides(plan_of):
    plan = plan_of(
        """
        axes:
          train.lr: [1.0e-3, 2.0e-3]
          width:
            narrow: {model.decoder_channels: [32, 16, 16, 8, 8]}
            wide: {model.decoder_channels: [64, 32, 16, 8, 8]}
        exclude: [{train.lr: 2.0e-3, model.decoder_channels: [64, 32, 16, 8, 8]}]
        rows: {long: {set: {train.iterations: 900}}}
        baseline: long
        """
    )
    assert rows_of(plan) == {
        "lr_0.001_narrow": {"train.lr": 0.001, "model.decoder_channels": [32, 16, 16, 8, 8]},
        "lr_0.001_wide": {"train.lr": 0.001, "model.decoder_channels": [64, 32, 16, 8, 8]},
        "lr_0.002_narrow": {"train.lr": 0.002, "model.decoder_channels": [32, 16, 16, 8, 8]},
        "long": {"train.iterations": 900},
    }
    assert plan.grid.baseline == "long"
    assert len(plan.cells) == 4 * 5
    cell = plan.cells["lr_0.001_wide-fold3"]
    assert (cell.train.lr, cell.model.decoder_channels, cell.fold) == (0.001, (64, 32, 16, 8, 8), 3)
    assert plan.cells["long-fold0"].train.iterations == 900


def test_a_row_may_choose_another_model_and_other_resources(plan_of):
    plan = plan_of("rows: {small: {set: {}}, full: {set: {model: xbusnet_small, cluster.cpus_per_rank: 4}}}")
    small, full = plan.cells["small-fold0"], plan.cells["full-fold0"]
    assert (small.choices["model"], full.choices["model"]) == ("unet_small", "xbusnet_small")
    assert (small.cluster.cpus_per_rank, full.cluster.cpus_per_rank) == (1, 4)
    assert full.model.image_size == 32, "words of the command line count for every row"


def test_one_fold_may_be_submitted_of_all(plan_of):
    plan = plan_of(TABLE, "fold=2")
    assert plan.wanted == ["a-fold2", "b-fold2"]
    assert len(plan.cells) == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("axes: {train.learning: [1, 2]}", r"row learning_1: unknown setting 'train.learning'; did you mean"),
        ("title: nothing", "has no cells: no rows, no axes"),
        ("axes: {train.lr: [1.0]}\nexclude: [{train.lr: 1.0}]", "every combination of its axes is excluded"),
        ("axes: {train.lr: [0.1]}\nexclude: [{train.lr: 3}]", "fits no combination"),
        ("axes: {train.lr: [0.1]}\nexclude: [{train.rl: 3}]", "did you mean 'train.lr'"),
        ("axes: {train.lr: []}", "a list of values"),
        ("axes: {train.lr: [0.1, 0.1]}", "stands there twice"),
        ("axes: {train.lr: [0.1]}\nrows: {lr_0.1: {}}", "two rows are called lr_0.1"),
        ("axes: {fold: [0, 1]}", "fold is the same for all rows"),
        ("rows: {a: {set: {data: breast}}}", "data is the same for all rows"),
        (TABLE + "baseline: c", "unknown baseline 'c'"),
        (TABLE + "axis: {}", "unknown key 'axis'; did you mean 'axes'"),
        ("rows: {a: {sets: {}}}", "unknown key 'sets'"),
        ("rows: {a: {set: {train.lr: 1e-3x}}}", r"train.lr='1e-3x' is a str; allowed: float"),
        ("rows: {a: {}, b: {set: {model: unett}}}", "unknown model 'unett'"),
        ("rows: {a: {}, b: {set: {train.batch_size: 0}}, c: {}}", "1 of 3 rows cannot be run; nothing was queued"),
        ("[", "cannot be read"),
        ("rows: {a: {}, b: {}, a: {}}", "a stands twice in one mapping"),
        ("rows: {on: {}, off: {}}", "line 1: True is no text, put it into quotes"),
        ("axes: {name: [2020-01-01]}", "would be read as a date"),
        ("axes: {x: {a: {train.lr: 1.0}}, train.lr: [2.0]}", "the axes x and train.lr both set train.lr"),
        (f"axes: {{a: {list(range(200))}, b: {list(range(200))}}}", "40000 combinations; allowed are 20000"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(plan_of, tmp_path, content, said):
    with pytest.raises(ConfigError, match=said):
        plan_of(content)
    assert not (tmp_path / "runs").exists()


def test_a_word_that_a_row_would_hide_is_refused(plan_of):
    with pytest.raises(ConfigError, match=r"train.lr=3: the rows .* set train.lr themselves"):
        plan_of(TABLE, "train.lr=3")


def test_a_missing_grid_is_named_with_those_that_there_are(capsys):
    assert main(["grid", "grid=xbusnet_component"]) == 2
    assert "did you mean 'xbusnet_components'" in capsys.readouterr().err
    assert main(["grid"]) == 2
    assert f"Valid: {', '.join(config_names('grid'))}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be read"):
        load_grid("no/such.yaml")


@pytest.mark.parametrize("name", config_names("grid"))
def test_every_row_of_a_grid_in_the_tree_can_be_composed_and_is_another_cell(name):
    grid = load_grid(name)
    composer = Composer([*grid.base, "data=phantom", "data.synthetic=made"])
    rows = [*grid.rows, *grid.generators]
    assert len({(row.scans, composer(row.settings).hash) for row in rows}) == len(rows)


def test_table_4_and_the_prompt_grids_share_what_they_have_in_common(where):
    words = ["model=xbusnet_small", "data=phantom", "cluster=local", *where]
    names = ("xbusnet_components", "xbusnet_prompt_sources", "xbusnet_prompt_corruption")
    table4, sources, corruption = (grid_plan([f"grid={name}", *words]) for name in names)
    switches = {name: tuple(row.values()) for name, row in rows_of(table4).items()}
    yes, no = True, False
    assert switches == {
        "full": (yes, yes, yes), "no_lfe": (no, yes, no), "no_gfe": (yes, no, yes), "no_sfa": (yes, yes, no)
    }  # fmt: skip
    assert len(table4.cells) == 20
    first, second, third = write(table4), write(sources), write(corruption)
    finish(first, "full-fold3")
    assert states(second)["mostly-fold3"] == "done"
    assert states(third)["spatial_dropout_0.3-fold3"] == "done"
    assert (third / "cells" / "spatial_dropout_0.0-fold1").resolve() == second / "cells" / "always-fold1"
    assert not (second / "cells" / "never-fold0").is_symlink()


def test_two_rows_with_the_same_settings_are_one_cell(plan_of):
    run_dir = write(plan_of(TABLE + "  again: {set: {train.lr: 1.0e-3}}\n"))
    finish(run_dir, "again-fold0")
    assert states(run_dir)["a-fold0"] == states(run_dir)["again-fold0"] == "done"
    assert states(run_dir)["b-fold0"] == "missing"


def test_a_cell_whose_other_run_is_gone_is_the_grids_own(plan_of):
    other = write(plan_of(TABLE, "name=other"))
    run_dir = write(plan_of(TABLE, "name=mine"))
    assert (run_dir / "cells" / "a-fold0").is_symlink()
    shutil.rmtree(other)
    write(plan_of(TABLE, "name=mine"))
    assert not (run_dir / "cells" / "a-fold0").is_symlink()
    assert set(states(run_dir).values()) == {"missing"}


def test_only_edited_cells_are_stale_and_their_results_are_found_again(plan_of):
    run_dir = write(plan_of(TABLE, "name=edited"))
    for cell in ("a-fold0", "b-fold0"):
        finish(run_dir, cell)
    edited = TABLE.replace("2.0e-3", "5.0e-3")
    write(plan_of(edited, "name=edited"))
    assert (states(run_dir)["a-fold0"], states(run_dir)["b-fold0"]) == ("done", "missing")
    assert (run_dir / "cells" / "b-fold0" / "config.yaml").read_text().count("lr: 0.005") == 1
    write(plan_of(TABLE, "name=edited"))
    assert (states(run_dir)["a-fold0"], states(run_dir)["b-fold0"]) == ("done", "done")
    assert states(run_dir)["b-fold1"] == "missing"


def test_another_run_never_passes_for_this_ones_after_an_edit(plan_of):
    other = write(plan_of(TABLE, "name=other"))
    run_dir = write(plan_of(TABLE, "name=mine"))
    finish(other, "b-fold0")
    write(plan_of(TABLE.replace("2.0e-3", "5.0e-3"), "name=other"))
    finish(other, "b-fold0")
    assert states(run_dir)["b-fold0"] == "stale"
    write(plan_of(TABLE, "name=mine"))
    assert states(run_dir)["b-fold0"] == "done"
    assert "lr: 0.002" in (run_dir / "cells" / "b-fold0" / "config.yaml").read_text()


def test_what_a_run_asks_for_does_not_change_with_the_run_that_has_its_cell(plan_of, tmp_path):
    other = write(plan_of(TABLE, "name=other"))
    run_dir = write(plan_of(TABLE, "name=mine"))
    asked = {name: cell.hash for name, cell in read_plan(run_dir).cells.items()}
    write(plan_of(TABLE.replace("2.0e-3", "5.0e-3"), "name=other"))
    finish(other, "b-fold0")
    assert {name: cell.hash for name, cell in read_plan(run_dir).cells.items()} == asked
    other.rename(tmp_path / "archived")
    assert "which is gone" in read_status(run_dir).cells[0].reason
    assert {name: cell.hash for name, cell in read_plan(run_dir).cells.items()} == asked


def test_what_went_on_with_other_settings_is_nobodys_twin_whatever_is_said_later(plan_of):
    write(plan_of(TABLE, "name=other"))
    changed = TABLE.replace("2.0e-3", "5.0e-3")
    other = write(plan_of(changed, "name=other", "resume_changes=[train.lr]"))
    write(plan_of(changed, "name=other"))
    finish(other, "b-fold0")
    run_dir = write(plan_of(changed, "name=mine"))
    assert not (run_dir / "cells" / "b-fold0").is_symlink()
    assert (run_dir / "cells" / "a-fold0").is_symlink() is False, "that run was allowed to change it, too"


def test_a_page_of_other_rows_than_the_run_has_is_not_current(plan_of):
    run_dir = write(plan_of(TABLE, "name=paged"))
    (run_dir / "report").mkdir()
    (run_dir / "report" / "index.html").touch()
    write(plan_of(TABLE, "name=paged"))
    assert report_is_current(run_dir)
    write(plan_of(TABLE + "baseline: b", "name=paged"))
    assert not report_is_current(run_dir)


def test_a_plan_can_be_read_back_from_its_run(plan_of, tmp_path):
    plan = plan_of(TABLE, "name=back")
    run_dir = write(plan)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    run_dir.rename(moved)
    found = read_plan(moved)
    assert {name: cell.hash for name, cell in found.cells.items()} == {n: c.hash for n, c in plan.cells.items()}
    assert found.first.run_dir == moved
    assert (found.kind, found.row_of, found.grid.rows) == (plan.kind, plan.row_of, plan.grid.rows)


def test_a_run_of_another_version_is_refused_with_the_way_on(plan_of):
    run_dir = write(plan_of(TABLE, "name=old"))
    config = run_dir / "cells" / "a-fold0" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 0\nsprout: 1"))
    with pytest.raises(ConfigError, match=r"no config of this version.*sprout.*\(cd .*/code/\w{12} && .*resume"):
        read_plan(run_dir)
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "format": 99}))
    with pytest.raises(DataError, match=r"has format 99, and this version of bushpc .* reads up to 1.*/code/\w{12} &&"):
        read_status(run_dir)


def test_the_list_shows_rows_and_submits_nothing(where, capsys, tmp_path):
    words = ["grid", "grid=xbusnet_components", "model=xbusnet_small", "data=phantom", "cluster=local", *where]
    assert main([*words, "--list"]) == 0
    said = capsys.readouterr().out
    assert "full (baseline)" in said
    assert "model.gfe=false" in "".join(said.split())
    assert not (tmp_path / "runs").exists()
