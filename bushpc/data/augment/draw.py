"""Settings and a generator → one scan's change.

AugmentConfig, generator, Scan ─Draw→ Change ─pixels.py (a worker) | device.py (a batch)→ image and mask
"""

from __future__ import annotations

import math
import typing as t

import numpy as np

from bushpc.config import AugmentConfig
from bushpc.data.augment import change as changes
from bushpc.data.augment import tables
from bushpc.data.augment.affine import IDENTITY, Affine, about, shift
from bushpc.data.augment.change import LEVELS_PER_DB, SLACK, Change, Shadow, Window
from bushpc.data.augment.scan import Scan

# How often a movement is drawn that would take the lesion out of the image.
TRIES = 20
# TrivialAugment's wide set without colour; those of the second line move pixels.
TRIVIAL_GREY = ("identity", "brightness", "contrast", "sharpness", "posterise", "solarise", "autocontrast", "equalise")
TRIVIAL_MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# Its largest shear, shift (32 of 224 pixels) and rotation.
TRIVIAL_SHEAR, TRIVIAL_SHIFT, TRIVIAL_DEGREES = 0.99, 1 / 7, 135.0
TRIVIAL_FACTOR = 0.99  # of brightness, contrast and sharpness, up and down
SLIDERS = 6  # of a time-gain curve


class Movement(t.NamedTuple):
    """affine: source → where the fan and the elastic deformation start from."""

    affine: Affine
    fan: float = 0.0
    nodes_2NN: np.ndarray | None = None


class Draw:
    """The changes of scans of one label. strength: factor of all probabilities and of the oldest settings' extents."""

    def __init__(self, config: AugmentConfig, strength: float) -> None:
        self.config, self.strength = config, strength

    def __call__(self, rng: np.random.Generator, scan: Scan, edge: int) -> Change:
        """edge: of the square image, in pixels. The order of draws is part of what a seed means."""
        config = self.config
        trivial = ""
        if self._happens(rng, config.trivial):
            kinds = (*TRIVIAL_GREY, *TRIVIAL_MOVES)
            trivial = kinds[int(rng.integers(len(kinds)))]
        flips = self._happens(rng, config.hflip), self._happens(rng, config.vflip)
        movement = self._movement(rng, scan, edge, flips, trivial)
        levels, sharpness = self._levels(rng, scan, trivial)
        signal = self._signal(rng, edge)
        noise = None
        if self._happens(rng, config.noise):
            _, std = scan.mean_std(tables.LEVELS)
            noise = _window(rng, math.sqrt(_even(rng, config.noise_range)) * std)
        blur = None
        if self._happens(rng, config.blur):
            blur = (_even(rng, config.blur_range), _even(rng, config.blur_range))
        lowres = 0
        if self._happens(rng, config.lowres):
            rows = max(1, round(edge * _even(rng, config.lowres_range)))
            lowres = rows if rows < edge else 0
        return Change(
            table=None if levels is tables.LEVELS else tables.rounded(levels),
            source=None if movement.affine == IDENTITY else movement.affine.inverse,
            fan=movement.fan,
            nodes_2NN=movement.nodes_2NN,
            noise=noise,
            blur=blur,
            lowres=lowres,
            sharpness=sharpness,
            **signal,
        )

    def _happens(self, rng: np.random.Generator, probability: float) -> bool:
        return bool(rng.random() < probability * self.strength)

    # --- movement -------------------------------------------------------------------------------------------------

    def _movement(
        self, rng: np.random.Generator, scan: Scan, edge: int, flips: tuple[bool, bool], trivial: str
    ) -> Movement:
        middle = (edge - 1) / 2
        flip = about(middle, middle, 1 - 2 * flips[0], 0, 0, 1 - 2 * flips[1])
        if not self._may_move(trivial):
            return Movement(flip)
        for _ in range(TRIES):
            movement = self._one_movement(rng, edge, flip, trivial)
            if _share_inside(movement.affine, scan.points_N2, edge) >= self.config.keep_lesion:
                return movement
        return Movement(flip)

    def _may_move(self, trivial: str) -> bool:
        config = self.config
        affine = config.rotate, config.zoom, config.view, config.shear, config.translate, config.depth
        return self.strength > 0 and (any((*affine, config.fan, config.elastic)) or trivial in TRIVIAL_MOVES)

    def _one_movement(self, rng: np.random.Generator, edge: int, flip: Affine, trivial: str) -> Movement:
        """Depth, then flip, zoom, shear and rotation about the middle, then the shift."""
        config = self.config
        degrees, size, shears, shifts = 0.0, 1.0, [0.0, 0.0], [0.0, 0.0]
        if rng.random() < config.rotate_p:
            degrees = float(rng.uniform(-1, 1)) * config.rotate * self.strength
        if rng.random() < config.zoom_p:
            size *= 1 + float(rng.uniform(-1, 1)) * config.zoom * self.strength
        if self._happens(rng, config.view):
            size /= _even(rng, config.view_range)
        if self._happens(rng, config.shear):
            shears[int(rng.integers(2))] += math.tan(math.radians(_even(rng, config.shear_range)))
        if self._happens(rng, config.translate):
            shifts = [_even(rng, config.translate_range), _even(rng, config.translate_range)]
        middle, moved = (edge - 1) / 2, flip
        if self._happens(rng, config.depth):
            larger = 1 / _even(rng, config.depth_range)
            moved = moved.after(about(middle, -0.5, larger, 0, 0, larger))
        if trivial in TRIVIAL_MOVES:
            extent = float(rng.uniform(-1, 1))
            if trivial.startswith("shear"):
                shears[int(trivial == "shear_y")] += extent * TRIVIAL_SHEAR
            elif trivial.startswith("translate"):
                shifts[int(trivial == "translate_y")] += extent * TRIVIAL_SHIFT
            else:
                degrees += extent * TRIVIAL_DEGREES
        fan = math.radians(_even(rng, config.fan_range)) if self._happens(rng, config.fan) else 0.0
        nodes = None
        if self._happens(rng, config.elastic):
            points = config.elastic_points
            most = _even(rng, config.elastic_range) * changes.spacing(edge, points)
            nodes = (rng.uniform(-1, 1, (2, points, points)) * most).astype(np.float32)
        if degrees or size != 1 or any(shears):
            cos, sin = size * math.cos(math.radians(degrees)), size * math.sin(math.radians(degrees))
            moved = about(middle, middle, 1, shears[0], shears[1], 1).after(moved)
            moved = about(middle, middle, cos, -sin, sin, cos).after(moved)
        if any(shifts):
            moved = shift(shifts[0] * edge, shifts[1] * edge).after(moved)
        return Movement(moved, fan, nodes)

    # --- grey levels ----------------------------------------------------------------------------------------------

    def _levels(self, rng: np.random.Generator, scan: Scan, trivial: str) -> tuple[np.ndarray, float]:
        """What each grey level becomes, and the factor of sharpness."""
        config, levels, sharpness = self.config, tables.LEVELS, 1.0
        if config.brightness and rng.random() < config.brightness_p:
            extent = config.brightness * self.strength
            levels = tables.brightness(levels, 1 + float(rng.uniform(-extent, extent)))
        if config.contrast and rng.random() < config.contrast_p:
            extent = config.contrast * self.strength
            levels = tables.contrast(levels, 1 + float(rng.uniform(-extent, extent)), scan)
        if self._happens(rng, config.gain):
            levels = tables.contrast(levels, _either_side(rng, config.gain_range), scan)
        if self._happens(rng, config.gamma_inverted):
            levels = tables.gamma(levels, _either_side(rng, config.gamma_inverted_range), scan, inverted=True)
        if self._happens(rng, config.gamma):
            levels = tables.gamma(levels, _either_side(rng, config.gamma_range), scan)
        if trivial in TRIVIAL_GREY:
            extent, up = float(rng.random()), bool(rng.integers(2))
            factor = 1 + (extent if up else -extent) * TRIVIAL_FACTOR
            if trivial == "brightness":
                levels = tables.brightness(levels, factor)
            elif trivial == "contrast":
                levels = tables.contrast(levels, factor, scan)
            elif trivial == "sharpness":
                sharpness = factor
            elif trivial == "posterise":
                levels = tables.posterise(levels, 8 - round(6 * extent))
            elif trivial == "solarise":
                levels = tables.solarise(levels, 255 * (1 - extent))
            elif trivial == "autocontrast":
                levels = tables.autocontrast(levels, scan)
            elif trivial == "equalise":
                levels = tables.equalise(levels, scan)
        return levels, sharpness

    def _signal(self, rng: np.random.Generator, edge: int) -> dict[str, t.Any]:
        """Shadow, speckle and gain, as a scanner's signal has them."""
        config = self.config
        found: dict[str, t.Any] = {}
        if self._happens(rng, config.shadow):
            share, (middle, width, start) = _even(rng, config.shadow_range), rng.random(3) * edge
            found["shadow"] = Shadow(share, float(middle), float(0.03 * edge + 0.09 * width), float(0.7 * start))
        if self._happens(rng, config.speckle):
            found["speckle"] = _window(rng, _even(rng, config.speckle_range))
        if self._happens(rng, config.time_gain):
            found["gain_H"] = _gain(rng, config.time_gain_range, edge)
        if self._happens(rng, config.lateral_gain):
            found["gain_W"] = _gain(rng, config.lateral_gain_range, edge)
        return found


