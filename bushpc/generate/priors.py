"""Clinical prior → the content of a synthetic scan: attributes, lesion mask, caption (tumor generator 2.2).

    seed, index ─draw→ class, size, echogenicity, boundary ─(6)→ ellipse ─(7)→ mask
                                                           └─ template → caption

The same drawn attributes determine mask and caption, and are stored with the sample. A sample depends only on seed and
index, not on the process or the order of draws. The frame is the generator's square image in pixels, x across and y
down.
"""

from __future__ import annotations

import typing as t

import numpy as np

from bushpc.conditions.captions import CLEAR, HETEROGENEOUS, HOMOGENEOUS, UNCLEAR, caption
from bushpc.dist import keyed_seed
from bushpc.errors import ConfigError
from bushpc.generate.config import ClassPrior, PriorsConfig

# The grid of the deformation's control points has this many intervals across and down the lesion.
INTERVALS = 5
# Maximum displacement of a control point in standard deviations, so that the reach of a lesion is known beforehand.
FARTHEST = 1.5
# Minimum fraction of its area that a deformed pixel keeps. At 0 the field folds and tears the lesion into pieces.
LEAST_AREA = 0.2
# Pixels exactly on the outline belong to the lesion, despite rounding in single precision.
ROUNDING = 1e-6


class Drawn(t.NamedTuple):
    """The content of one synthetic scan.

    attributes: as stored with the sample: size, echogenicity, boundary; the ellipse (6) in pixels of the frame: a, b,
    x0, y0; sigma (7). mask_SS: uint8, 1 inside the lesion.
    """

    label: str
    attributes: dict[str, str | float | None]
    mask_SS: np.ndarray
    caption: str


class Priors:
    """index → `Drawn`, for frames of `size` pixels.

    Raises: ConfigError if the smallest ellipse has no pixels, or the largest lesion can leave the frame.
    """

    def __init__(self, config: PriorsConfig, size: int, seed: int) -> None:
        self.config, self.size, self.seed = config, size, seed
        least, most = (f(bound for bounds in config.sizes_mm.values() for bound in bounds) for f in (min, max))
        for label in ("benign", "malignant"):
            prior: ClassPrior = getattr(config, label)
            longer, shorter = self._semi_axes(least, prior.aspect[1])
            if shorter < 1:
                raise ConfigError(
                    f"priors.sizes_mm: a {label} lesion of {least:g} mm in a frame of {config.frame_mm:g} mm and "
                    f"{size} pixels has zero size (semi-axes of {longer} and {shorter} pixels). Increase that size, "
                    f"lower priors.{label}.aspect or priors.frame_mm, or use a generator of larger images"
                )
            longer, shorter = self._semi_axes(most, prior.aspect[0])
            reach = longer + FARTHEST * prior.sigma[1] * shorter
            if 2 * reach + 1 > size:
                raise ConfigError(
                    f"priors.sizes_mm: a {label} lesion of {most:g} mm, deformed with sigma {prior.sigma[1]:g}, can "
                    f"reach {2 * reach / size * config.frame_mm:.1f} mm, outside a frame of {config.frame_mm:g} mm. "
                    f"Lower the size or priors.{label}.sigma, or increase priors.frame_mm"
                )

    def __call__(self, index: int) -> Drawn:
        rng = np.random.default_rng(keyed_seed(self.seed, "prior", index))
        label = "malignant" if rng.random() < self.config.malignant_share else "benign"
        prior: ClassPrior = getattr(self.config, label)
        size = list(self.config.sizes_mm)[rng.integers(len(self.config.sizes_mm))]
        length_mm, aspect = (_uniform(rng, between) for between in (self.config.sizes_mm[size], prior.aspect))
        longer, shorter = self._semi_axes(length_mm, aspect)
        a, b = (longer, shorter) if label == "benign" else (shorter, longer)  # wider than tall, or taller than wide
        sigma = round(_uniform(rng, prior.sigma), 4)
        heterogeneous, unclear = rng.random() < prior.heterogeneous, rng.random() < prior.unclear
        shape_YX = deformed_ellipse(a, b, sigma, rng)
        rows, down, y0 = self._place(np.asarray(shape_YX.any(axis=1)), b, rng)
        columns, across, x0 = self._place(np.asarray(shape_YX.any(axis=0)), a, rng)
        mask_SS = np.zeros((self.size, self.size), np.uint8)
        mask_SS[down, across] = shape_YX[rows, columns]
        attributes: dict[str, str | float | None] = {
            "size": size,
            "echogenicity": HETEROGENEOUS if heterogeneous else HOMOGENEOUS,
            "boundary": UNCLEAR if unclear else CLEAR,
            **{"a": float(a), "b": float(b), "x0": float(x0), "y0": float(y0), "sigma": sigma},
        }
        return Drawn(label, attributes, mask_SS, caption(label, attributes))

    def _semi_axes(self, length_mm: float, aspect: float) -> tuple[int, int]:
        """The longer and the shorter semi-axis in whole pixels, never equal."""
        longer = length_mm / self.config.frame_mm * self.size / 2
        return round(longer), min(round(longer / aspect), round(longer) - 1)

    def _place(self, filled: np.ndarray, semi_axis: int, rng: np.random.Generator) -> tuple[slice, slice, int]:
        """Along one axis: the filled part of a shape, its place in the frame, and its centre there.

        The centre is drawn so that (6) allows it and the deformed outline stays inside the frame.
        """
        first, last = np.flatnonzero(filled)[[0, -1]].tolist()
        before, after = len(filled) // 2 - first, last - len(filled) // 2
        centre = int(rng.integers(max(semi_axis, before), self.size - max(semi_axis, after + 1), endpoint=True))
        return slice(first, last + 1), slice(centre - before, centre + after + 1), centre


