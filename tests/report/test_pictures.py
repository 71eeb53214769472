"""Best, median and worst cases: which are chosen, what is drawn, and what happens when pictures are gone."""

import base64
import io
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bushpc.report import build_report
from bushpc.report.drawing import contour_of, errors_of
from bushpc.report.pictures import Cases, case_pictures, choose, open_shards, side_by_side
from bushpc.report.read_run import read_run
from bushpc.report.scope import scope_of_run


def cases_of(path) -> Cases:
    run = read_run(path)
    return case_pictures(run.arms[0], open_shards(run))


def _pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))).astype(int)


def test_best_median_and_worst_are_chosen_by_dice_and_ties_by_key(row) -> None:
    dice = [0.9, 0.1, 0.5, 0.5, 0.7, 0.3, 0.8, 0.2, 0.6, 0.4]
    rows = pd.DataFrame([row(f"k{i}", 0, dice=value) for i, value in enumerate(dice)])
    chosen = [(rank, row["key"]) for rank, row in choose(rows.sample(frac=1, random_state=1))]
    assert [key for rank, key in chosen if rank == "best"] == ["k0", "k6", "k4"]
    assert [key for rank, key in chosen if rank == "median"] == ["k8", "k2", "k3"]
    assert [key for rank, key in chosen if rank == "worst"] == ["k5", "k7", "k1"]


@pytest.mark.parametrize(("images", "ranks"), [(1, ["best"]), (2, ["best", "worst"]), (5, ["best", "median", "worst"])])
def test_few_images_are_shown_once_each(row, images: int, ranks: list[str]) -> None:
    chosen = choose(pd.DataFrame([row(f"k{i}", 0, dice=i / 10) for i in range(images)]))
    assert [rank for rank, _ in chosen] == ranks
    assert len({row["key"] for _, row in chosen}) == len(chosen)


def test_false_positives_are_blue_and_false_negatives_red_at_the_images_own_aspect() -> None:
    image = np.full((100, 200, 3), 90, np.uint8)
    truth, prob = np.zeros((100, 200), np.uint8), np.zeros((50, 50), np.uint8)
    truth[20:80, 40:120] = 1  # left and middle
    prob[10:40, 20:40] = 255  # on the stretched square: columns 80 to 160, so middle and right
    contour, overlay = _pixels(contour_of(image, truth, 400)), _pixels(errors_of(image, truth, prob, 0.5))
    assert overlay.shape == contour.shape == (200, 400, 3)
    missed, found, invented, outside = (overlay[100, x] for x in (120, 200, 280, 380))
    assert missed[0] > missed[2] + 100
    assert invented[2] > invented[0] + 100
    assert np.ptp(found) <= 3
    assert np.ptp(outside) <= 3
    edge, inside = contour[100, 80], contour[100, 160]
    assert edge[0] > edge[2] + 80
    assert np.ptp(inside) <= 3


def test_the_overlay_is_drawn_at_the_runs_own_threshold() -> None:
    image, truth = np.full((40, 40, 3), 90, np.uint8), np.zeros((40, 40), np.uint8)
    faint = np.full((40, 40), 77, np.uint8)  # a probability of 0.30
    for threshold, invented in ((0.3, True), (0.31, False)):
        assert (np.ptp(_pixels(errors_of(image, truth, faint, threshold))[20, 20]) > 50) == invented


def test_the_deviation_of_a_model_that_samples_is_one_more_picture_with_its_scale(realistic) -> None:
    shown = cases_of(realistic.path).cases[0]
    assert [picture.deviation for picture in shown.pictures] == [False]
    folder = realistic.cell(shown.fold) / "predictions" / "first_pass" / "uncertainty"
    folder.mkdir()
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 204  # a deviation of 0.4
    Image.fromarray(half).save(folder / f"{shown.key}.png")
    errors, found = cases_of(realistic.path).cases[0].pictures
    assert (found.label, found.caption) == ("SD", "at most 0.40")
    picture = _pixels(found.uri)
    assert picture.shape == _pixels(errors.uri).shape
    assert picture[100, 50].max() < 20
    assert picture[100, 350].max() > 220
    page = build_report(realistic.path).html.read_text()
    assert "standard deviation (SD) at each pixel" in page
    assert "<figcaption>SD, at most 0.40</figcaption>" in page


