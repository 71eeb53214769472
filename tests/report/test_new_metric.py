"""A metric is one entry: what is registered is asked for, measured, tabled and explained without any other change."""

from __future__ import annotations

import csv
import re
import typing as t
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from bushpc.cell import run_cell
from bushpc.config import compose
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dist import World
from bushpc.metrics.label import LabelSet
from bushpc.metrics.mask import MaskPair
from bushpc.metrics.registry import IMAGE_METRICS, LABEL_METRICS, METRICS, Metric, register
from bushpc.report import build_report
from bushpc.report.label_stats import label_intervals
from bushpc.sample import LABELS


@pytest.fixture
def added() -> t.Iterator[t.Callable[[Metric], None]]:
    """`register` that is undone after the test."""
    before = [(known, dict(known)) for known in (METRICS, IMAGE_METRICS, LABEL_METRICS)]
    yield register
    for known, entries in before:
        known.clear()
        known.update(entries)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_entry_makes_a_metric_of_masks_measured_tabled_and_explained(added, tmp_path, phantom_folder) -> None:
    note = "Area error: share of the image by which the predicted area is wrong."

    def area_error(pair: MaskPair) -> float:
        return abs(float((pair.prob >= pair.threshold).mean() - pair.mask.mean()))

    added(Metric(name="area_error", title="Area error", unit="%", function=area_error, more_is_better=False, note=note))

    config = compose(
        [
            *("model=xbusnet_small", "data=phantom", "cluster=local", "model.image_size=64", "name=toy"),
            *("train.iterations=2", "train.batch_size=4", "evaluate.explain=0", "evaluate.metrics=[dice,area_error]"),
            *(f"data.root={phantom_folder}", f"runs_dir={tmp_path}", f"loader.cache_dir={tmp_path / 'cache'}"),
        ]
    )
    write_run(tmp_path / "toy", cv_plan(config), ["bushpc", "cv"])
    cell_dir = tmp_path / "toy" / "cells" / "fold0"
    assert run_cell(cell_dir, World()) is None

    rows = [row for row in read(cell_dir / "per_image.csv") if row["prompts"] == "first_pass"]
    pixels = [{name: int(row[name]) for name in ("tp", "fp", "fn", "tn")} for row in rows]
    expected = [abs(of["fp"] - of["fn"]) / sum(of.values()) for of in pixels]
    assert [float(row["area_error"]) for row in rows] == pytest.approx(expected)

    report = build_report(tmp_path / "toy").html.parent
    fold = next(row for row in read(report / "folds.csv") if row["fold"] == "0")
    assert float(fold["area_error"]) == pytest.approx(np.mean(expected))
    page = (report / "index.html").read_text()
    assert "Area error (%)\N{NO-BREAK SPACE}↓" in page
    assert note in page
    assert "Area error (%): lower is better." in page


def test_one_entry_makes_a_metric_of_labels_with_an_interval(added, builder, two_tasks) -> None:
    def kappa(labels: LabelSet, weight_RN: np.ndarray) -> np.ndarray:
        """Cohen's."""
        share_RLL = labels.confusion(weight_RN) / weight_RN.sum(axis=1)[:, None, None]
        agreed_R = np.trace(share_RLL, axis1=1, axis2=2)
        chance_R = (share_RLL.sum(axis=1) * share_RLL.sum(axis=2)).sum(axis=1)
        return (agreed_R - chance_R) / (1 - chance_R)

    added(Metric(name="kappa", title="Kappa", of="labels", function=kappa, more_is_better=True, grid=None, low=-1.0))
    builder.metrics = ("label_accuracy", "kappa")
    run = builder.complete({k: two_tasks(k) for k in range(5)})
    (line,) = read(build_report(run.path).html.parent / "labels.csv")
    images = pd.concat(pd.read_csv(run.cell(k) / "per_image.csv") for k in range(5))
    predicted = images[[f"prob_{label}" for label in LABELS]].idxmax(axis=1).str.removeprefix("prob_")
    assert float(line["kappa"]) == pytest.approx(cohen_kappa_score(images["label"], predicted))
    low, value, high = (float(line[name]) for name in ("kappa_ci95_low", "kappa", "kappa_ci95_high"))
    assert low < value < high
    assert {"label_accuracy", "label_auc"} < {re.sub("_ci95.*", "", name) for name in line}


def test_two_metrics_of_one_name_are_refused(added) -> None:
    with pytest.raises(AssertionError, match="two metrics called dice"):
        added(METRICS["dice"])


def test_the_interval_of_a_new_metric_of_labels_is_computed_for_many_resamples_at_once(added, two_tasks) -> None:
    rows = pd.concat(pd.DataFrame(two_tasks(k, images=200)) for k in range(5))
    resamples: list[int] = []

    def mean(labels: LabelSet, weight_RN: np.ndarray) -> np.ndarray:
        resamples.append(len(weight_RN))
        return labels.mean(labels.prob_NL[:, 0], weight_RN)

    added(Metric(name="mean_prob", title="Mean", of="labels", function=mean, more_is_better=True, grid=None))
    label_intervals(rows)
    assert sum(resamples) > 500
    assert len(resamples) < sum(resamples) / 20
