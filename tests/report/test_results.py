"""Reading a run directory: what is complete, what is not and why, and what is refused."""

import json

import pandas as pd
import pytest

from bushpc.errors import DataError
from bushpc.report.page import build_report
from bushpc.report.read_run import read_run
from bushpc.report.results import Arm
from bushpc.report.scope import scope_of_run


def read_arm(path) -> Arm:
    (arm,) = read_run(path).arms
    return arm


def test_a_fold_is_complete_only_with_both_its_results_and_its_mark(builder, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5]})})
    builder.trained(1, steps=420)
    builder.evaluated(2, rows_with_dice(2, {"first_pass": [0.5]}), done=False)
    builder.failed(3, "CUDA out of memory\n\nTraceback (most recent call last):\n  ...")
    found = read_arm(builder.path)
    assert [cell.fold for cell in found.complete_cells] == [0]
    assert {cell.fold: cell.reason for cell in found.missing_cells} == {
        1: "not finished: last logged step 420 of 1000",
        2: "evaluated, but not marked DONE",
        3: "CUDA out of memory",
        4: "not started",
    }


def test_a_model_brings_its_own_ways_of_evaluation(builder, rows_with_dice) -> None:
    builder.write_run_json(
        prompts="detector",
        variants=[
            {"name": "detector", "label": "boxes of the detector", "uses_ground_truth": False},
            {"name": "mask_box", "label": "boxes of the mask", "uses_ground_truth": True},
        ],
    )
    builder.complete({0: rows_with_dice(0, {"mask_box": [0.9], "detector": [0.5]})})
    found = scope_of_run(builder.path)
    assert [(entry.label.partition(", ")[2], entry.uses_ground_truth) for entry in found.entries] == [
        ("boxes of the detector", False),
        ("boxes of the mask", True),
    ]
    assert "boxes of the mask" in build_report(builder.path).html.read_text()


def test_a_done_mark_without_results_is_not_believed(builder, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5]})})
    (builder.cell(0) / "per_image.csv").unlink()
    assert read_arm(builder.path).missing_cells[0].reason == "marked DONE, but per_image.csv is not there"


def test_a_repeated_step_takes_the_later_line_and_a_torn_line_is_counted(builder) -> None:
    (builder.cell(0) / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "loss": 9.0}\n{"kind": "train", "step": 2, "loss": 8.0}\n{"kind": "tra'
        '{"kind": "train", "step": 3}\n{"kind": "train", "step": 2, "loss": 1.0}\n'
        '{"kind": "validation", "step": 2, "dice": 0.4}\n'
    )
    curve = read_arm(builder.path).cells[0].curve
    assert curve.loss.to_dict() == {1: 9.0, 2: 1.0}
    assert curve.dice.to_dict() == {2: 0.4}
    assert curve.unreadable == 1


