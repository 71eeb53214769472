"""Mask metrics against torchmetrics, MONAI and gudhi, and cases worked by hand."""

import gudhi
import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_iou
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
    binary_specificity,
    binary_stat_scores,
)

from bushpc.metrics.mask import MaskPair, betti_error, betti_numbers, confusion, lesion_length, surface_metrics
from bushpc.metrics.registry import METRICS

OF_PIXEL_COUNTS = ("dice", "iou", "fpr", "fnr", "sensitivity", "specificity", "precision", "accuracy", "bce")


def measured(prob, mask) -> dict[str, np.ndarray]:
    """The metrics that take several images at once, as arrays of the axes before height and width."""
    pair = MaskPair(prob=prob, mask=mask)
    return {name: METRICS[name].function(pair) for name in OF_PIXEL_COUNTS}


@pytest.fixture
def case():
    random = np.random.default_rng(5)
    return random.random((6, 20, 30)), (random.random((6, 20, 30)) > 0.8).astype(np.uint8)


def test_counts_agree_with_torchmetrics(case):
    prob, mask = case
    counts = confusion(prob, mask)
    reference = binary_stat_scores(torch.tensor(prob), torch.tensor(mask), multidim_average="samplewise")
    for count, column in ((counts.tp, 0), (counts.fp, 1), (counts.tn, 2), (counts.fn, 3)):
        assert count.tolist() == reference[:, column].tolist()


def test_dice_and_iou_agree_with_monai_and_torchmetrics(case):
    prob, mask = case
    metrics = measured(prob, mask)
    predicted, actual = torch.tensor(prob >= 0.5)[:, None], torch.tensor(mask)[:, None]
    np.testing.assert_allclose(metrics["dice"], compute_dice(predicted, actual)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics["iou"], compute_iou(predicted, actual)[:, 0], rtol=1e-6)
    for i in range(len(prob)):
        reference = binary_jaccard_index(torch.tensor(prob[i]), torch.tensor(mask[i]))
        assert metrics["iou"][i] == pytest.approx(reference.item(), abs=1e-6)


def test_case_worked_by_hand():
    mask = np.array([[1, 1, 1, 0], [0, 0, 0, 0]])
    prob = np.array([[0.9, 0.5, 0.1, 0.8], [0.2, 0.7, 0.0, 0.4]])  # TP 2, FN 1, FP 2, TN 3; 0.5 counts as lesion
    metrics = measured(prob, mask)
    assert metrics["dice"] == pytest.approx(4 / 7)
    assert metrics["iou"] == pytest.approx(2 / 5)
    assert metrics["fpr"] == pytest.approx(2 / 5)
    assert metrics["fnr"] == pytest.approx(1 / 3)


def test_leading_axes_are_images(case):
    prob, mask = case
    whole = measured(prob.reshape(2, 3, 20, 30), mask.reshape(2, 3, 20, 30))
    assert whole["dice"].shape == (2, 3)
    assert whole["dice"][1, 0] == measured(prob[3], mask[3])["dice"]


@pytest.mark.parametrize("predicted_pixels", [0, 4])
def test_an_empty_reference_has_no_overlap_metrics_but_a_false_positive_rate(predicted_pixels):
    prob = np.zeros((4, 4))
    prob.flat[:predicted_pixels] = 1
    metrics = measured(prob, np.zeros((4, 4)))
    assert all(np.isnan(metrics[name]) for name in ("dice", "iou", "fnr"))
    assert metrics["fpr"] == pytest.approx(predicted_pixels / 16)


def test_an_empty_prediction_of_a_lesion_misses_all_of_it():
    mask = np.zeros((4, 4))
    mask[1, 1] = 1
    metrics = measured(np.zeros((4, 4)), mask)
    assert (metrics["dice"], metrics["iou"], metrics["fpr"]) == (0, 0, 0)
    assert metrics["fnr"] == pytest.approx(1)


def test_a_probability_that_is_not_a_number_is_refused():
    prob = np.zeros((4, 4))
    prob[0, 0] = np.nan
    with pytest.raises(AssertionError, match="not finite"):
        confusion(prob, np.zeros((4, 4)))


def test_a_mask_that_is_not_binary_is_refused():
    with pytest.raises(AssertionError, match="0 and 1"):
        confusion(np.zeros((4, 4)), np.full((4, 4), 255))


@pytest.mark.parametrize(
    ("pixels", "length"),
    [([], 0), ([(3, 4)], 1), ([(1, 2), (1, 6)], 5), ([(0, 0), (7, 3)], 8), ([(2, 0), (4, 9)], 10)],
)
def test_lesion_length_is_the_longest_side_of_the_bounding_box(pixels, length):
    mask = np.zeros((8, 10), np.uint8)
    for row, column in pixels:
        mask[row, column] = 1
    assert lesion_length(mask) == length


