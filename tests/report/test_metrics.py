"""Any list of metrics that a run asks for, with units, directions and gaps; labels and normal scans on the page."""

import csv
import json
import re

import numpy as np
import pytest
import scipy.stats

from bushpc.dispatch.grid_file import load_grid
from bushpc.errors import DataError
from bushpc.metrics.registry import label_metrics
from bushpc.report import build_report, published
from bushpc.report.published import find_published
from bushpc.report.read_run import read_run
from bushpc.sample import LABELS

OVERLAP = ("iou", "dice", "sensitivity", "accuracy", "precision", "specificity")
HEADS = {
    "unet": {"model.head": "unet", "model.attention": False},
    "sd": {"model.head": "sd", "model.attention": False},
    "mgc_a": {"model.head": "unet", "model.attention": True},
    "none": {"model.head": "none", "model.attention": False},
}
PAPER = {
    "short": "Paper",
    "citation": "A. Author, “Title”",
    "data": "breast",
    "ablation": {
        "table": "Table 3",
        "models": ["two_tasks"],
        "decimals": {"label_accuracy": 1, "dice": 3, "hd95_px": 3},
        "percent": ["label_accuracy"],
        "rows": {
            "UNet-H": {"row": "unet", "label_accuracy": 90.7, "dice": 0.882, "hd95_px": 64.458},
            "Other": {"label_accuracy": 92.3, "dice": None},
        },
    },
}


def _csv(result, name: str) -> list[dict[str, str]]:
    with (result.html.parent / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def distances(shared_run, row):
    """Report of a grid that asks for HD95 and IoU: its second row is 3 px worse or more, the others are alike."""
    metrics = ("hd95_px", "hd95_mm", "iou", "precision")
    grid = shared_run("distances", rows={name: {"train.lr": name} for name in "abc"}, metrics=metrics)
    for name, worse in {"a": 0.0, "b": 3.0, "c": 0.0}.items():
        for k in range(3):
            rows = [
                row(f"f{k}i{i}", k, hd95_px=10 + i + worse * (1 + 0.1 * i), hd95_mm=np.nan, precision=0.5)
                for i in range(3)
            ]
            grid.of(name).complete({k: rows})
    return build_report(grid.path)


@pytest.fixture(scope="module")
def two_task_grid(shared_run, two_tasks):
    """SAM's Table 3 with labels that are told better from row to row; the last row gives none."""
    metrics = ("label_accuracy", "label_auc", "dice", "hd95_px")
    grid = shared_run("heads", rows=HEADS, model="two_tasks", metrics=metrics)
    for i, name in enumerate(HEADS):
        for k in range(5):
            rows = two_tasks(k, skill=i, seed=i)
            if name == "none":
                rows = [{column: value for column, value in row.items() if "prob" not in column} for row in rows]
            grid.of(name).complete({k: rows})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "_papers", lambda: [PAPER])
        return grid, build_report(grid.path)


def test_the_metrics_that_a_run_asks_for_are_shown_in_its_order_with_units_and_the_better_side(distances) -> None:
    assert distances.content["shown_metrics"] == ["hd95_px", "iou", "precision", "iou_2class"]
    page = distances.html.read_text()
    for header in ("HD95 (px)\N{NO-BREAK SPACE}↓", "IoU\N{NO-BREAK SPACE}↑", "Precision\N{NO-BREAK SPACE}↑"):
        assert f">{header}</th>" in page
    headline = {line["method"]: line for line in _csv(distances, "headline")}
    assert float(headline["a"]["hd95_px"]) == pytest.approx(11)
    assert "dice" not in headline["a"]
    assert r"HD95 (px)~$\downarrow$" in (distances.html.parent / "headline.tex").read_text()


def test_a_metric_that_no_image_has_is_a_sentence_and_no_column(distances) -> None:
    said = "Not shown: HD95 (mm), as the size of a pixel is known for no image with a lesion."
    assert said in distances.html.read_text()
    assert not any("hd95_mm" in column for name in ("headline", "folds") for column in _csv(distances, name)[0])


