"""Promises of the clinical priors: seed and index decide, forms follow (6) and (7), text follows the same draw."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.interpolate import BSpline

from bushpc.conditions.captions import caption
from bushpc.config import compose_command
from bushpc.errors import ConfigError
from bushpc.generate.config import GenerateConfig
from bushpc.generate.priors import FARTHEST, INTERVALS, Priors, deformed_ellipse


def priors(*overrides: str, size: int = 128, seed: int = 0) -> Priors:
    return Priors(compose_command(GenerateConfig, "generate", overrides).priors, size, seed)


@pytest.fixture(scope="module")
def thousand():
    draw = priors()
    return [draw(index) for index in range(1000)]


def extent(mask_SS: np.ndarray) -> tuple[int, int]:
    """Width and height of what is filled."""
    rows, columns = np.nonzero(mask_SS)
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


# --- what is drawn ----------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_and_index_alone(thousand):
    again, other = priors(), priors(seed=1)
    for index in (999, 3, 500):
        assert again(index)[:2] == thousand[index][:2]
        assert np.array_equal(again(index).mask_SS, thousand[index].mask_SS)
        assert other(index).attributes != thousand[index].attributes


def test_caption_and_mask_follow_the_attributes_that_are_stored(thousand):
    for drawn in thousand[:100]:
        assert drawn.caption == caption(drawn.label, drawn.attributes)
        a, b, x0, y0, sigma = (drawn.attributes[name] for name in ("a", "b", "x0", "y0", "sigma"))
        width, height = extent(drawn.mask_SS)
        reach = FARTHEST * sigma * min(a, b) + 1
        assert abs(width - 2 * a - 1) <= 2 * reach
        assert abs(height - 2 * b - 1) <= 2 * reach
        rows, columns = np.nonzero(drawn.mask_SS)
        assert abs(columns - x0).max() <= a + reach
        assert abs(rows - y0).max() <= b + reach


def test_an_undeformed_lesion_is_the_ellipse_of_6():
    draw = priors("priors.benign.sigma=[0,0]", "priors.malignant.sigma=[0,0]")
    for index in range(50):
        drawn = draw(index)
        a, b, x0, y0 = (drawn.attributes[name] for name in ("a", "b", "x0", "y0"))
        y_SS, x_SS = np.mgrid[:128, :128]
        distance_SS = ((x_SS - x0) / a) ** 2 + ((y_SS - y0) / b) ** 2
        differs_SS = drawn.mask_SS != (distance_SS <= 1)
        assert (abs(distance_SS[differs_SS] - 1) < 1e-5).all()  # on the very outline, rounding decides
        assert a <= x0 <= 128 - a
        assert b <= y0 <= 128 - b
        assert a > b if drawn.label == "benign" else a < b


def test_every_mask_is_one_piece_without_holes_inside_the_frame(thousand):
    for drawn in thousand:
        assert drawn.mask_SS.dtype == np.uint8
        assert set(np.unique(drawn.mask_SS)) == {0, 1}
        assert ndimage.label(drawn.mask_SS)[1] == 1
        assert ndimage.label(np.pad(1 - drawn.mask_SS, 1, constant_values=1), np.ones((3, 3)))[1] == 1


@pytest.mark.parametrize(("size", "sigma"), [(48, "[0.2,0.35]"), (256, "[1,1]")])
def test_masks_stay_whole_where_pixels_are_coarse_and_deformation_is_strong(size, sigma):
    draw = priors(f"priors.malignant.sigma={sigma}", "priors.frame_mm=90", "priors.sizes_mm.small=[8,10]", size=size)
    for index in range(200):
        assert ndimage.label(draw(index).mask_SS, np.ones((3, 3)))[1] == 1


def test_benign_lesions_are_wider_than_tall_and_malignant_ones_taller_than_wide(thousand):
    aspect = {"benign": [], "malignant": []}
    for drawn in thousand:
        width, height = extent(drawn.mask_SS)
        aspect[drawn.label].append(width / height)
    assert 430 < len(aspect["benign"]) < 570  # half of 1,000, four standard deviations either way
    assert np.mean(np.array(aspect["benign"]) > 1) > 0.98
    assert np.mean(np.array(aspect["malignant"]) < 1) > 0.9
    assert 1.5 < np.median(aspect["benign"]) < 1.8
    assert 0.7 < np.median(aspect["malignant"]) < 0.85


def test_every_size_occurs_equally_often_and_is_as_long_as_it_says(thousand):
    by_size = {}
    for drawn in thousand:
        by_size.setdefault(drawn.attributes["size"], []).append(max(drawn.attributes["a"], drawn.attributes["b"]))
    assert {name: round(len(found) / 1000, 1) for name, found in by_size.items()} == dict.fromkeys(by_size, 0.3)
    for name, (low, high) in {"small": (5, 10), "medium": (10, 20), "large": (20, 26)}.items():
        length_mm = 2 * np.array(by_size[name]) / 128 * 42
        assert low - 0.33 <= length_mm.min() <= length_mm.max() <= high + 0.33  # half a pixel either way


def test_shares_of_class_echogenicity_and_boundary_are_those_that_are_set():
    draw = priors("priors.malignant_share=0.2", "priors.benign.unclear=0.3", "priors.malignant.heterogeneous=0.5")
    found = [draw(index) for index in range(1000)]
    benign, malignant = ([d for d in found if d.label == label] for label in ("benign", "malignant"))
    assert abs(len(malignant) / 1000 - 0.2) < 0.05
    assert abs(np.mean([d.attributes["boundary"] == "unclear" for d in benign]) - 0.3) < 0.06
    assert abs(np.mean([d.attributes["echogenicity"] == "heterogeneous" for d in malignant]) - 0.5) < 0.14
    assert {d.attributes["echogenicity"] for d in benign} == {"homogeneous"}
    assert {d.attributes["boundary"] for d in malignant} == {"unclear"}


# --- elastic deformation (7) ------------------------------------------------------------------------------------


def test_the_deformation_is_scipys_cubic_spline_through_the_same_control_points():
    a, b, sigma = 40, 24, 0.1
    found = deformed_ellipse(a, b, sigma, np.random.default_rng(5))
    points = INTERVALS + 3
    normal = np.clip(np.random.default_rng(5).standard_normal((2, points, points)), -FARTHEST, FARTHEST)
    height, width = found.shape
    spline_Y, spline_X = (
        BSpline.design_matrix(np.linspace(0, INTERVALS, n), np.arange(-3.0, INTERVALS + 4), 3).toarray()
        for n in (height, width)
    )
    dy, dx = (spline_Y @ (sigma * b * moves) @ spline_X.T for moves in normal)
    y, x = np.mgrid[:height, :width] - np.array([height // 2, width // 2])[:, None, None]
    distance = ((x + dx) / a) ** 2 + ((y + dy) / b) ** 2
    sure = abs(distance - 1) > 1e-4
    assert sure.mean() > 0.99
    assert np.array_equal(found[sure], distance[sure] <= 1)


def test_a_larger_sigma_deforms_more():
    def overlap(sigma: float) -> float:
        found = []
        for seed in range(40):
            shape = deformed_ellipse(30, 20, sigma, np.random.default_rng(seed))
            y, x = np.indices(shape.shape) - np.array(shape.shape)[:, None, None] // 2
            ellipse = (x / 30) ** 2 + (y / 20) ** 2 <= 1
            found.append((shape & ellipse).sum() / (shape | ellipse).sum())
        return float(np.mean(found))

    overlaps = [overlap(sigma) for sigma in (0, 0.05, 0.1, 0.2, 0.35)]
    assert overlaps[0] == 1
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[-1] < 0.9


# --- what cannot be drawn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("priors.sizes_mm.small=[0,0]", "has zero size"),
        (
            "priors.sizes_mm.small=[0.2,5]",
            r"a benign lesion of 0.2 mm .* has zero size \(semi-axes of 0 and -1 pixels\)",
        ),
        ("priors.sizes_mm.large=[20,60]", "a benign lesion of 60 mm.*outside a frame of 42 mm"),
        ("priors.malignant.sigma=[0,2]", "a malignant lesion of 26 mm, deformed with sigma 2, can reach"),
        ("priors.sizes_mm.small=[10,5]", r"priors.sizes_mm.small=\[10.0, 5.0\]: it must be two ascending numbers"),
        ("priors.sizes_mm.small=[-5,5]", "two ascending numbers ≥ 0"),
        ("priors.benign.aspect=[0.5,2]", "two ascending numbers ≥ 1"),
        ("priors.benign.aspect=[2]", "two ascending numbers"),
        ("priors.benign.unclear=1.5", "a share from 0 to 1"),
        ("priors.malignant_share=-0.1", "must be ≥ 0 and ≤ 1"),
        ("priors.frame_mm=0", "must be > 0"),
        ("priors.frame_mm=nan", "not a number"),
        ("priors.benin.unclear=1", "did you mean 'priors.benign.unclear'"),
        ("priors.frame_mm=wide", "is a str; allowed: float"),
        ("n=0", "n=0: must be ≥ 1"),
        ("batch_size=0", "batch_size=0: must be ≥ 1"),
        ("seed=-1", "seed=-1: must be ≥ 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_way_out(override, said):
    with pytest.raises(ConfigError, match=said):
        priors(override)
