"""summary.json as typed records: written, read again, and read as an older version wrote it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from bushpc.errors import DataError
from bushpc.report import build_report
from bushpc.report.summary import read_summary

OLD_FILES = Path(__file__).parents[1] / "compat" / "files.tar.gz"


def test_a_written_summary_reads_back_as_the_same_records(realistic_grid) -> None:
    result = build_report(realistic_grid.path)
    assert read_summary(result.html.parent / "summary.json") == result.summary


def test_labels_and_their_comparisons_read_back_too(shared_run, two_tasks) -> None:
    run = shared_run(
        "labels", rows={"a": {"train.lr": 1}, "b": {"train.lr": 2}}, metrics=("label_auc", "dice"), folds=3
    )
    for skill, name in enumerate(run.rows):
        run.of(name).complete({fold: two_tasks(fold, skill=skill) for fold in range(3)})
    result = build_report(run.path)
    read = read_summary(result.html.parent / "summary.json")
    assert read == result.summary
    assert read.label_comparisons.rows[0].metrics["label_auc"].p is not None


def test_a_summary_of_71c433b_reads_with_the_figures_it_holds(tmp_path) -> None:
    with tarfile.open(OLD_FILES) as tar:
        tar.extract("expected/sam/summary.json", tmp_path, filter="tar")
    path = tmp_path / "expected" / "sam" / "summary.json"
    content = json.loads(path.read_text())
    summary = read_summary(path)
    (arm,) = summary.arms
    for source, figures in content["metrics"].items():
        for metric, figure in figures.items():
            assert arm.metrics[source][metric].value == figure["partial_mean"]
            assert arm.metrics[source][metric].per_fold == figure["per_fold"]
    assert [fold.fold for fold in arm.folds.missing] == [entry["fold"] for entry in content["folds"]["missing"]]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"arms": [{}]}', '{"arms": 3}'])
def test_a_damaged_summary_is_named(tmp_path, text) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"summary\.json is not a readable summary .*bushpc report RUN"):
        read_summary(path)