def test_where_less_is_better_the_lowest_wins_and_a_positive_effect_is_still_a_better_one(distances) -> None:
    rows = {row["arm"]: row["metrics"] for row in distances.content["comparisons"]["rows"]}
    assert rows["b"]["hd95_px"]["images"]["effect"] == -1
    assert rows["b"]["hd95_px"]["images"]["mean"] == pytest.approx(3.3)
    assert "precision" not in rows["b"]  # rates of pixels are not tested
    friedman = distances.content["friedman"]
    assert friedman["metric"] == distances.content["headline_metric"] == "hd95_px"
    assert friedman["ranks"] == [1.5, 3, 1.5]


def test_images_without_a_value_are_left_out_and_counted(builder, two_tasks) -> None:
    builder.metrics = ("dice", "hd95_mm", "fpr")
    rows = {k: two_tasks(k) for k in range(5)}
    result = build_report(builder.complete(rows).path)
    kept = {k: [row["hd95_mm"] for row in rows[k] if not np.isnan(row["hd95_mm"])] for k in rows}
    found = result.content["metrics"]["none"]["hd95_mm"]
    assert found["per_fold"] == {str(k): pytest.approx(np.mean(values)) for k, values in kept.items()}
    assert found["images"] == sum(map(len, kept.values())) == 30
    every = np.concatenate(list(kept.values()))
    low, high = scipy.stats.bootstrap((every,), np.mean, n_resamples=9999, method="percentile").confidence_interval
    assert found["ci95"] == pytest.approx([low, high], rel=0.1)  # two images a patient, drawn together
    page = result.html.read_text()
    assert "Dice, 2-class Dice and 2-class FPR: of 40 of 60 images; the others have no lesion." in page
    assert "HD95 (mm): of 30 of 60 images; the others have no lesion or no known pixel size." in page
    assert not re.search(r"\bnan\b", (result.html.parent / "report.md").read_text())


def test_the_betti_error_stands_in_the_tables_with_its_definition(builder, row) -> None:
    builder.metrics = ("betti_error", "dice")
    rows = {k: [row(f"f{k}i{i}", k, betti_error=float(i + k)) for i in range(3)] for k in range(5)}
    result = build_report(builder.complete(rows).path)
    line = _csv(result, "headline")[0]
    assert float(line["betti_error"]) == pytest.approx(1 + 2)
    page = result.html.read_text()
    assert "Betti error\N{NO-BREAK SPACE}↓" in page
    assert "Betti error: surplus or missing pieces and holes of the predicted mask" in page


def test_a_fold_in_which_no_image_has_a_metric_has_a_dash_and_the_mean_is_over_the_others(builder, row) -> None:
    builder.metrics = ("dice", "hd95_mm")
    builder.complete({k: [row(f"f{k}", k, hd95_mm=np.nan if k == 2 else 4.0 + k)] for k in range(5)})
    result = build_report(builder.path)
    found = result.content["metrics"]["first_pass"]["hd95_mm"]
    assert (found["per_fold"]["2"], found["mean"]) == (None, pytest.approx((4 + 5 + 7 + 8) / 4))
    assert [line["hd95_mm"] for line in _csv(result, "folds")[:3]] == ["4.0", "5.0", ""]


def test_normal_scans_are_judged_by_their_false_alarms(builder, two_tasks) -> None:
    builder.metrics = ("dice", "fpr")
    result = build_report(builder.complete({k: two_tasks(k) for k in range(5)}).path)
    (line,) = _csv(result, "normals")
    assert (line["images"], float(line["alarmed"])) == ("20", 0.5)
    assert float(line["fpr"]) == pytest.approx(20 / 4096)
    assert "Normal scans have no lesion to overlap with" in result.html.read_text()


@pytest.mark.parametrize(
    ("skill", "said"),
    [(2.0, "above chance (0.5)."), (0.0, "not shown to differ from chance, as the interval contains")],
)
def test_labels_have_metrics_by_fold_and_intervals_and_chance_is_named_in_words(
    builder, two_tasks, skill, said
) -> None:
    builder.metrics = ("label_auc", "dice")
    rows = {k: two_tasks(k, skill=skill) for k in range(5)}
    result = build_report(builder.complete(rows).path)
    summary, page = result.content, result.html.read_text()

    def expected(part) -> float:
        prob_NL = np.array([[row[f"prob_{label}"] for label in LABELS] for row in part])
        return label_metrics(prob_NL, np.array([LABELS.index(row["label"]) for row in part]))["label_auc"]

    found = summary["metrics"]["none"]["label_auc"]
    assert found["per_fold"] == {str(k): pytest.approx(expected(part)) for k, part in rows.items()}
    assert summary["labels"]["none"]["label_auc"]["mean"] == pytest.approx(
        expected([row for part in rows.values() for row in part])
    )
    assert said in page
    assert "ROC curves of each label against all others" in page