def _uniform(rng: np.random.Generator, between: tuple[float, ...]) -> float:
    low, high = between
    return float(rng.uniform(low, high))


def deformed_ellipse(a: int, b: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """An ellipse (6) with semi-axes a across and b down, elastically deformed (7): bool, centred in the array.

    The displacement field is a uniform cubic B-spline. Its control points are displaced by normal draws with a standard
    deviation of sigma times the shorter semi-axis, so the shape does not depend on the lesion's size. The paper
    describes the effect of sigma, but gives neither its unit nor the grid. A field that folds is damped until it does
    not.
    """
    deviation = sigma * min(a, b)
    moves = deviation * np.clip(rng.standard_normal((2, *[len(PLACES)] * 2)), -FARTHEST, FARTHEST)
    y, x = (int(np.ceil(semi_axis + FARTHEST * deviation)) for semi_axis in (b, a))
    spacing_y, spacing_x = 2 * y / INTERVALS, 2 * x / INTERVALS
    while _areas(moves[0] / spacing_y, moves[1] / spacing_x, spacing_y / spacing_x).min() < LEAST_AREA:
        moves *= 0.8
    # Source positions of the pixels, in semi-axes: the spline through the undisplaced control points is the identity.
    weights_Y, weights_X = (_spline(np.linspace(0, INTERVALS, 2 * edge + 1)) for edge in (y, x))
    from_y = weights_Y @ ((PLACES[:, None] * spacing_y + moves[0]) / b).astype(np.float32) @ weights_X.T
    from_x = weights_Y @ ((PLACES[None, :] * spacing_x + moves[1]) / a).astype(np.float32) @ weights_X.T
    return np.asarray(from_x * from_x + from_y * from_y <= 1 + ROUNDING)


def _spline(t: np.ndarray, derivative: bool = False) -> np.ndarray:
    """Weights of a uniform cubic B-spline's control points at `t`, 0 to INTERVALS: float32, (len(t), points)."""
    interval = np.minimum(t.astype(int), INTERVALS - 1)
    u = t - interval
    if derivative:
        parts = [-((1 - u) ** 2) / 2, (3 * u - 4) * u / 2, (1 + 2 * u - 3 * u * u) / 2, u * u / 2]
    else:
        u2, u3 = u * u, u * u * u
        parts = [(1 - u) ** 3 / 6, (3 * u3 - 6 * u2 + 4) / 6, (1 + 3 * (u + u2 - u3)) / 6, u3 / 6]
    weights = np.zeros((len(t), INTERVALS + 3), np.float32)
    weights[np.arange(len(t))[:, None], interval[:, None] + np.arange(4)] = np.stack(parts, axis=1)
    return weights


# Positions of the control points, in intervals from the lesion's centre; the outermost ones lie outside the lesion.
PLACES = np.arange(-1.0, INTERVALS + 2) - INTERVALS / 2
_SAMPLES = np.linspace(0, INTERVALS, 4 * INTERVALS + 1)
_VALUE, _SLOPE = _spline(_SAMPLES), _spline(_SAMPLES, derivative=True)


def _areas(moves_y: np.ndarray, moves_x: np.ndarray, ratio: float) -> np.ndarray:
    """Determinant of the deformation's Jacobian at sample points over the lesion.

    moves_y, moves_x: displacements of the control points in units of their spacing down and across. ratio: spacing down
    over spacing across.
    """
    yy, yx = _SLOPE @ moves_y @ _VALUE.T, _VALUE @ moves_y @ _SLOPE.T * ratio
    xy, xx = _SLOPE @ moves_x @ _VALUE.T / ratio, _VALUE @ moves_x @ _SLOPE.T
    return np.asarray((1 + yy) * (1 + xx) - yx * xy)
