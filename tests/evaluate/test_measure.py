"""Promises of the measures: closed forms of shapes whose axes are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bushpc.evaluate.measure import measure
from bushpc.sample import PixelSize


def ellipse(a: float, b: float, degrees: float, shape: tuple[int, int] = (300, 340)) -> np.ndarray:
    """Semi-axes a and b in pixels, the first turned by `degrees` from the horizontal, centred at (170, 150)."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    x, y, turn = x - 170, y - 150, math.radians(degrees)
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    return ((along / a) ** 2 + (across / b) ** 2 <= 1).astype(np.uint8)


def rectangle(height: int, width: int) -> np.ndarray:
    mask = np.zeros((90, 120), np.uint8)
    mask[10 : 10 + height, 20 : 20 + width] = 1
    return mask


@pytest.mark.parametrize("degrees", [0, 30, 90, 137])
def test_an_ellipse_has_its_own_axes_whichever_way_it_lies(degrees):
    found = measure(ellipse(120, 50, degrees), PixelSize(0.1, 0.1))
    assert found.long_axis_px == pytest.approx(240, abs=2)
    assert found.short_axis_px == pytest.approx(100, abs=3)  # the tilt of the long axis by a pixel moves it most
    assert found.area_px == pytest.approx(math.pi * 120 * 50, rel=0.005)
    assert found.centroid_px == pytest.approx((170, 150), abs=1e-6)
    assert found.long_axis_mm == pytest.approx(found.long_axis_px / 10)
    assert found.area_mm2 == pytest.approx(found.area_px / 100)


def test_a_rectangle_is_measured_along_its_diagonal():
    found = measure(rectangle(20, 40), None)
    diagonal = math.hypot(20, 40)
    assert found.long_axis_px == pytest.approx(diagonal)
    assert found.short_axis_px == pytest.approx(2 * 20 * 40 / diagonal)
    assert (found.area_px, found.centroid_px) == (800, (39.5, 19.5))
    assert found.long_axis_mm is found.short_axis_mm is found.area_mm2 is found.centroid_mm is None


def test_a_single_pixel_is_a_square():
    found = measure(rectangle(1, 1), PixelSize(0.3, 0.4))
    assert (found.long_axis_px, found.short_axis_px) == pytest.approx((math.sqrt(2), math.sqrt(2)))
    assert found.long_axis_mm == pytest.approx(0.5)
    assert (found.area_px, found.centroid_px) == (1, (20, 10))
    assert found.centroid_mm == pytest.approx((20.5 * 0.3, 10.5 * 0.4))


def test_pixels_that_are_not_square_are_measured_in_real_distances():
    """A circle that a scanner stored with pixels twice as high as wide is a circle again in millimetres."""
    found = measure(ellipse(100, 50, 0), PixelSize(0.1, 0.2))
    assert found.long_axis_mm == pytest.approx(20, abs=0.3)
    assert found.short_axis_mm == pytest.approx(20, abs=0.3)
    assert found.long_axis_px == pytest.approx(200, abs=2)


def test_axes_are_of_the_largest_part_and_the_area_of_all():
    mask = rectangle(20, 40)
    mask[80:85, 100:105] = 1
    found, alone = measure(mask, None), measure(rectangle(20, 40), None)
    assert (found.components, found.area_px) == (2, 825)
    assert (found.long_axis_px, found.centroid_px) == (alone.long_axis_px, alone.centroid_px)


def test_an_empty_mask_has_no_place():
    found = measure(np.zeros((5, 7), np.uint8), PixelSize(1, 1))
    assert (found.components, found.area_px, found.long_axis_px, found.long_axis_mm) == (0, 0, 0, 0)
    assert found.centroid_px is found.centroid_mm is None
