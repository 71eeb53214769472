"""Arms side by side: rows of a grid and whole runs, compared image by image, and what is refused."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import scipy.stats

from bushpc import cli
from bushpc.errors import DataError
from bushpc.report import build_comparison, build_report
from bushpc.report.read_run import read_run
from bushpc.runs.chosen import PLAIN, Chosen, FoldChoice, Rule, stamp
from bushpc.runs.layout import RunDir
from tests.report.conftest import RunBuilder, make_row

SHIFTS = {"full": 0.0, "no_lfe": -0.1, "no_gfe": 0.05, "no_sfa": 0.0}  # of Dice from the first row, for image 0


@pytest.fixture
def shifted(row):
    """Three images of a fold, whose Dice is shifted by more for each."""

    def rows(fold: int, shift: float, **changes):
        dice = [0.5 + 0.02 * fold + 0.05 * i + shift * (1 + 0.1 * i + 0.3 * fold) for i in range(3)]
        return [row(f"f{fold}i{i}", fold, dice=value, **changes) for i, value in enumerate(dice)]

    return rows


@pytest.fixture
def whole_grid(grid, shifted):
    for name, shift in SHIFTS.items():
        grid.of(name).complete({k: shifted(k, shift) for k in range(5)})
    return grid


@pytest.fixture
def two_runs(new_run, shifted):
    """Two cross-validations of the same folds, the second better."""
    return [new_run(name).complete({k: shifted(k, shift) for k in range(5)}) for name, shift in (("a", 0), ("b", 0.1))]


def _csv(folder, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def _page(result) -> str:
    return result.html.read_text()


def test_a_grid_has_an_arm_per_row_and_a_cross_validation_has_one(whole_grid, two_runs) -> None:
    run = read_run(whole_grid.path)
    assert [arm.name for arm in run.arms] == list(SHIFTS)
    assert run.baseline is run.arms[0]
    assert [cell.name for cell in run.arms[1].cells] == [f"no_lfe-fold{k}" for k in range(5)]
    assert len(read_run(two_runs[0].path).arms) == 1


def test_the_ablation_table_has_the_papers_switches_with_its_figures_beside(whole_grid) -> None:
    result = build_report(whole_grid.path)
    first, second, *_ = _csv(result.html.parent, "ablation")
    assert [first[f"model.{key}"] for key in ("lfe", "gfe", "sfa")] == ["true"] * 3
    assert [second[f"model.{key}"] for key in ("lfe", "gfe", "sfa")] == ["false", "true", "false"]
    assert float(first["dice"]) == result.content["arms"][0]["metrics"]["first_pass"]["dice"]["mean"]
    assert (float(first["paper_dice_2class"]), float(first["paper_iou_2class"])) == (0.8765, 0.8149)
    assert (float(second["paper_dice_2class"]), float(second["paper_iou_2class"])) == (0.8572, 0.7865)
    assert "✓" in _page(result)
    assert r"$\checkmark$" in (result.html.parent / "ablation.tex").read_text()


def test_a_grid_of_other_settings_shows_them_as_columns_and_no_figure_of_a_paper(new_run, shifted) -> None:
    grid = new_run("dropout")
    grid.rows = {"mostly": {"prompting.dropout": 0.3}, "always": {"prompting.dropout": 0.0}}
    grid.run = {}
    grid.write_run_json()
    for name in grid.rows:
        grid.of(name).complete({k: shifted(k, 0.0) for k in range(2)})
    table = _csv(build_report(grid.path).html.parent, "ablation")
    assert [(line["method"], line["prompting.dropout"], line["folds"]) for line in table] == [
        ("mostly", "0.3", "2 of 5"),
        ("always", "0.0", "2 of 5"),
    ]
    assert "paper_dice" not in table[0]


def test_arms_are_compared_image_by_image_with_holm_over_the_whole_table(whole_grid) -> None:
    result = build_report(whole_grid.path)
    found = result.content["comparisons"]
    assert found["against"] == "full"
    by_arm = {row["arm"]: row["metrics"] for row in found["rows"]}
    arms = {arm.name: arm.rows("first_pass").set_index("key") for arm in read_run(whole_grid.path).arms}
    for name in ("no_lfe", "no_gfe"):
        test = by_arm[name]["dice"]["images"]
        difference = arms[name]["dice"] - arms["full"]["dice"]
        assert test["p"] == pytest.approx(scipy.stats.wilcoxon(difference).pvalue)
        assert test["effect"] == np.sign(SHIFTS[name])
        assert test["p_holm"] == pytest.approx(4 * test["p"])  # four equal p, and no_sfa has none
        folds = difference.groupby(arms[name]["fold"]).mean()
        t = folds.mean() / np.sqrt((1 / 5 + 1 / 4) * folds.var(ddof=1))
        assert by_arm[name]["dice"]["folds"]["t"] == pytest.approx(t)
    assert by_arm["no_sfa"]["dice"]["images"]["reason"] == "no image differs"
    assert "no sfa: no Dice test, no image differs." in _page(result)
    assert result.content["friedman"]["ranks"] == [2.5, 4, 1, 2.5]
    for path in result.html.parent.glob("*.[cm][sd]*"):
        assert not re.search(r"\bnan\b", path.read_text(), re.IGNORECASE), path.name


def test_an_incomplete_arm_is_named_has_no_mean_and_is_compared_on_common_folds_only(whole_grid) -> None:
    broken = whole_grid.of("no_lfe").cell(3)
    (broken / "DONE").unlink()
    (broken / "per_image.csv").unlink()
    whole_grid.failed(3, "node went away")
    result = build_report(whole_grid.path)
    summary, page = result.content, _page(result)
    assert "1 of 20 cells missing" in page
    assert "no lfe, fold 3: node went away." in page
    assert summary["complete"] is False
    dice = summary["arms"][1]["metrics"]["first_pass"]["dice"]
    assert (dice["mean"], dice["sd"]) == (None, None)
    assert dice["partial_mean"] is not None
    row = next(row for row in summary["comparisons"]["rows"] if row["arm"] == "no_lfe")
    assert (row["folds"], row["expected"], row["images"]) == ([0, 1, 2, 4], 5, 12)
    assert summary["friedman"]["folds"] == [0, 1, 2, 4]
    assert {line["method"]: line["folds"] for line in _csv(result.html.parent, "comparisons")}["no lfe"] == "4 of 5"


def test_an_arm_without_any_fold_is_listed_and_the_others_are_reported(grid, shifted) -> None:
    grid.of("full").complete({k: shifted(k, 0.0) for k in range(5)})
    result = build_report(grid.path)
    lines = _csv(result.html.parent, "headline")
    assert [(line["method"], line["folds"]) for line in lines[:4]] == [
        ("full", "5"),
        ("no lfe", "0 of 5"),
        ("no gfe", "0 of 5"),
        ("no sfa", "0 of 5"),
    ]
    assert lines[1]["dice"] == ""
    assert result.content["comparisons"] is None


def test_falsified_prompts_are_labelled_tested_and_never_bold(grid, row) -> None:
    dice = {"first_pass": 0.6, "wrong_size": 0.9, "wrong_quadrant": 0.8, "shuffled_attributes": 0.7}
    for name in SHIFTS:
        rows = {
            k: [row(f"f{k}i{i}", k, source, value + 0.01 * i) for source, value in dice.items() for i in range(3)]
            for k in range(5)
        }
        grid.of(name).complete(rows)
    result = build_report(grid.path)
    lines = {line["source"]: line for line in _csv(result.html.parent, "sources")}
    assert set(lines) == {
        "first_pass",
        "wrong_size (falsified; uses the ground-truth mask)",
        "wrong_quadrant (falsified; uses the ground-truth mask)",
        "shuffled_attributes (attributes of another patient)",
    }
    assert float(lines["shuffled_attributes (attributes of another patient)"]["dice_difference"]) == pytest.approx(0.1)
    bold = result.html.parent.joinpath("sources.tex").read_text()
    assert r"\textbf{0.7100" in bold  # of shuffled attributes, the best that needs no mask
    assert r"\textbf{0.9100" not in bold


def test_the_same_images_are_shown_under_every_arm_and_heat_maps_where_all_have_them(realistic_grid) -> None:
    page = _page(build_report(realistic_grid.path))
    gallery, maps = page.split('<section id="predictions">')[1].split('<section id="maps">')
    for part in (gallery, maps):
        strips = part.split('<figure class="strip">')[1:]
        assert strips
        for strip in strips:
            assert strip.count("data:image/jpeg") == 5  # the scan and four arms
    assert len(page) < 3_000_000


def test_which_images_are_shown_does_not_depend_on_the_scores(realistic_grid) -> None:
    def keys() -> list[str]:
        page = _page(build_report(realistic_grid.path)).split('<section id="predictions">')[1].split("<section")[0]
        return [part.split("</strong>")[0] for part in page.split("<strong>")[1:]]

    before = keys()
    for cell in (realistic_grid.path / "cells").iterdir():
        lines = list(csv.DictReader((cell / "per_image.csv").open()))
        realistic_grid.row = cell.name.rpartition("-")[0]
        realistic_grid.evaluated(int(lines[0]["fold"]), [{**line, "dice": 1 - float(line["dice"])} for line in lines])
    assert keys() == before


def test_a_missing_picture_of_one_arm_is_named_and_the_others_stay(realistic_grid) -> None:
    for fold in range(5):
        shutil.rmtree(realistic_grid.of("no_gfe").cell(fold) / "predictions")
    page = _page(build_report(realistic_grid.path))
    assert "cannot be shown for no gfe" in page
    assert page.split('<figure class="strip">')[1].count("data:image/jpeg") == 4


def test_a_cell_that_two_arms_share_is_paid_for_once(whole_grid) -> None:
    for name in ("full", "no_lfe"):
        whole_grid.of(name).spent(0, {"step": 3600.0})
    shared = whole_grid.path / "cells" / "no_lfe-fold0"
    shutil.rmtree(shared)
    shared.symlink_to(whole_grid.path / "cells" / "full-fold0")
    summary = build_report(whole_grid.path).content
    assert [arm["cost"]["gpu_hours"] for arm in summary["arms"][:2]] == [2, 2]
    assert (summary["cost"]["gpu_hours"], summary["cost"]["cells"]) == (2, 1)


def test_runs_are_compared_as_the_rows_of_a_grid_are(two_runs, tmp_path, capsys) -> None:
    assert cli.main(["compare", *(str(run.path) for run in two_runs)]) == 0
    folder = tmp_path / "compare-a-b"
    assert f"report: {folder / 'index.html'}" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert [arm["label"] for arm in summary["arms"]] == ["a (xbusnet)", "b (xbusnet)"]
    (row,) = summary["comparisons"]["rows"]
    assert (row["label"], row["images"], row["metrics"]["dice"]["images"]["effect"]) == ("b (xbusnet)", 15, 1)
    assert "this run" not in (folder / "report.md").read_text().lower()


def test_a_grid_and_a_run_are_compared_arm_by_arm_into_the_folder_that_was_asked_for(whole_grid, two_runs) -> None:
    out = whole_grid.path.parent / "there"
    result = build_comparison([two_runs[1].path, whole_grid.path], out)
    assert result.html == out / "index.html"
    assert [arm["label"] for arm in result.content["arms"]][:2] == ["b (xbusnet)", "grid: full"]
    assert result.content["comparisons"]["against"] == "b (xbusnet)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "busbra"}, "mixed datasets in one comparison: .*has breast, .*has busbra. Allowed are"),
        ({"manifest_sha256": "1" * 64}, "mixed packed data"),
        (
            {"folds": {"source": "published", "sha256": "e" * 64}},
            "mixed folds in one comparison.*run one of them again",
        ),
        ({"format": 2}, "b/run.json has format 2, and this version of bushpc .* reads up to 1.*bushpc 0.1.0 wrote it"),
        ({"kind": "sweep"}, "unknown kind of run 'sweep'.*another version"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_way_on(two_runs, change, said: str) -> None:
    two_runs[1].write_run_json(**change)
    with pytest.raises(DataError, match=said):
        build_comparison([run.path for run in two_runs])


def test_one_run_or_the_same_twice_is_no_comparison_and_no_other_folder_is_overwritten(two_runs) -> None:
    path = two_runs[0].path
    with pytest.raises(DataError, match=r"it needs two or more.*bushpc report RUN"):
        build_comparison([path])
    with pytest.raises(DataError, match="the same run twice"):
        build_comparison([path, path])
    with pytest.raises(DataError, match="is no report, so it is left alone"):
        build_comparison([run.path for run in two_runs], path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: run["cells"][0].update(row="gone"), "a cell belongs to row 'gone'; rows are full, no_lfe"),
        (lambda run: run["grid"].update(baseline="gone"), "its baseline is 'gone'"),
        (lambda run: run["grid"]["rows"].append({**run["grid"]["rows"][0], "name": "new"}), "row 'new' has no cell"),
        (lambda run: run["grid"]["rows"][0].pop("settings"), "run.json is damaged: grid: .*settings"),
        (lambda run: run.pop("grid"), "a grid's rows and its cells' row are needed"),
    ],
)
def test_a_grid_that_contradicts_itself_is_refused(grid, damage, said: str) -> None:
    run = json.loads((grid.path / "run.json").read_text())
    damage(run)
    (grid.path / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match=said):
        read_run(grid.path)


def test_calibration_is_read_from_the_cells_and_a_damaged_file_is_refused(realistic_grid) -> None:
    result = build_report(realistic_grid.path)
    lines = _csv(result.html.parent, "calibration")
    arm = read_run(realistic_grid.path).arms[0]
    bins = arm.calibration[arm.calibration["prompts"] == "first_pass"]
    by_fold = [
        (part["prob_sum"] - part["lesion_pixels"]).abs().sum() / part["pixels"].sum()
        for _, part in bins.groupby("fold")
    ]
    assert float(lines[0]["ece"]) == pytest.approx(np.mean(by_fold))
    arm.cells[0].folder.calibration.write_text("prompts,bin,low,high,pixels,prob_sum,lesion_pixels\na,0,0,1,3,9,1\n")
    with pytest.raises(DataError, match=r"full-fold0/calibration\.csv, row 2"):
        build_report(realistic_grid.path)


def test_without_calibration_the_page_says_so(whole_grid) -> None:
    assert "counted no calibration bins" in _page(build_report(whole_grid.path))


def test_provenance_lists_in_which_settings_an_arm_differs(whole_grid) -> None:
    result = build_report(whole_grid.path)
    lines = [line for line in _csv(result.html.parent, "settings") if line["group"] == "no lfe"]
    assert [(line["setting"], line["baseline"], line["here"]) for line in lines] == [
        ("model.lfe", "True", "False"),
        ("model.sfa", "True", "False"),
    ]


def test_markdown_holds_every_table_and_acts_on_no_name(grid, shifted) -> None:
    grid.run["grid"]["rows"][0]["label"] = "a|b <i>*x*"
    grid.write_run_json()
    for name, shift in SHIFTS.items():
        grid.of(name).complete({k: shifted(k, shift) for k in range(5)})
    folder = build_report(grid.path).html.parent
    text = (folder / "report.md").read_text()
    assert text.count("\n### ") == len(list(folder.glob("*.csv")))
    assert r"a\|b &lt;i&gt;\*x\*" in text
    for table in text.split("### ")[1:]:
        widths = {line.replace(r"\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) == 1


def test_post_processing_of_arms_on_differing_grids_has_columns_of_its_own(tmp_path) -> None:
    run = RunBuilder(
        tmp_path / "run", folds=2, rows={"net": {}, "scan": {"evaluate.resolution": "original"}}, metrics=["dice"]
    )
    for name, metric, dice in (("net", "dice", 0.7), ("scan", "dice_original", 0.8)):
        run.of(name).complete({k: [make_row(f"f{k}i0", k, dice_original=0.8)] for k in (0, 1)})
        fold = {"images": 1, "rule": Rule(largest=True), "plain": {metric: dice}, "chosen": {metric: dice + 0.1}}
        chosen = Chosen(
            **{"created": "", "metric": metric, "source": "first_pass", "grid": "", "candidates": 2},
            cells={f"{name}-fold{k}": stamp(RunDir(run.path).cell(f"{name}-fold{k}")) for k in (0, 1)},
            folds=[FoldChoice(fold=k, chosen_on=[1 - k], **fold) for k in (0, 1)],
            for_all=PLAIN,
            largest_difference=0.0,
        )
        RunDir(run.path).postprocess(name).parent.mkdir(exist_ok=True)
        chosen.write(RunDir(run.path).postprocess(name))
    page = build_report(run.path).html
    with (page.parent / "postprocess.csv").open(newline="") as file:
        means = [row for row in csv.DictReader(file) if row["fold"] == "Mean"]
    assert [(row["dice_plain"], row["dice_original_plain"]) for row in means] == [("0.7", ""), ("", "0.8")]
    assert all(f">Dice, {grid} grid<" in page.read_text() for grid in ("network", "original"))