def test_keys_and_prompts_stay_text(builder, row) -> None:
    builder.complete({0: [row("001", 0, spatial_prompt="NA", attribute_prompt="")]})
    frame = read_arm(builder.path).per_image
    assert frame is not None
    assert frame.loc[0, ["key", "spatial_prompt", "attribute_prompt"]].tolist() == ["001", "NA", ""]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda frame: frame.drop(columns=["fnr"]), "no column fnr"),
        (lambda frame: frame.assign(dice=[0.5, None]), r"row 3: dice is not a number from 0 to 1.*f0i1"),
        (lambda frame: frame.assign(iou=[1.5, 0.5]), r"row 2: iou is not a number from 0 to 1.*f0i0"),
        (lambda frame: frame.assign(tp=[-1, 0]), "row 2: tp is not a count"),
        (lambda frame: frame.assign(length_px=[20, "inf"]), "row 3: length_px is not a count"),
        (lambda frame: frame.assign(length_px=[20, 20.5]), "row 3: length_px is not a count"),
        (lambda frame: frame.assign(fold=[0, 1]), "row 3: the row is not of fold 0"),
        (lambda frame: frame.assign(key="same"), "row 3: the same key and prompts"),
        (
            lambda frame: frame.assign(prompts=["first_pass", "first-pass"]),
            "row 3: prompts is none of first_pass, oracle, none, wrong_size, wrong_quadrant, shuffled_attributes",
        ),
        (lambda frame: frame.assign(prompts=["first_pass", "oracle"]), "key 'f0i0' lacks a row of some prompt source"),
        (lambda frame: frame.iloc[:0], "has a header but no rows"),
    ],
)
def test_a_damaged_per_image_csv_is_refused_by_file_and_row(builder, damage, said: str, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5, 0.6]})})
    path = builder.cell(0) / "per_image.csv"
    damage(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(DataError, match=said) as caught:
        read_run(builder.path)
    assert str(path) in str(caught.value)
    assert "run the same command again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'key,"fold\n1,2,3\n4'])
def test_a_per_image_csv_that_is_no_csv_is_refused_by_name(builder, content: bytes, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5]})})
    (builder.cell(0) / "per_image.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"fold0/per_image\.csv"):
        read_run(builder.path)


def test_an_image_validated_in_two_folds_is_an_error_that_names_it(builder, row) -> None:
    builder.complete({0: [row("case001", 0)], 1: [row("case001", 1)]})
    with pytest.raises(DataError, match=r"fold1/per_image\.csv: key 'case001' was validated in cell fold0 too"):
        read_run(builder.path)


def test_folds_evaluated_with_different_prompt_sources_are_not_mixed(builder, rows_with_dice) -> None:
    builder.complete(
        {0: rows_with_dice(0, {"first_pass": [0.5]}), 1: rows_with_dice(1, {"first_pass": [0.5], "oracle": [0.6]})}
    )
    with pytest.raises(DataError, match="cell fold0 was evaluated with prompts first_pass, cell fold1"):
        read_run(builder.path)


@pytest.mark.parametrize(
    ("asked", "evaluated", "headline"),
    [
        ("first_pass", ["none"], "none"),
        ("first_pass", ["none", "shuffled_attributes"], "none"),
        ("shuffled_attributes", ["first_pass", "none"], "first_pass"),
    ],
)
def test_a_model_that_does_not_read_a_prompt_is_judged_by_what_it_comes_to(
    builder, rows_with_dice, asked: str, evaluated: list[str], headline: str
) -> None:
    builder.write_run_json(prompts=asked)
    builder.complete({0: rows_with_dice(0, {source: [0.5] for source in evaluated})})
    assert read_arm(builder.path).headline == headline


def test_a_headline_source_that_was_not_evaluated_is_refused(builder, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"oracle": [0.5], "none": [0.4]})})
    with pytest.raises(DataError, match="headline prompts are 'first_pass', but only oracle, none were evaluated"):
        read_run(builder.path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a run folder"),
        ("{", r"run\.json is damaged"),
        ("[]", "holds a list where an object is needed"),
        ('{"name": "x"}', r"run\.json is damaged: cells is missing"),
        ('{"name": "x", "cells": [{"name": "fold0", "fold": 0}]}', "no created, command.*written by another version"),
    ],
)
def test_a_folder_that_is_no_run_directory_is_refused(builder, content: str | None, said: str) -> None:
    path = builder.path / "run.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=said):
        read_run(builder.path)


def test_a_fold_that_belongs_to_two_cells_is_refused(builder) -> None:
    cell = {"name": "a", "fold": 0, "hash": "0"}
    builder.write_run_json(cells=[cell, {**cell, "name": "b"}])
    with pytest.raises(DataError, match="fold 0 belongs to more than one cell"):
        read_run(builder.path)


def test_an_unknown_headline_source_lists_the_valid_ones(builder) -> None:
    builder.write_run_json(prompts="frist_pass")
    with pytest.raises(DataError, match="did you mean 'first_pass'"):
        read_run(builder.path)


def test_a_damaged_done_mark_is_refused_by_name(builder, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5]})})
    (builder.cell(0) / "DONE").write_text(json.dumps({"step": 1})[:-2])
    with pytest.raises(DataError, match="fold0/DONE is damaged"):
        read_run(builder.path)
