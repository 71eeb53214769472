"""Affine maps of the plane as six numbers: (x, y) → (a x + b y + c, d x + e y + f). Faster than arrays this small."""

from __future__ import annotations

import typing as t


class Affine(t.NamedTuple):
    """(x, y) → (a x + b y + c, d x + e y + f)."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def after(self, first: Affine) -> Affine:
        """`first`, then this one."""
        a, b, c, d, e, f = self
        return Affine(
            a * first.a + b * first.d,
            a * first.b + b * first.e,
            a * first.c + b * first.f + c,
            d * first.a + e * first.d,
            d * first.b + e * first.e,
            d * first.c + e * first.f + f,
        )

    @property
    def inverse(self) -> Affine:
        """Back. Flips and shifts stay exact."""
        a, b, c, d, e, f = self
        size = a * e - b * d
        a, b, d, e = e / size, -b / size, -d / size, a / size
        return Affine(a, b, -(a * c + b * f), d, e, -(d * c + e * f))


IDENTITY = Affine(1, 0, 0, 0, 1, 0)


def about(x: float, y: float, a: float, b: float, d: float, e: float) -> Affine:
    """A linear map that leaves (x, y) where it is."""
    return Affine(a, b, x - a * x - b * y, d, e, y - d * x - e * y)


def shift(x: float, y: float) -> Affine:
    """A translation."""
    return Affine(1, 0, x, 0, 1, y)
