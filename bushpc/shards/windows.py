"""Pairs of pictures of which one looks like a part of the other: a step of `bushpc.shards.duplicates`.

local contrasts of all pictures → each picture's windows, 16 x 16 → matrix products → likely copies of originals
"""

from __future__ import annotations

import typing as t

import numpy as np

EDGE = 64  # edge of a thumbnail in pixels
ROWS = 512  # images per step; limits the memory
_COARSE = 16  # edge of the pictures that are compared with windows of others
# Correlation with the likeliest window. Copies have at least 0.69, unless several changes are combined; one in 7,000
# unrelated pairs of BUS-BRA has 0.65.
_LIKELY = 0.65
_MOST_LIKELY = 64  # candidates per image: neighbouring slices of a volume look like hundreds of others


class Window(t.NamedTuple):
    """A part of a picture, its edges as shares of the sides."""

    left: float = 0
    right: float = 1
    top: float = 0
    bottom: float = 1

    def of(self, contrast_NHW: np.ndarray, edge: int) -> np.ndarray:
        """The part of each picture, averaged to (N, edge, edge) and normalized to unit length."""
        part_NHW = _averages(self.top, self.bottom, edge) @ contrast_NHW @ _averages(self.left, self.right, edge).T
        return unit(part_NHW.reshape(len(part_NHW), -1)).reshape(part_NHW.shape)


def _windows() -> list[Window]:
    """What is left of a picture after a crop of up to 35 % on one side, or 25 % on two."""
    one_side = [
        window
        for cut in (0.08, 0.16, 0.24, 0.32)
        for window in (Window(left=cut), Window(right=1 - cut), Window(top=cut), Window(bottom=1 - cut))
    ]
    corners = [
        Window(**{side: a if side == "left" else 1 - a}, **{edge: b if edge == "top" else 1 - b})
        for a in (0.1, 0.2)
        for b in (0.1, 0.2)
        for side in ("left", "right")
        for edge in ("top", "bottom")
    ]
    opposite = [
        window for cut in (0.08, 0.16) for window in (Window(left=cut, right=1 - cut), Window(top=cut, bottom=1 - cut))
    ]
    return [Window(), *one_side, *corners, *opposite]


WINDOWS = _windows()


class Part(t.NamedTuple):
    """The picture `copy` looks like a window of `original`. score: correlation at 16 x 16."""

    score: float
    copy: int
    original: int
    window: Window
    mirrored: bool

    def window_of(self, contrast_NHW: np.ndarray) -> np.ndarray:
        """What the copy looks like, from the original."""
        [window_HW] = self.window.of(contrast_NHW[self.original][None], EDGE)
        return window_HW[:, ::-1] if self.mirrored else window_HW


def likely_parts(contrast_NHW: np.ndarray, is_picture: np.ndarray) -> list[Part]:
    """Likely pairs of a copy and its original, the likeliest first; one for each two pictures."""
    pictures = np.flatnonzero(is_picture)
    if not len(pictures):
        return []
    windows = [window.of(contrast_NHW[pictures], _COARSE).reshape(len(pictures), -1) for window in WINDOWS]
    likely: dict[tuple[int, int], Part] = {}
    for start in range(0, len(pictures), ROWS):
        rows = slice(start, start + ROWS)
        whole = windows[0][rows]
        flipped = whole.reshape(-1, _COARSE, _COARSE)[:, :, ::-1].reshape(whole.shape)
        best = np.full((len(whole), len(pictures)), _LIKELY, np.float32)
        which = np.full(best.shape, -1, np.int16)
        for number, (picture, window) in enumerate((p, w) for p in (whole, flipped) for w in windows):
            score = picture @ window.T
            better = score > best
            best[better], which[better] = score[better], number
        np.put_along_axis(which, start + np.arange(len(whole))[:, None], -1, axis=1)  # a picture with itself
        crowded = np.flatnonzero((which >= 0).sum(axis=1) > _MOST_LIKELY)
        for each in crowded:
            which[each, np.argsort(best[each])[:-_MOST_LIKELY]] = -1
        for row, column in np.argwhere(which >= 0).tolist():
            mirrored, number = divmod(int(which[row, column]), len(windows))
            copy, original = int(pictures[start + row]), int(pictures[column])
            part = Part(float(best[row, column]), copy, original, WINDOWS[number], bool(mirrored))
            key = (min(copy, original), max(copy, original))
            if key not in likely or likely[key].score < part.score:
                likely[key] = part
    return sorted(likely.values(), key=lambda part: (-part.score, part.copy, part.original))


def _averages(low: float, high: float, edge: int) -> np.ndarray:
    """(edge, EDGE): each row averages an equal share of the pixels between two places."""
    bounds = np.linspace(low * EDGE, high * EDGE, edge + 1)[:, None]
    pixels = np.arange(EDGE)
    overlap = np.minimum(bounds[1:], pixels + 1) - np.maximum(bounds[:-1], pixels)
    weights = overlap.clip(0).astype(np.float32)
    return weights / weights.sum(axis=1, keepdims=True)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Without their mean, and of length 1; their products are then correlations."""
    centred = vectors - vectors.mean(axis=-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-9)