def test_arms_are_compared_by_the_labels_that_they_give(two_task_grid) -> None:
    grid, result = two_task_grid
    found = {row["arm"]: row for row in result.content["label_comparisons"]["rows"]}
    arms = {arm.name: arm.rows("none").set_index("key") for arm in read_run(grid.path).arms if arm.name != "none"}
    right = {
        name: rows[[f"prob_{label}" for label in LABELS]].idxmax(axis=1) == "prob_" + rows["label"]
        for name, rows in arms.items()
    }
    row = found["mgc_a"]
    assert row["label_accuracy"]["mean"] == pytest.approx(right["mgc_a"].mean() - right["unet"].mean())
    better, worse = (right["mgc_a"] & ~right["unet"]).sum(), (~right["mgc_a"] & right["unet"]).sum()
    assert row["mcnemar"]["p"] == pytest.approx(scipy.stats.binomtest(better, better + worse).pvalue)
    assert found["sd"]["mcnemar"]["p_holm"] >= found["sd"]["mcnemar"]["p"]
    first, second = _csv(result, "label_comparisons")
    assert (first["method"], second["images"]) == ("sd", "60")


def test_a_model_that_gives_no_labels_beside_others_that_do_has_dashes(two_task_grid) -> None:
    _, result = two_task_grid
    assert result.content["arms"][3]["labels"]["none"] is None
    accuracy = next(line for line in _csv(result, "headline") if line["metric"].startswith("Accuracy"))
    assert accuracy["none"] == ""
    assert float(accuracy["unet"]) > 0


def test_two_tasks_are_shown_as_the_paper_has_them_with_its_figures_beside(two_task_grid) -> None:
    _, result = two_task_grid
    lines = {line["metric"].split("\N{NO-BREAK SPACE}")[0]: line for line in _csv(result, "ablation")}
    assert [line["group"] for line in lines.values()] == ["Settings"] * 2 + ["Classification"] + [
        "Segmentation, network grid"
    ] * 2
    assert lines["HEAD"]["sd"] == "sd"
    dice = result.content["arms"][2]["metrics"]["none"]["dice"]
    assert (float(lines["Dice"]["mgc a"]), float(lines["Dice"]["mgc a_sd"])) == (dice["mean"], dice["sd"])
    assert (lines["Dice"]["paper_UNet-H"], lines["Accuracy"]["paper_UNet-H"]) == ("0.882", "0.907")
    assert (lines["Dice"]["paper_Other"], lines["HD95 (px)"]["paper_Other"]) == ("", "")
    page = result.html.read_text()
    assert "Paper, Table 3 (figures as printed there, percent as fractions)" in page
    assert 'class="number quoted">64.458<' in page


def test_many_metrics_of_a_paper_stand_below_ours_with_its_parameters(monkeypatch, grid, row) -> None:
    metrics = OVERLAP
    percents = {metric: 90.0 + i for i, metric in enumerate(metrics)}
    table = {
        "table": "Table 2", "models": ["xbusnet"], "decimals": 2, "percent": list(metrics),
        "rows": {"U-Net": {"parameters": 34513345, **percents}, "BL": {"row": "full", **percents}},
    }  # fmt: skip
    monkeypatch.setattr(published, "_papers", lambda: [{**PAPER, "ablation": table}])
    grid.metrics = metrics
    for name in grid.rows:
        grid.of(name).complete({k: [row(f"f{k}", k, **dict.fromkeys(metrics, 0.5))] for k in range(5)})
    (grid.of("full").cell(0) / "DONE").write_text('{"step": 1000, "parameters": 123456}')
    lines = _csv(build_report(grid.path), "ablation")
    assert [line["parameters"] for line in lines[:2]] == ["123,456", "—"]
    assert [line["group"] for line in lines] == ["this grid"] * 4 + [
        "Paper, Table 2 (figures as printed there, percent as fractions)"
    ] * 2
    columns = ["parameters", *(column for metric in metrics for column in (metric, f"{metric}_sd"))]
    assert list(lines[0])[5:] == columns
    assert (lines[5]["method"], lines[5]["model.lfe"]) == ("BL", "true")  # the switches of the row that it names
    assert (lines[4]["method"], lines[4]["parameters"], lines[4]["specificity"]) == ("U-Net", "34,513,345", "0.95")


