"""One scan's change, drawn and not yet applied: the same object in a worker and on the device.

Everything is in pixels of the network's image; pixel (x, y) has its centre at whole x and y.
"""

from __future__ import annotations

import functools
import math
import typing as t
from dataclasses import dataclass

import numpy as np

from bushpc.data.augment.affine import Affine

# 60 dB span the grey levels of a display; so many levels are one dB.
LEVELS_PER_DB = 255 / 60
# Gain is added where there is signal, and nothing where the image is black: in full from this grey level on.
SIGNAL = 8.0
# A window of noise lies anywhere in a field that is this much larger than the image.
SLACK = 512
# Grains of speckle: standard deviations of the blur that makes them, down and across.
GRAIN = (0.8, 1.6)


class Window(t.NamedTuple):
    """A piece of a field of noise, and what it is multiplied by."""

    top: int
    left: int
    factor: float


class Shadow(t.NamedTuple):
    """An acoustic shadow takes `share` of the signal. Middle and half width across, start down, in pixels."""

    share: float
    middle: float
    width: float
    start: float

    def profiles(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """What it takes down and across; the shadow is their product."""
        down = 1 / (1 + np.exp(-(np.arange(height) - self.start) / (0.02 * height)))
        across = np.exp(-(((np.arange(width) - self.middle) / self.width) ** 4))
        return (self.share * down).astype(np.float32), across.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a scan gets, in the order of these fields. What is None, 0 or empty is left out.

    table: 256 grey levels. source: where an output pixel comes from, after `nodes` and `fan`. fan: angle of the
    outermost beam in radians. nodes_2NN: displacements x and y of the inner control points. gain_H, gain_W: grey levels
    added. blur: standard deviations across and down. lowres: rows that remain. sharpness: factor, 1 changes nothing.
    """

    table: np.ndarray | None = None
    source: Affine | None = None
    fan: float = 0.0
    nodes_2NN: np.ndarray | None = None
    shadow: Shadow | None = None
    speckle: Window | None = None
    gain_H: np.ndarray | None = None
    gain_W: np.ndarray | None = None
    noise: Window | None = None
    blur: tuple[float, float] | None = None
    lowres: int = 0
    sharpness: float = 1.0

    @property
    def moves(self) -> bool:
        """Whether anything changes its place."""
        return self.bends or self.source is not None

    @property
    def bends(self) -> bool:
        """Whether the movement is more than an affine one."""
        return bool(self.fan) or self.nodes_2NN is not None

    @property
    def filters(self) -> bool:
        """Whether grey levels change by more than the table."""
        grey = (self.shadow, self.speckle, self.gain_H, self.gain_W, self.noise, self.blur)
        return any(each is not None for each in grey) or bool(self.lowres) or self.sharpness != 1.0


@functools.lru_cache(maxsize=16)
def basis(length: int, points: int) -> np.ndarray:
    """Cubic B-spline weights of `points` inner control points at each of `length` pixels.

    Control points at the border and outside are 0, so that nothing moves there; with displacements up to 0.4 of the
    distance between points, neighbours keep their order (Choi and Lee: 0.48).
    """
    # Two more intervals per side: an inner point's spline is 0 at the border.
    at = (np.arange(length) + 0.5) / length * (points + 3)
    distance = np.abs(at[:, None] - (np.arange(points) + 2))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6
    return np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(np.float32)


def spacing(length: int, points: int) -> float:
    """Distance between the control points of `basis`, in pixels."""
    return length / (points + 3)


def fan_radius(fan: float, edge: int) -> tuple[float, float]:
    """Radius of the probe, and depth of the fan that fills a square image: both in pixels.

    The outermost beams end at the sides, the middle one at the lower edge, and the probe begins at the upper edge.
    """
    last = edge / 2 / math.sin(fan)
    probe = (last - edge) / math.cos(fan)
    return probe, last - probe


@functools.lru_cache(maxsize=2)
def noise_field(edge: int) -> np.ndarray:
    """Standard normal noise, from which windows of `edge` pixels are cut. The same in every process."""
    return np.random.default_rng(0).standard_normal((edge + SLACK, edge + SLACK), dtype=np.float32)


@functools.lru_cache(maxsize=2)
def speckle_field(edge: int) -> np.ndarray:
    """Noise with grains, of mean 0 and deviation 1."""
    from scipy.ndimage import gaussian_filter  # takes a moment to import

    grains = gaussian_filter(np.random.default_rng(1).standard_normal((edge + SLACK,) * 2), GRAIN, mode="wrap")
    return ((grains - grains.mean()) / grains.std()).astype(np.float32)
