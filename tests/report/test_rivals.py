"""A paper's table of rivals: every row is shown, and a published figure stands only beside the same quantity."""

import json

import pytest

from bushpc.report import build_report
from bushpc.report.scope import scope_of_run
from bushpc.report.summary.summarise import summarise
from bushpc.report.summary.summary import read_summary
from bushpc.report.table import bold_cells
from bushpc.report.tables import all_tables

ROWS = {"unet": {"model": "classic_unet"}, "xbusnet": {"model": "xbusnet"}}


@pytest.fixture
def tables_of(new_run, row):
    """tables_of(of_run) → the tables of a grid with two rows that are run, of five folds, and two that are quoted."""

    def make(**changes):
        run = new_run("rivals")
        run.rows, run.run = ROWS, {}
        run.write_run_json()
        grid = run.run["grid"]
        grid |= {"paper": "xbusnet", "baseline": "xbusnet", "quoted": [
            {"label": "U-KAN", "printed_as": ["U-KAN"], "reason": "no description", "before": "xbusnet"},
            {"label": "AnatoSegNet", "printed_as": ["AnatoSegNet"], "reason": "no description", "before": None},
        ]}  # fmt: skip
        for record, name in zip(grid["rows"], ("UNet", "XBusNet"), strict=True):
            record["printed_as"] = [name]
        run.write_run_json(grid=grid, **changes)
        for name, dice in (("unet", 0.6), ("xbusnet", 0.7)):
            run.of(name).complete({k: [row(f"{k}{i}", k, dice=dice) for i in range(3)] for k in range(5)})
        scope = scope_of_run(run.path)
        summary = summarise(scope)
        assert read_summary(_saved(run.path, summary)).rivals == summary.rivals
        return all_tables(scope, summary, None)

    return make


def test_a_network_that_finds_no_lesion_has_no_competing_false_positive_rate(new_run, row):
    run = new_run("empty")
    run.rows, run.run = {**ROWS, "fcn": {"model": "fcn"}}, {}
    run.write_run_json(data="phantom")
    for name, dice, fpr in (("unet", 0.0, 0.0), ("xbusnet", 0.7, 0.2), ("fcn", 0.6, 0.1)):
        run.of(name).complete({k: [row(f"{k}{i}", k, dice=dice, fpr=fpr) for i in range(3)] for k in range(5)})
    scope = scope_of_run(run.path)
    table = all_tables(scope, summarise(scope), None)["headline"]
    bold = {(str(table.rows[i].values[0]), table.columns[j].key) for i, j in bold_cells(table, list(table.rows))}
    assert {("xbusnet", "dice"), ("fcn", "fpr")} <= bold
    assert not any(name == "unet" for name, _ in bold)
    assert table.notes[-1] == "Bold: the best of its group; mask metrics of methods with a Dice of 0 do not compete."


def _saved(folder, summary):
    (folder / "summary.json").write_text(summary.to_json())
    return folder / "summary.json"


def _lines(table):
    keys = [column.key for column in table.columns]
    return [{key: str(value) for key, value in zip(keys, row.values, strict=True)} for row in table.rows]


def test_every_row_of_the_paper_stands_in_its_order_ours_above_the_papers(tables_of):
    lines = _lines(tables_of()["rivals"])
    assert [(line["method"], line["source"]) for line in lines] == [
        ("unet", "here"), ("UNet", "paper"), ("U-KAN", "paper"), ("xbusnet", "here"), ("XBusNet", "paper"),
        ("AnatoSegNet", "paper"),
    ]  # fmt: skip
    assert lines[0]["dice"] == "0.6000 ± 0.0000"
    assert lines[1]["dice"] == "0.604 ± 0.038"


def test_a_published_two_class_mean_stands_under_ours_and_not_under_the_lesions_dice(tables_of):
    lines = _lines(tables_of()["rivals"])
    ours, papers = lines[3], lines[4]
    assert papers["dice"] == "—"
    assert papers["dice_2class"] == "0.877 ± 0.014"
    assert ours["dice_2class"] != "—"


def test_the_reasons_are_named_once_and_the_papers_rows_stand_in_one_table(tables_of):
    tables = tables_of()
    notes = [note for note in tables["rivals"].notes if note.startswith("Quoted only")]
    assert notes == ["Quoted only, U-KAN and AnatoSegNet: no description."]
    assert "ablation" not in tables
    assert not any(row.quoted for row in tables["headline"].rows)


@pytest.mark.parametrize("changes", [{"excerpt": True}, {"data": "phantom"}])
def test_on_other_data_every_row_is_shown_without_the_papers_figures(tables_of, changes):
    table = tables_of(**changes)["rivals"]
    assert [line["source"] for line in _lines(table)] == ["here", "not run", "here", "not run"]
    assert any("none stand beside ours" in note for note in table.notes)


def test_methods_are_columns_where_there_are_two_tasks(tables_of, new_run, two_tasks):
    run = new_run("two tasks")
    run.rows, run.model, run.run = {"sam": {"model": "sam_multitask"}}, "sam_multitask", {}
    run.metrics = ("label_accuracy", "label_auc", "dice", "hd95_px")
    run.write_run_json(data="precise")
    grid = run.run["grid"] | {"paper": "sam_multitask"}
    grid["rows"][0]["printed_as"] = ["Ours"]
    grid["quoted"] = [{"label": "EDCNN", "printed_as": ["EDCNN"], "reason": "not run", "before": "sam"}]
    run.write_run_json(grid=grid)
    run.of("sam").complete({k: two_tasks(k) for k in range(5)})
    scope = scope_of_run(run.path)
    table = all_tables(scope, summarise(scope), None)["rivals"]
    assert [(column.over, column.header) for column in table.columns[1:]] == [
        ("EDCNN", "paper"), ("sam", "here"), ("Ours", "paper")
    ]  # fmt: skip
    by_title = {line["metric"]: line for line in _lines(table)}
    auc = next(line for title, line in by_title.items() if title.startswith("AUC"))
    assert auc["EDCNN paper"] == "0.9322"
    pixels = next(line for title, line in by_title.items() if title.startswith("HD95"))
    assert pixels["EDCNN paper"] == "—"  # the paper's are in millimetres, ours in pixels
    assert json.loads(summarise(scope).to_json())["rivals"]["paper"] == "sam_multitask"


def test_the_page_shows_the_papers_table(tables_of, tmp_path):
    tables_of()
    page = build_report(tmp_path / "rivals").html.read_text()
    section = page.partition('<section id="rivals">')[2].partition("</section>")[0]
    assert "U-KAN" in section
    assert "Quoted only" in section