@pytest.fixture
def fundus(builder, row, shards):
    """A scan with a disc and a cup in it, of which all of the disc was found, and half of the cup."""
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), np.uint8)
    mask[8:56, 8:56] = 1
    mask[24:40, 24:40] = 3
    manifest = shards(builder.path.parent / "shards", [("eye", image, mask)])
    builder.write_run_json(prompts="none", manifest_sha256=manifest.hash)
    folder = builder.cell(0) / "predictions" / "none"
    for name, bit, found in (("", 0, slice(64)), ("cup", 1, slice(32))):
        prob = np.zeros((64, 64), np.uint8)
        prob[found] = (mask[found] >> bit & 1) * 255
        (folder / name / "uncertainty").mkdir(parents=True)
        Image.fromarray(prob).save(folder / name / "eye.png")
        Image.fromarray(prob).save(folder / name / "uncertainty" / "eye.png")
    of_class = {"dice:disc": 1.0, "dice:cup": 0.6667}
    return builder.complete({0: [row("eye", 0, "none", dice=0.8333, **of_class)]})


def _wrong(overlay: np.ndarray) -> float:
    """The share of a grey scan's pixels that are coloured."""
    return float((np.ptp(overlay, axis=2) > 50).mean())


def test_each_mask_class_has_its_own_errors_and_the_ground_truth_shows_all_contours(fundus) -> None:
    (case,) = cases_of(fundus.path).cases
    labels = ["disc", "disc, SD", "cup", "cup, SD"]
    assert [picture.label for picture in case.pictures] == labels
    disc, _, cup, _ = (_pixels(picture.uri) for picture in case.pictures)
    assert disc.shape == (400, 400, 3)
    assert _wrong(disc) < 0.03  # all is found, but for what two ways to enlarge make of its rim
    missed = np.argwhere(cup[..., 0] > cup[..., 2] + 100)
    assert missed.min(0).tolist() == pytest.approx([200, 150], abs=3)
    assert missed.max(0).tolist() == pytest.approx([250, 250], abs=3)
    contour = _pixels(case.contour)
    for y, x in ((50, 200), (150, 200)):  # the upper edges of disc and cup
        assert contour[y, x, 0] > contour[y, x, 2] + 80


def test_arms_are_shown_side_by_side_by_their_first_mask_class(fundus) -> None:
    scope = scope_of_run(fundus.path)
    (row,) = side_by_side(scope, open_shards(scope.runs[0])).rows
    errors, deviation = row.pictures
    assert (errors.caption, deviation.caption) == ("Dice 1.0000", "at most 0.50")
    assert _wrong(_pixels(errors.uri)) < 0.03


def test_the_cases_are_of_the_headline_source_of_all_folds(realistic) -> None:
    rows = read_run(realistic.path).arms[0].rows("first_pass")
    found = cases_of(realistic.path)
    assert found.problems == []
    assert [case.rank for case in found.cases] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3
    assert found.cases[0].dice == rows["dice"].max()
    assert found.cases[-1].dice == rows["dice"].min()
    assert found.cases[0].spatial_prompt.startswith("a medium lesion")


def test_missing_shards_become_a_statement(realistic) -> None:
    shutil.rmtree(realistic.path.parent / "shards")
    found = cases_of(realistic.path)
    assert found.cases == []
    assert "no predictions are shown" in found.problems[0]


def test_shards_packed_anew_are_not_shown_beside_old_results(realistic) -> None:
    realistic.write_run_json(manifest_sha256="1" * 64)
    found = cases_of(realistic.path)
    assert found.cases == []
    assert "was repacked after this run" in found.problems[0]


def test_a_missing_or_damaged_prediction_is_named_and_the_others_shown(realistic) -> None:
    best, second = cases_of(realistic.path).cases[:2]
    folders = [realistic.cell(case.fold) / "predictions" / "first_pass" for case in (best, second)]
    (folders[0] / f"{best.key}.png").unlink()
    (folders[1] / f"{second.key}.png").write_bytes(b"\x89PNG and then nothing")
    found = cases_of(realistic.path)
    assert len(found.cases) == 7
    assert f"{best.key} of fold {best.fold} cannot be shown" in found.problems[0]
    assert f"{second.key} of fold {second.fold} cannot be shown" in found.problems[1]


def test_a_key_never_leads_out_of_the_run_directory(realistic, row) -> None:
    outside = realistic.path.parent / "outside.png"
    Image.new("L", (8, 8)).save(outside)
    for fold in range(5):
        realistic.evaluated(fold, [row(f"../../../../../outside{'/.' * fold}", fold)])
    found = cases_of(realistic.path)
    assert found.cases == []
    assert all("is not a file name" in problem for problem in found.problems)