def _even(rng: np.random.Generator, span: tuple[float, ...]) -> float:
    low, high = span
    return rng.uniform(low, high)


def _either_side(rng: np.random.Generator, span: tuple[float, ...]) -> float:
    """Below and above 1 are equally likely, as nnU-Net draws factors and exponents."""
    low, high = span
    if low < 1 < high:
        return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))
    return float(rng.uniform(low, high))


def _window(rng: np.random.Generator, factor: float) -> Window:
    top, left = rng.integers(SLACK, size=2)
    return Window(int(top), int(left), factor if rng.random() < 0.5 else -factor)


def _gain(rng: np.random.Generator, span: tuple[float, ...], edge: int) -> np.ndarray:
    """A smooth curve through sliders, whose largest value is drawn in dB; in grey levels."""
    knots = rng.uniform(-1, 1, SLIDERS)
    at = (np.arange(edge) + 0.5) / edge * (SLIDERS - 1)
    left = np.minimum(at.astype(np.intp), SLIDERS - 2)
    eased = (1 - np.cos((at - left) * np.pi)) / 2
    curve = knots[left] * (1 - eased) + knots[left + 1] * eased
    largest = _even(rng, span) * LEVELS_PER_DB
    return (curve * (largest / max(float(np.abs(curve).max()), 1e-9))).astype(np.float32)


def _share_inside(affine: Affine, points_N2: np.ndarray, edge: int) -> float:
    """Share of points that stay in the image. Fan and elastic deformation keep what is inside inside."""
    if len(points_N2) == 0:
        return 1.0
    x_N, y_N = points_N2.T
    a, b, c, d, e, f = affine
    from_middle_2N = np.abs([a * x_N + b * y_N + (c - (edge - 1) / 2), d * x_N + e * y_N + (f - (edge - 1) / 2)])
    return np.count_nonzero(from_middle_2N.max(axis=0) < edge / 2) / len(points_N2)
