"""What a report says in words follows from its figures and tests: conclusion, methods, CLAIM, BibTeX."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from bushpc.report import build_report
from bushpc.report.references import OF_MODELS, entries

ROWS = {"base": {"train.lr": 1e-4}, "other": {"train.lr": 1e-3}}


def paragraphs(run) -> list[str]:
    """The conclusion and the methods, as report.md has them."""
    build_report(run.path)
    parts = (run.path / "report" / "report.md").read_text().split("\n\n")
    return [parts[1], next(part for part in parts if part.startswith("Data: "))]


def two_arms(shared_run, rows_with_dice, name, gain, rng=None):
    """A grid of two rows, five folds of eight scans. gain: of `other` over `base`, by scan."""
    run = shared_run(name, rows=ROWS, metrics=("dice",))
    for fold in range(5):
        dice = np.linspace(0.4, 0.7, 8) + 0.01 * fold
        more = gain + (rng.normal(0, 0.1, 8) if rng else np.linspace(-0.004, 0.004, 8) + 0.001 * fold)
        for row, values in (("base", dice), ("other", dice + more)):
            cell = run.of(row)
            cell.trained(fold)
            cell.evaluated(fold, rows_with_dice(fold, {"first_pass": values}))
    return run


def row_of(run, name: str) -> dict[str, str]:
    with (run.path / "report" / f"{name}.csv").open() as file:
        return next(row for row in csv.DictReader(file) if row["method"].startswith("other"))


def test_a_better_arm_is_named_with_difference_and_both_tests(shared_run, rows_with_dice):
    run = two_arms(shared_run, rows_with_dice, "better", gain=0.1)
    said, _ = paragraphs(run)
    assert said.startswith("other has the best Dice: Dice 0.67")
    difference = float(re.search(r"it is (0\.\d+) more than base", said).group(1))
    assert difference == pytest.approx(float(row_of(run, "comparisons")["mean_difference"]), abs=5e-4)
    assert difference == pytest.approx(0.102, abs=1e-3)  # 0.1, and 0.000 to 0.004 by fold
    assert "image by image this is significant" in said
    assert "over folds, which stand for new trainings, it is significant, too" in said


def test_a_difference_that_may_be_chance_is_called_so(shared_run, rows_with_dice):
    run = two_arms(shared_run, rows_with_dice, "chance", gain=0.01, rng=np.random.default_rng(3))
    said, _ = paragraphs(run)
    p = float(row_of(run, "comparisons")["p_holm"])
    assert p > 0.05
    assert f"not significant (Holm-corrected p = {p:.3f})" in said


def test_a_baseline_that_nothing_beats_is_said_to_be_best(shared_run, rows_with_dice):
    said, _ = paragraphs(two_arms(shared_run, rows_with_dice, "worse", gain=-0.1))
    assert said.startswith("base has the best Dice")
    assert said.endswith("It is the baseline; 1 of 1 others differ from it significantly, image by image.")


def test_a_run_without_a_complete_fold_concludes_nothing(builder):
    said, _ = paragraphs(builder)
    assert said == "No fold is complete, so nothing can be concluded."


def test_missing_folds_make_it_not_final(builder, rows_with_dice):
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5, 0.7]})})
    said, methods = paragraphs(builder)
    assert said.startswith("xbusnet, first\\_pass: Dice 0.600")
    assert said.endswith("over 1 of 5 folds. Cells are missing, so this is not final.")
    assert "1000 steps of" in methods
    assert "on squares of 64 pixels" in methods
    assert "at a threshold of 0.4" in methods
    assert "bushpc 0.1.0 at commit 0123abc, torch 2.15.0" in methods


def test_the_checklist_has_all_42_items_and_leaves_the_unknown_open(builder, rows_with_dice):
    builder.complete({k: rows_with_dice(k, {"first_pass": [0.5, 0.7]}) for k in range(5)})
    build_report(builder.path)
    with (builder.path / "report" / "claim.csv").open() as file:
        answers = {int(row["item"]): row["answer"] for row in csv.DictReader(file)}
    assert sorted(answers) == list(range(1, 43))
    assert "torch 2.15.0" in answers[23]
    assert answers[34] == answers[42] == "for you to state"


def test_references_name_dataset_paper_and_tests(shared_run, rows_with_dice):
    run = two_arms(shared_run, rows_with_dice, "cited", gain=0.1)
    build_report(run.path)
    text = (run.path / "report" / "references.bib").read_text()
    found = re.findall(r"^@\w+\{(\w+),", text, flags=re.MULTILINE)
    assert len(found) == len(set(found))
    assert {"data_breast", "published1", "pytorch", "claim", "wilcoxon", "nadeau_bengio", "holm"} <= set(found)
    assert "doi = {10.1038/s41597-024-02984-z}" in text
    for entry in text.strip().split("\n\n"):
        assert entry.count("{") == entry.count("}"), entry


def test_every_model_that_names_references_names_some_that_exist():
    assert {key for keys in OF_MODELS.values() for key in keys} <= set(entries())