def test_pixel_rates_agree_with_torchmetrics(case):
    prob, mask = case
    metrics = measured(prob, mask)
    references = {
        "sensitivity": binary_recall,
        "specificity": binary_specificity,
        "precision": binary_precision,
        "accuracy": binary_accuracy,
    }
    for name, reference in references.items():
        expected = reference(torch.tensor(prob), torch.tensor(mask), multidim_average="samplewise")
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)


def test_bce_agrees_with_torch_and_stays_finite_for_certainty_that_is_wrong(case):
    prob, mask = case
    reference = torch.nn.functional.binary_cross_entropy(
        torch.tensor(prob), torch.tensor(mask, dtype=torch.float64), reduction="none"
    )
    np.testing.assert_allclose(measured(prob, mask)["bce"], reference.mean((1, 2)), rtol=1e-6)
    assert np.isfinite(measured(np.zeros((2, 2)), np.ones((2, 2)))["bce"])


def square(left: int, top: int = 10, size: int = 20) -> np.ndarray:
    mask = np.zeros((48, 64), np.uint8)
    mask[top : top + size, left : left + size] = 1
    return mask


def test_a_shifted_square_is_as_far_away_as_it_was_shifted():
    # Of the left and right edges all pixels are 4 columns away, more than the 5 % that the percentile leaves out.
    hd95, nsd = surface_metrics(square(14).astype(float), square(10), pixel=(1.0, 1.0), tolerance=4.0)
    assert (hd95, nsd) == (4.0, 1.0)
    # In millimetres, with pixels half as wide as high.
    assert surface_metrics(square(14).astype(float), square(10), pixel=(1.0, 0.5), tolerance=4.0)[0] == 2.0


def test_surface_dice_is_the_share_of_edge_pixels_that_are_near_the_other_edge():
    _, nsd = surface_metrics(square(14).astype(float), square(10), pixel=(1.0, 1.0), tolerance=1.0)
    predicted, actual = edge(square(14)), edge(square(10))
    near = [
        sum(min(np.hypot(y - v, x - u) for v, u in other) <= 1 for y, x in one)
        for one, other in ((predicted, actual), (actual, predicted))
    ]
    assert nsd == pytest.approx(sum(near) / (len(predicted) + len(actual)))


def edge(mask: np.ndarray) -> list[tuple[int, int]]:
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return list(zip(*np.nonzero(mask & ~inside), strict=True))


def test_a_missed_lesion_is_as_far_away_as_the_image_is_long_and_a_normal_scan_has_no_distance():
    nothing = np.zeros((48, 64))
    assert surface_metrics(nothing, square(10), pixel=(0.5, 0.5), tolerance=1.0) == (40.0, 0.0)
    assert np.isnan(surface_metrics(nothing, nothing, pixel=(1.0, 1.0), tolerance=1.0)).all()


def gudhi_betti(mask_HW):
    """Of the closed pixels of the foreground: what is there at filtration value 0."""
    complex_ = gudhi.CubicalComplex(top_dimensional_cells=np.where(mask_HW, 0.0, 1.0))
    complex_.compute_persistence()
    found = complex_.persistent_betti_numbers(0.0, 0.5)
    return found[0], found[1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_pieces_and_holes_are_those_that_gudhi_finds(share):
    random = np.random.default_rng(8)
    for size in ((3, 3), (12, 9), (31, 40)):
        mask_HW = random.random(size) < share
        assert betti_numbers(mask_HW) == gudhi_betti(mask_HW)


@pytest.mark.parametrize(
    ("rows", "pieces", "holes"),
    [
        (["....", "....", "...."], 0, 0),
        (["####", "####", "####"], 1, 0),
        (["#...", ".#..", "..##"], 1, 0),  # corners connect the foreground
        ([".#..", "#.#.", ".#.."], 1, 1),  # and so close a ring around one pixel
        (["###.", "#..#", "####"], 1, 1),  # whose inside leaves by no corner
        (["####", "#..#", "#..#"], 1, 0),  # open to the border
        (["#.##", "..##", "#..."], 3, 0),
        (["#####", "#.#.#", "#####"], 1, 2),
    ],
)
def test_pieces_and_holes_worked_by_hand(rows, pieces, holes):
    assert betti_numbers(np.array([[pixel == "#" for pixel in row] for row in rows])) == (pieces, holes)


def test_betti_error_counts_wrong_pieces_and_wrong_holes_of_the_thresholded_map():
    def error(prob: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> float:
        return betti_error(MaskPair(prob=prob, mask=mask, threshold=threshold))

    mask, prob = square(10), 0.6 * square(10).astype(float)
    assert error(prob, mask) == 0
    prob[15:17, 15:17] = 0.4  # a hole
    prob[2, 2] = prob[5, 60] = prob[40, 40] = 0.55  # three stray pixels
    assert error(prob, mask) == 3 + 1
    assert error(prob, mask, threshold=0.3) == 3
    assert error(prob, mask, threshold=0.7) == 1  # nothing is found
    assert error(np.zeros((48, 64)), np.zeros((48, 64))) == 0
    assert error(prob, np.zeros((48, 64))) == 4 + 1
