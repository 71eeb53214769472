"""Promises of other datasets, where every fold's model counts, and of models that give labels alone."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml

from bushpc.report import build_report
from bushpc.sample import LABELS

MASKS = ("dice", "iou", "fpr", "fnr")
ROWS = {"real_only": {"data.synthetic_ratio": 0.0}, "r1": {"data.synthetic_ratio": 1.0}}


def without_masks(rows):
    """As the evaluator writes them for a model that makes none."""
    nothing = dict.fromkeys((*MASKS, "bce", "hd95_mm", "hd95_px", "nsd_mm", "nsd_px"), float("nan"))
    return [{**row, **nothing, **dict.fromkeys(("tp", "fp", "fn", "tn"), 0)} for row in rows]


def of_one_set(rows, fold):
    """The same images whatever the fold, as of another dataset that every fold's model is scored on."""
    return [{**row, "key": f"there{i}", "patient": f"there{i // 2}", "fold": fold} for i, row in enumerate(rows)]


@pytest.fixture
def downstream(shared_run, two_tasks):
    """downstream(name, masks=…) → a grid of two rows and three folds, scored on datasets `near` and `far` besides."""

    def make(name, masks):
        metrics = ("label_auc", "label_accuracy", *(("dice", "iou") if masks else ()))
        run = shared_run(name, folds=3, rows=ROWS, model="efficientnet", metrics=metrics, external=("near", "far"))
        run.write_run_json(prompts="none")
        change = (lambda rows: rows) if masks else without_masks
        for skill, row in enumerate(ROWS, start=1):
            for fold in range(3):
                run.of(row).complete({fold: change(two_tasks(fold, images=24, skill=skill))})
                for seed, there in enumerate(("near", "far"), start=1):
                    rows = two_tasks(fold, images=30, skill=skill, seed=10 * skill + seed)
                    found = of_one_set(change(rows), fold)
                    run.elsewhere(fold, there, found)
        return run

    return make


def auc(score, positive):
    """By Mann and Whitney's U, as SciPy counts it."""
    u = scipy.stats.mannwhitneyu(score[positive], score[~positive]).statistic
    return u / (positive.sum() * (~positive).sum())


def external_rows(run, row, name):
    return [pd.read_csv(run.of(row).cell(fold) / "external" / f"{name}.csv") for fold in range(3)]


def test_a_figure_on_another_dataset_is_the_mean_over_the_folds_models(downstream):
    run = downstream("means", masks=True)
    summary = build_report(run.path).content
    assert summary["external"] == ["near", "far"]
    for arm in summary["arms"]:
        frames = external_rows(run, arm["arm"], "far")
        dice = [frame["dice"].mean() for frame in frames]
        aucs = [np.mean([auc(frame[f"prob_{label}"], frame["label"] == label) for label in LABELS]) for frame in frames]
        found = arm["external"]["far"]
        assert found["images"] == 30
        for metric, values in (("dice", dice), ("label_auc", aucs)):
            assert found["metrics"][metric]["mean"] == pytest.approx(np.mean(values))
            assert found["metrics"][metric]["sd"] == pytest.approx(np.std(values, ddof=1))


def test_rows_are_tested_image_by_image_on_the_mean_over_folds(downstream):
    run = downstream("tests", masks=True)
    summary = build_report(run.path).content
    (row,) = [row for row in summary["external_comparisons"]["rows"] if row["data"] == "near"]
    ours, theirs = (
        pd.concat(external_rows(run, name, "near")).groupby("key")["dice"].mean() for name in ("r1", "real_only")
    )
    difference = (ours - theirs).dropna()
    assert row["metrics"]["dice"]["mean"] == pytest.approx(difference.mean())
    assert row["metrics"]["dice"]["p"] == pytest.approx(scipy.stats.wilcoxon(difference).pvalue)
    assert row["metrics"]["label_auc"]["mean"] > 0  # the row with synthetic scans has more skill
    tables = {path.name for path in (run.path / "report").glob("*.csv")}
    assert {"external.csv", "external_comparisons.csv"} <= tables
    page = (run.path / "report" / "index.html").read_text()
    assert 'id="external"' in page
    assert "30 images of near, 30 images of far" in page


