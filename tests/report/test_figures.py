"""Charts: every fold and source is in them, labels are honest, and they stay small and the same."""

import xml.etree.ElementTree as ET

import pandas as pd
import pytest

from bushpc.report import figures
from bushpc.report.scope import scope_of_run


@pytest.fixture
def text_in_svg(monkeypatch) -> None:
    """Letters as text instead of outlines, so that a test can read them."""
    monkeypatch.setitem(figures._STYLE, "svg.fonttype", "none")


def _texts(svg: str) -> str:
    return " ".join("".join(element.itertext()) for element in ET.fromstring(svg).iter() if "text" in element.tag)


@pytest.mark.usefixtures("text_in_svg")
def test_the_box_plot_names_missing_folds_and_labels_the_oracle(builder, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5, 0.7], "oracle": [0.6, 0.8]})})
    shown = _texts(_box_plot(builder))
    for text in ("fold 0", "fold 3", "missing", "first_pass", "oracle (uses the ground-truth mask)"):
        assert text in shown


@pytest.mark.usefixtures("text_in_svg")
def test_training_curves_name_every_fold_and_mark_the_incomplete(builder, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5]})})
    builder.trained(1, steps=300)
    shown = _texts(figures.training_curves(scope_of_run(builder.path)))
    assert "fold 0" in shown
    assert "fold 1 (incomplete)" in shown
    assert "Validation Dice" in shown


@pytest.mark.usefixtures("text_in_svg")
def test_without_validation_there_is_no_empty_validation_plot(builder) -> None:
    builder.trained(0, validations=False)
    assert "Validation Dice" not in _texts(figures.training_curves(scope_of_run(builder.path)))


@pytest.mark.usefixtures("text_in_svg")
def test_time_bars_name_every_started_fold_and_only_causes_that_occur(builder) -> None:
    builder.spent(0, {"step": 3600, "load": 60}, {"step": 60})
    builder.spent(2, {"start": 7200})
    shown = _texts(figures.time_bars(scope_of_run(builder.path)))
    for text in ("fold 0", "fold 2", "training steps", "waiting for data", "steps done again", "start", "queue"):
        assert text in shown
    for text in ("fold 1", "waiting for saves", "not submitted"):
        assert text not in shown


def test_no_started_cell_gives_no_time_bars(builder) -> None:
    assert figures.time_bars(scope_of_run(builder.path)) is None


def test_no_logged_step_gives_no_curve(builder) -> None:
    assert figures.training_curves(scope_of_run(builder.path)) is None


def _box_plot(builder) -> str:
    return figures.box_plot(*figures.boxes_of(scope_of_run(builder.path)))


def test_long_logs_and_many_images_keep_the_charts_small(builder, rows_with_dice) -> None:
    builder.trained(0, steps=300_000)
    assert len(figures.training_curves(scope_of_run(builder.path))) < 200_000
    builder.evaluated(0, rows_with_dice(0, {"first_pass": [i / 5000 for i in range(5000)]}))
    assert len(_box_plot(builder)) < 200_000


def test_the_same_results_give_the_same_picture(builder, rows_with_dice) -> None:
    builder.complete({0: rows_with_dice(0, {"first_pass": [0.5, 0.7]})})
    assert _box_plot(builder) == _box_plot(builder)


@pytest.mark.usefixtures("text_in_svg")
def test_charts_of_a_grid_name_its_arms_and_no_fold(realistic_grid) -> None:
    realistic_grid.of("no_gfe").spent(1, {"step": 3600})
    scope = scope_of_run(realistic_grid.path)
    boxes = figures.box_plot(*figures.boxes_of(scope))
    for svg in (boxes, figures.training_curves(scope), figures.reliability_diagram(scope)):
        shown = _texts(svg)
        assert all(label in shown for label in ("full", "no lfe", "no gfe", "no sfa"))
        assert "fold" not in shown
    assert "no gfe" in _texts(figures.time_bars(scope))


def test_smoothing_a_constant_changes_nothing_and_starts_at_the_first_value() -> None:
    assert figures.smooth(pd.Series([2.0] * 50)).tolist() == pytest.approx([2.0] * 50)
    assert figures.smooth(pd.Series([5.0, 1.0, 1.0] * 40)).iloc[0] == 5.0
