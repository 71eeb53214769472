"""Data with several mask classes: the headline is their mean, and each has a table of its own beside the paper's."""

import csv

import numpy as np
import pytest

from bushpc.errors import DataError
from bushpc.report import build_report
from bushpc.report.read_run import read_run

CLASSES = ("disc", "cup")


def class_rows(row, fold: int, images: int = 4, worse: float = 0.0) -> list[dict]:
    """Lines of an evaluation of disc and cup; the last image of a fold has no cup."""
    rng = np.random.default_rng([7, fold])
    rows = []
    for i in range(images):
        disc, cup = rng.uniform(0.8, 0.95) - worse, rng.uniform(0.6, 0.8) - worse
        no_cup = i == images - 1
        of_class = {"dice:disc": disc, "dice:cup": np.nan if no_cup else cup}
        far = {"hd95_px:disc": 10 * (1 - disc), "hd95_px:cup": np.nan if no_cup else 10 * (1 - cup)}
        means = {"dice": disc if no_cup else (disc + cup) / 2, "hd95_px": np.nanmean(list(far.values()))}
        rows.append(row(f"f{fold}i{i}", fold, "none", **{**means, **of_class, **far}))
    return rows


@pytest.fixture
def fundus(builder, row):
    """A run of the diffusion model on REFUGE2, its folds not yet evaluated."""
    builder.metrics, builder.model = ("dice", "hd95_px"), "vit_diffusion"
    builder.write_run_json(model="vit_diffusion", data="refuge2", prompts="none")
    return builder


def table(result, name: str = "classes") -> list[dict[str, str]]:
    with (result.html.parent / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_mask_class_has_its_mean_and_sd_over_folds_beside_what_the_paper_prints(fundus, row) -> None:
    rows = {k: class_rows(row, k) for k in range(5)}
    result = build_report(fundus.complete(rows).path)
    for name in CLASSES:
        by_fold = [np.nanmean([line[f"hd95_px:{name}"] for line in rows[k]]) for k in range(5)]
        (ours,) = (line for line in table(result) if line["group"] == f"{name}: this run, mean ± SD over 5 folds")
        assert float(ours["hd95_px"]) == pytest.approx(np.mean(by_fold))
        assert float(ours["hd95_px_sd"]) == pytest.approx(np.std(by_fold, ddof=1))
    (theirs,) = (line for line in table(result) if line["group"].startswith("cup: ViT") and line["method"] == "Ours")
    assert (theirs["dice"], theirs["hd95_px"]) == ("0.869", "")
    page, markdown = result.html.read_text(), (result.html.parent / "report.md").read_text()
    assert "<h2>By mask class</h2>" in page
    assert "Dice and HD95 (px): of 15 of 20 images; the others have no cup." in page
    assert "Metrics of an image are the mean over the mask classes disc and cup" in page
    assert "disc: ViT diffusion paper, Table 2 (figures as printed there, percent as fractions)" in markdown
    assert r"\emph{cup: this run, mean $\pm$ SD over 5 folds}" in (result.html.parent / "classes.tex").read_text()


def test_the_headline_is_the_mean_over_mask_classes_and_stands_beside_no_class_of_the_paper(fundus, row) -> None:
    rows = {k: class_rows(row, k) for k in range(5)}
    (line,) = table(build_report(fundus.complete(rows).path), "headline")
    expected = np.mean([np.mean([image["dice"] for image in rows[k]]) for k in range(5)])
    assert float(line["dice"]) == pytest.approx(expected)


def test_a_missing_fold_is_named_and_leaves_the_mask_classes_without_sd(fundus, row) -> None:
    result = build_report(fundus.complete({k: class_rows(row, k) for k in range(4)}).path)
    found = result.content["by_class"]["none"]["cup"]["dice"]
    assert (found["mean"], found["sd"], found["images"]) == (None, None, 12)
    assert found["partial_mean"] == pytest.approx(np.mean(list(found["per_fold"].values())))
    assert table(result)[0]["group"] == "disc: this run, mean over 4 of 5 folds"


def test_arms_are_ranked_within_a_mask_class(grid, row) -> None:
    grid.metrics = ("dice",)
    for worse, name in enumerate(grid.rows):
        grid.of(name).complete({k: class_rows(row, k, worse=worse / 10) for k in range(5)})
    result = build_report(grid.path)
    lines = (result.html.parent / "classes.tex").read_text().splitlines()
    assert [line.partition(" &")[0] for line in lines if "textbf" in line] == ["full", "full"]


def test_data_with_one_mask_class_has_no_such_table(builder, rows_with_dice) -> None:
    result = build_report(builder.complete({0: rows_with_dice(0, {"first_pass": [0.5]})}).path)
    assert result.content["mask_classes"] == []
    assert "By mask class" not in result.html.read_text()


def test_a_figure_of_a_mask_class_that_cannot_be_is_refused(fundus, row) -> None:
    rows = class_rows(row, 0)
    rows[1]["dice:cup"] = 1.5
    with pytest.raises(DataError, match=r"row 3: dice:cup is not a number from 0 to 1"):
        read_run(fundus.complete({0: rows}).path)


def test_folds_measured_by_other_mask_classes_are_not_mixed(fundus, row) -> None:
    old = [{name: value for name, value in line.items() if ":" not in name} for line in class_rows(row, 1)]
    fundus.complete({0: class_rows(row, 0), 1: old})
    with pytest.raises(
        DataError, match=r"cell fold0 has figures of the mask classes disc, cup, cell fold1 of \(none\)"
    ):
        read_run(fundus.path)