def test_a_grid_of_classifiers_says_whether_their_aucs_differ(downstream):
    run = downstream("aucs", masks=False)
    result = build_report(run.path)
    (row,) = result.content["label_comparisons"]["rows"]
    frames = [
        pd.concat(pd.read_csv(run.of(name).cell(fold) / "per_image.csv") for fold in range(3)).set_index("key")
        for name in ("r1", "real_only")
    ]
    ours, theirs = (
        np.mean([auc(rows[f"prob_{label}"].to_numpy(), (rows["label"] == label).to_numpy()) for label in LABELS])
        for rows in frames
    )
    found = row["label_auc"]
    assert found["mean"] == pytest.approx(ours - theirs)
    error = (found["ci95"][1] - found["ci95"][0]) / 2 / scipy.stats.norm.ppf(0.975)
    assert found["p"] == pytest.approx(2 * scipy.stats.norm.sf(abs(ours - theirs) / error))
    ps = sorted((found["p"], row["mcnemar"]["p"]))  # of AUC and of accuracy, one family
    assert found["p_holm"] == pytest.approx(2 * ps[0] if found["p"] == ps[0] else max(2 * ps[0], ps[1]))
    elsewhere = result.content["external_comparisons"]["rows"]
    assert all(there["metrics"]["label_auc"]["p_holm"] >= there["metrics"]["label_auc"]["p"] for there in elsewhere)
    lines = (run.path / "report" / "headline.csv").read_text().splitlines()
    assert "label_auc_p_holm" in lines[0]
    assert lines[2].endswith(f",{found['p_holm']!r}")
    page = result.html.read_text()
    assert page.count("AUC: DeLong&#39;s test of two AUCs on the same images") == 2  # here and on other datasets
    assert "Baseline: real only. p: DeLong&#39;s test of the AUC of all images together" in page


def test_a_dataset_that_the_generator_saw_is_no_unseen_one(downstream):
    run = downstream("leaking", masks=True)
    cells = [{**cell, "generator_saw": ["near"]} if cell["row"] == "r1" else cell for cell in run.run["cells"]]
    run.write_run_json(cells=cells)
    _, r1 = build_report(run.path).content["arms"]
    assert (r1["external"]["near"]["seen_by_generator"], r1["external"]["far"]["seen_by_generator"]) == (True, False)
    page = (run.path / "report" / "index.html").read_text()
    assert "The generator of r1 trained on scans of near: these figures are not of unseen scans" in page
    tested = build_report(run.path).content["external_comparisons"]["rows"]
    assert [(row["label"], row["data"]) for row in tested] == [("r1", "far")]


def test_the_page_says_who_trained_on_synthetic_scans(downstream):
    run = downstream("synthetic", masks=True)
    for fold in range(3):
        path = run.of("r1").cell(fold) / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["data"] |= {"synthetic": "made", "synthetic_sha256": f"{fold}", "real": False}
        path.write_text(yaml.safe_dump(config))
    real_only, r1 = build_report(run.path).content["arms"]
    assert real_only["synthetic"] is None
    assert r1["synthetic"] == {"ratio": 1.0, "real": False, "sha256": {"0": "0", "1": "1", "2": "2"}}
    page = (run.path / "report" / "index.html").read_text()
    assert "Trained on synthetic scans: r1 (1 for each real one, which do not train)." in page


def test_a_page_of_labels_alone_speaks_of_no_mask(downstream):
    run = downstream("labels", masks=False)
    summary = build_report(run.path).content
    assert summary["shown_metrics"] == ["label_auc", "label_accuracy"]
    assert (summary["tested_metrics"], summary["headline_metric"]) == ([], "label_auc")
    assert summary["comparisons"] is None
    assert len(summary["label_comparisons"]["rows"]) == 1
    page = (run.path / "report" / "index.html").read_text()
    assert "Classification of validation images" in page
    for section in ("strata", "spread", "calibration", "predictions", "comparisons"):
        assert f'id="{section}"' not in page
    said = re.sub(r"data:[^\"]+", "", page).replace("validation Dice", "")
    assert not any(word in said for word in ("Dice", "NaN", "Segmentation"))
    assert all(not math.isnan(arm["external"]["near"]["metrics"]["label_auc"]["mean"]) for arm in summary["arms"])


def test_a_cross_validation_of_labels_alone_has_a_page_too(shared_run, two_tasks):
    run = shared_run("alone", folds=3, model="efficientnet", metrics=("label_auc", "label_f1"))
    run.write_run_json(prompts="none")
    run.complete({fold: without_masks(two_tasks(fold, images=24)) for fold in range(3)})
    result = build_report(run.path)
    labels = pd.concat([pd.read_csv(run.cell(fold) / "per_image.csv") for fold in range(3)])
    assert result.content["labels"]["none"]["images"] == labels["label"].value_counts().to_dict()
    assert 'id="predictions"' not in result.html.read_text()


def test_a_page_of_a_generators_own_scores_speaks_of_no_segmentation(shared_run, two_tasks):
    run = shared_run("generator", folds=3, model="tumor_generator", metrics=("denoising_mse",))
    run.write_run_json(prompts="none")
    run.complete(
        {
            fold: [{**row, "denoising_mse": 0.1 + 0.01 * i} for i, row in enumerate(without_masks(two_tasks(fold)))]
            for fold in range(3)
        }
    )
    page = build_report(run.path).html.read_text()
    assert "Validation images as the model itself scores them" in page
    assert "Segmentation" not in page


def test_a_scored_dataset_whose_file_is_gone_makes_the_fold_incomplete(downstream):
    run = downstream("gone", masks=True)
    (run.of("r1").cell(1) / "external" / "far.csv").unlink()
    arm = build_report(run.path).content["arms"][1]
    assert arm["folds"]["missing"][0]["reason"] == "marked DONE, but external/far.csv is not there"