@pytest.mark.parametrize(
    ("name", "model", "data", "metrics", "shown"),
    [
        ("xbusnet_components", "xbusnet", "breast", ("dice", "iou"), ["0.8765", "0.8572", "0.8453", "0.8600"]),
        ("hybrid_attention_components", "hybrid_attention", "busi", OVERLAP, ["0.8313", "0.9437", "10,498,945"]),
        ("sam_multitask_heads", "sam_multitask", "precise", ("label_ce", "dice"), ["0.277", "0.882", "0.887", "0.879"]),
        (
            "vit_diffusion_components",
            "vit_diffusion",
            "busi",
            ("dice", "hd95_network_px"),
            ["0.68", "0.64", "0.84", "0.74"],
        ),
    ],
)
def test_the_papers_grids_are_reported_with_the_papers_figures(
    shared_run, two_tasks, name, model, data, metrics, shown
) -> None:
    rows = {row.name: json.loads(json.dumps(row.settings)) for row in load_grid(name).rows}  # as run.json has them
    grid = shared_run(name, rows=rows, model=model, metrics=metrics, folds=1, run={"data": data})
    for row in rows:
        grid.of(row).complete({0: [dict.fromkeys((*OVERLAP, "hd95_network_px"), 0.5) | line for line in two_tasks(0)]})
    result = build_report(grid.path)
    text = (result.html.parent / "ablation.tex").read_text()
    assert all(figure in text for figure in shown)


def test_a_papers_figures_in_percent_become_fractions_with_their_decimals(monkeypatch) -> None:
    monkeypatch.setattr(published, "_papers", lambda: [PAPER])
    table = find_published("breast", "two_tasks_small", "ablation")
    assert table.rows["UNet-H"]["label_accuracy"] == 0.907
    assert table.decimals == {"label_accuracy": 3, "dice": 3, "hd95_px": 3}
    assert table.metrics == ("label_accuracy", "dice", "hd95_px")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"dice": np.nan}, "dice is not a number from 0 to 1"),  # of an image with a lesion
        ({"fpr": np.nan}, "fpr is not a number from 0 to 1"),
        ({"hd95_px": -1.0}, "hd95_px is not a number of 0 or more"),
        ({"hd95_px": np.inf}, "hd95_px is not a number of 0 or more"),
        ({"prob_benign": 1.2}, "prob_benign is not a number from 0 to 1"),
    ],
)
def test_what_a_metric_cannot_be_is_refused(builder, row, damage, said: str) -> None:
    builder.complete({0: [row("a", 0, **damage)]})
    with pytest.raises(DataError, match=rf"fold0/per_image\.csv, row 2: {said}"):
        read_run(builder.path)


def test_the_grid_of_every_metric_is_stated_beside_what_the_paper_says_of_its_own(realistic) -> None:
    result = build_report(realistic.path)
    page = " ".join(result.html.read_text().split())
    grid = "the square images that the network reads, 64 pixels a side"
    metrics = "Dice, IoU, FPR, FNR, 2-class Dice, 2-class IoU, 2-class FPR and 2-class FNR"
    assert f"Grid: pixels of {metrics} are those of {grid}." in page
    assert "The paper resizes images to 352 x 352 pixels and does not say on which grid its metrics are taken." in page
    names = [f"{name}{of}" for of in ("", "_2class") for name in ("dice", "iou", "fpr", "fnr")]
    assert result.content["grids"] == dict.fromkeys(names, "network")


def test_labels_have_no_grid(builder, two_tasks) -> None:
    builder.metrics = ("label_auc",)
    result = build_report(builder.complete({k: two_tasks(k) for k in range(5)}).path)
    assert result.content["grids"] == {}
    assert "Grid:" not in result.html.read_text()
