"""Post-processing: what a rule does to a mask, worked by hand; and that no fold has a say in its own rule."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bushpc.cli import main
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.choose import candidates, choose, nested
from bushpc.evaluate.components import processed
from bushpc.evaluate.predictor import load
from bushpc.report import build_report
from bushpc.runs.chosen import PLAIN, Chosen, Rule
from bushpc.shards.manifest import Manifest, read_image

SILENT = lambda done, of, line: None  # noqa: E731


def drawn(*lines: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in line] for line in lines]).astype(np.uint8)


MASK = drawn(
    "####....",
    "#..#..#.",
    "#..#.#..",
    "####....",
    "........",
    "#.......",
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(), MASK),
        (Rule(fill=True), drawn("####....", "####..#.", "####.#..", "####....", "........", "#.......")),
        # 2 pixels that touch at a corner are one part, of 2 / 48 of the image; 1 / 48 is less than that.
        (Rule(smallest=2 / 48), drawn("####....", "#..#..#.", "#..#.#..", "####....", "........", "........")),
        (Rule(smallest=0.05), drawn("####....", "#..#....", "#..#....", "####....", "........", "........")),
        (Rule(smallest=0.5), np.zeros((6, 8), np.uint8)),
        (Rule(largest=True), drawn("####....", "#..#....", "#..#....", "####....", "........", "........")),
        # The ring has 12 pixels, and 16 once it is filled: more than a third of 48 only then not.
        (Rule(fill=True, smallest=1 / 3), drawn("####....", "####....", "####....", "####....", *["........"] * 2)),
        (Rule(smallest=1 / 3, largest=True), np.zeros((6, 8), np.uint8)),
    ],
)
def test_a_rule_on_a_mask_worked_by_hand(rule, expected) -> None:
    found = processed(MASK, rule)
    assert found.dtype == MASK.dtype
    assert (found == expected).all()


def test_of_equal_parts_the_first_in_reading_order_stays_and_nothing_stays_nothing() -> None:
    assert (processed(drawn("#..#"), Rule(largest=True)) == drawn("#...")).all()
    assert not processed(drawn("...."), Rule(fill=True, smallest=0.1, largest=True)).any()


def test_no_fold_has_a_say_in_its_own_rule() -> None:
    """Rule 1 is far better on fold 0 and a little worse elsewhere: its own images would choose it, the others don't."""
    score_RI = np.array([[0.5, 0.5, 0.8, 0.8, 0.8], [0.9, 0.9, 0.7, 0.7, 0.7]])
    fold_I = np.array([0, 0, 1, 1, 2])
    by_fold, for_all = nested(score_RI, fold_I)
    assert score_RI[1, :2].mean() > score_RI[0, :2].mean(), "fold 0 by itself would flip the choice"
    assert by_fold == {0: 0, 1: 1, 2: 1}
    assert for_all == 1


def test_ties_stay_plain_and_images_without_a_score_do_not_count() -> None:
    nan = float("nan")
    assert nested(np.array([[0.5, 0.6, nan], [0.5, 0.6, nan]]), np.array([0, 1, 1])) == ({0: 0, 1: 0}, 0)
    assert nested(np.array([[0.1 + 0.2, 0.6], [0.3, 0.6]])[::-1], np.array([0, 1])) == ({0: 0, 1: 0}, 0)


def test_one_fold_cannot_choose_for_itself() -> None:
    with pytest.raises(ConfigError, match="on the fold that it is judged on: there is fold 3 alone"):
        nested(np.zeros((2, 4)), np.array([3, 3, 3, 3]))


@pytest.mark.parametrize("size", [-0.001, 1.0, 40.0])
def test_sizes_are_shares_of_the_image(size) -> None:
    with pytest.raises(ConfigError, match="share of the image's area, ≥ 0 and < 1"):
        candidates([0.01, size])


def test_rules_are_tried_from_the_one_that_changes_least() -> None:
    rules = candidates([0.01])
    assert rules[0] == PLAIN
    assert len(rules) == len(set(rules)) == 8
    assert [rule.words for rule in rules][-1] == "holes filled, parts below 0.01 of the image dropped, largest part"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, whole_run: Path) -> Path:
    """Its kept maps are replaced by masks with a stray pixel far from the lesion."""
    copy = tmp_path_factory.mktemp("postprocess") / "pp"
    shutil.copytree(whole_run, copy)
    for path in copy.glob("cells/*/predictions/none/*.png"):
        pixels = np.zeros((32, 32), np.uint8)
        pixels[10:20, 10:20] = 255
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(path)
    return copy


def test_the_choice_is_kept_shown_and_applied_to_new_images(run, two_folds_folder, tmp_path, capsys) -> None:
    assert main(["postprocess", str(run), "--sizes", "0.002"]) == 0
    chosen = Chosen.read(run / "postprocess" / "all.json")
    assert [(each.fold, each.chosen_on) for each in chosen.folds] == [(0, [1]), (1, [0])]
    assert chosen.for_all in (Rule(largest=True), Rule(smallest=0.002))  # either drops the stray pixel
    for each in chosen.folds:
        assert each.chosen["dice"] > each.plain["dice"]
    with (run / "postprocess" / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    mean = np.mean([float(row["dice:chosen"]) for row in rows if row["fold"] == "0"])
    assert chosen.folds[0].chosen["dice"] == pytest.approx(mean)

    page = build_report(run)
    assert "Post-processing of masks" in page.html.read_text()
    table = (page.html.parent / "postprocess.csv").read_text()
    assert chosen.folds[0].rule.words in table

    assert main(["export", str(run), str(tmp_path / "model")]) == 0
    recipe = json.loads((tmp_path / "model" / "export.json").read_text())["recipe"]
    assert Rule(**recipe["postprocess"]) == chosen.for_all
    record = Manifest.load(two_folds_folder).records[0]
    image = read_image(two_folds_folder, record)
    for where in (run, tmp_path / "model"):
        with_rule, without = load(where, device="cpu"), load(where, device="cpu", postprocess=False)
        plain = without(image).mask_HW
        assert (with_rule(image).mask_HW == processed(plain, chosen.for_all)).all()
        assert (plain == (without(image).prob_HW >= 0.5)).all()


def test_a_choice_of_other_weights_is_not_applied(run, tmp_path) -> None:
    choose(run, None, [0.002], SILENT)
    copy = tmp_path / "pp"
    shutil.copytree(run, copy, symlinks=True)
    done = copy / "cells" / "fold1" / "DONE"
    done.write_text(json.dumps({**json.loads(done.read_text()), "finished": "later"}))
    with pytest.raises(DataError, match="was chosen on predictions of other weights"):
        load(copy, device="cpu")
    assert load(copy, device="cpu", postprocess=False).rule == PLAIN
    page = " ".join(build_report(copy).html.read_text().split())
    assert "Post-processing of masks" not in page
    assert "Post-processing is left out: it was chosen on predictions of other weights" in page


def test_a_run_with_a_fold_missing_writes_nothing(run, tmp_path) -> None:
    copy = tmp_path / "pp"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("postprocess"))
    (copy / "cells" / "fold1" / "DONE").unlink()
    with pytest.raises(DataError, match="fold1 not done"):
        choose(copy, None, [0.002], SILENT)
    assert not (copy / "postprocess").exists()
