"""Find images that are the same picture, even if re-encoded, resized, brightened, mirrored, cropped or marked.

    image → fingerprint (thumbnail, digest) → pairs with similar hashes, or of which one looks like a part of the other
    → those whose pixels correlate after alignment → groups

Local contrast removes what all ultrasound images share (bright skin above, darkness below). Copies that keep their
frame are found by perceptual hashes. A copy that was cropped on one or two sides looks, at 16 x 16, like one of 37
windows of its original; all images are compared with all windows, upright and mirrored, by matrix products. The
correlation of the aligned thumbnails decides.

On BUS-BRA (1,756,875 pairs), no pair of different pictures from two patients correlates by more than 0.68 after the
best alignment, and the copies known there by at least 0.90. benchmarks/2026-11-30_duplicates has recall by kind of
change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing as t
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import fft, ndimage, sparse

from bushpc.shards.manifest import Record
from bushpc.shards.windows import EDGE, ROWS, likely_parts, unit

# Hashes of copies differ by up to 10 of 64 bits, and by up to 16 after several changes. One in 1,000 unrelated pairs is
# that close, few enough to compare them all.
MOST_BITS = 16
# Between the most similar different images and the least similar copies, closer to the copies: a false pair wastes a
# reviewer's time and forces two patients into one fold. Images of one lesion a moment apart reach 0.85.
LEAST_CORRELATION = 0.85

_HASHED_EDGE = 32
_HASH_EDGE = 8
_SMOOTH, _LOCAL = 0.7, 6.0  # standard deviations of Gaussians, in pixels of a thumbnail
_DARK = 2.0  # grey levels: lower contrast is the noise of an empty region
# Correlation before alignment. Copies have at least 0.44, unless several changes are combined.
_WORTH_ALIGNING = 0.42
_ROOM = 0.12  # maximum shift of a copy as a share of an edge; the maximum stretch is 1.5 times that
# Limits the cost of many copies of one picture: pairs inside a group larger than this are no longer aligned, and two
# groups count as different pictures once this many alignments between them have failed.
_WHOLE_GROUP, _MOST_FAILURES = 8, 8


class Fingerprint(t.NamedTuple):
    """What is kept of an image for comparison.

    digest: SHA-256 of its pixels and size. small_HW: a grey thumbnail, uint8, EDGE x EDGE.
    """

    digest: bytes
    small_HW: np.ndarray


class Pair(t.NamedTuple):
    """Two images that are the same picture, by position; first < second.

    identical: in every pixel. mirrored: left to right. correlation: of their local contrast, 1 if identical.
    """

    first: int
    second: int
    identical: bool
    mirrored: bool
    correlation: float


def fingerprint_of(image_HWC: np.ndarray) -> Fingerprint:
    """The fingerprint of a uint8 image with any number of channels. The square thumbnail makes stretching harmless."""
    digest = hashlib.sha256(repr(image_HWC.shape).encode() + image_HWC.tobytes()).digest()
    channels = (Image.fromarray(image_HWC[..., channel]) for channel in range(image_HWC.shape[2]))
    small = [np.asarray(channel.resize((EDGE, EDGE), Image.Resampling.BILINEAR)) for channel in channels]
    return Fingerprint(digest, np.mean(small, axis=0).round().astype(np.uint8))


def perceptual_hash(small_NHW: np.ndarray) -> np.ndarray:
    """One uint64 per thumbnail; each bit says whether one of the lowest 8 x 8 cosine terms is above their median.

    This is "pHash" (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010).
    """
    step = EDGE // _HASHED_EDGE
    coarse = small_NHW.reshape(-1, _HASHED_EDGE, step, _HASHED_EDGE, step).mean(axis=(2, 4))
    terms = fft.dctn(coarse, axes=(1, 2), norm="ortho")[:, :_HASH_EDGE, :_HASH_EDGE].reshape(len(coarse), -1)
    above = terms > np.median(terms[:, 1:], axis=1, keepdims=True)  # the first term is the mean brightness
    return np.packbits(above, axis=1).view(np.uint64)[:, 0]


def find_pairs(
    fingerprints: Sequence[Fingerprint],
    *,
    most_bits: int = MOST_BITS,
    least_correlation: float = LEAST_CORRELATION,
) -> list[Pair]:
    """The pairs that are the same picture, sorted by position. Constant images are never paired.

    All pairs are returned, except in groups of more than 8 images. There, every image is in a pair and the pairs
    connect the group, so `group` finds all of it; if the group spans several folds or labels, so does at least one
    pair.

    most_bits: pairs whose hashes differ by more of their 64 bits are compared only if one looks like a part of the
        other.
    least_correlation: minimum correlation of a pair.
    """
    if not fingerprints:
        return []
    small_NHW = np.stack([fingerprint.small_HW for fingerprint in fingerprints])
    upright_NHW = local_contrast(small_NHW)
    is_picture = small_NHW.min(axis=(1, 2)) < small_NHW.max(axis=(1, 2))
    found = {(i, j): Pair(i, j, True, False, 1.0) for i, j in _identical(fingerprints) if is_picture[i]}
    hashes, mirrored_hashes = perceptual_hash(small_NHW), perceptual_hash(small_NHW[:, :, ::-1])
    candidates = [
        (mirrored, first, second)
        for mirrored, others in ((False, hashes), (True, mirrored_hashes))
        for first, second in _near(hashes, others, is_picture, most_bits)
    ]
    for mirrored, firsts, seconds in candidates:
        others_NHW = upright_NHW[:, :, ::-1] if mirrored else upright_NHW
        unaligned = np.einsum("nhw,nhw->n", upright_NHW[firsts], others_NHW[seconds])
        for i, j, correlation in zip(firsts.tolist(), seconds.tolist(), unaligned.tolist(), strict=True):
            known = found.get((i, j))
            correlation = round(min(correlation, 1.0), 4)  # rounding can put identical images slightly above 1
            if correlation >= least_correlation and (known is None or known.correlation < correlation):
                found[i, j] = Pair(i, j, False, mirrored, correlation)
    groups = _Groups(len(fingerprints), found)
    for part in likely_parts(upright_NHW, is_picture):  # the likeliest first, so that groups form early
        pair = (min(part.copy, part.original), max(part.copy, part.original))
        if pair in found or not groups.worth_aligning(*pair):
            continue
        copy_HW, window_HW = upright_NHW[part.copy], part.window_of(upright_NHW)
        correlation = float(np.vdot(copy_HW, window_HW))
        if _WORTH_ALIGNING <= correlation < least_correlation:
            correlation = aligned_correlation(copy_HW, window_HW)
        if correlation >= least_correlation:
            found[pair] = Pair(*pair, False, part.mirrored, round(min(correlation, 1.0), 4))
            groups.join(*pair)
        else:
            groups.failed(*pair)
    return sorted(found.values())


class _Groups:
    """Union-find over the pairs found so far; decides which pairs are still worth aligning."""

    def __init__(self, count: int, pairs: t.Iterable[tuple[int, int]]) -> None:
        self._above, self._size = list(range(count)), [1] * count
        self._failures: Counter[tuple[int, int]] = Counter()
        for i, j in pairs:
            self.join(i, j)

    def join(self, i: int, j: int) -> None:
        i, j = self._of(i, j)
        if i != j:
            self._above[j] = i
            self._size[i] += self._size[j]

    def failed(self, i: int, j: int) -> None:
        self._failures[self._of(i, j)] += 1

    def worth_aligning(self, i: int, j: int) -> bool:
        i, j = self._of(i, j)
        return self._size[i] <= _WHOLE_GROUP if i == j else self._failures[i, j] < _MOST_FAILURES

    def _of(self, i: int, j: int) -> tuple[int, int]:
        """The groups of two pictures, sorted; a group is numbered by one of its pictures."""
        i, j = (self._top(one) for one in (i, j))
        return min(i, j), max(i, j)

    def _top(self, i: int) -> int:
        while self._above[i] != i:
            self._above[i] = i = self._above[self._above[i]]
        return i


def group(count: int, pairs: Sequence[Pair]) -> list[int]:
    """The group number of each of `count` images; a copy of a copy belongs to the same group."""
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    links = sparse.coo_array((np.ones(len(pairs)), (first, second)), shape=(count, count))
    return sparse.csgraph.connected_components(links, directed=False)[1].tolist()


def tie_patients(records: Sequence[Record], pairs: Sequence[Pair]) -> list[Record]:
    """The records for `make_folds`, with patients who share a picture merged into one patient.

    pairs: by position in `records`.
    """
    patients = sorted({record.patient for record in records})
    number = {patient: position for position, patient in enumerate(patients)}
    shared = [
        pair._replace(first=number[records[pair.first].patient], second=number[records[pair.second].patient])
        for pair in pairs
    ]
    groups = group(len(patients), shared)
    named: dict[int, str] = {}
    for patient in patients:
        named.setdefault(groups[number[patient]], patient)
    return [dataclasses.replace(record, patient=named[groups[number[record.patient]]]) for record in records]


def aligned_correlation(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    """Correlation of two local contrasts in their overlap, after shifting and stretching the second to fit the first.

    Gauss-Newton steps on the squared difference find shift and stretch (Lucas and Kanade, 1981; Baker and Matthews,
    2004), first on strongly blurred pictures, which have a wider basin of convergence.
    """
    middle = (EDGE - 1) / 2
    row_HW, column_HW = np.mgrid[:EDGE, :EDGE] - middle
    stretch, shift = np.ones(2), np.zeros(2)
    for blur in (2.0, 1.0):
        target_HW, source_HW = ndimage.gaussian_filter(one_HW, blur), ndimage.gaussian_filter(other_HW, blur)
        for _ in range(8):
            moved_HW = _moved(source_HW, stretch, shift)
            down_HW, right_HW = np.gradient(moved_HW)
            down_HW, right_HW = down_HW / stretch[0], right_HW / stretch[1]
            slopes = np.stack([down_HW * row_HW, right_HW * column_HW, down_HW, right_HW], axis=-1).reshape(-1, 4)
            normal = slopes.T @ slopes
            ridge = 1e-6 * np.trace(normal) + 1e-12  # stripes don't determine the shift along them
            step = np.linalg.solve(normal + ridge * np.eye(4), slopes.T @ (target_HW - moved_HW).ravel())
            stretch = np.clip(stretch + step[:2], 1 - 1.5 * _ROOM, 1 + 1.5 * _ROOM)
            shift = np.clip(shift + step[2:], -_ROOM * EDGE, _ROOM * EDGE)
            if np.abs(step * (EDGE, EDGE, 1, 1)).max() < 0.02:  # pixels
                break
    inside = []
    for axis in (0, 1):
        place = (np.arange(EDGE) - middle) * stretch[axis] + middle + shift[axis]
        inside.append(np.flatnonzero((place >= 0) & (place <= EDGE - 1)))
    overlap = np.ix_(*inside)
    one, other = unit(one_HW[overlap].ravel()), unit(_moved(other_HW, stretch, shift)[overlap].ravel())
    return float(one @ other)


def _moved(picture_HW: np.ndarray, stretch: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The picture sampled at (place - middle) * stretch + middle + shift."""
    middle = (EDGE - 1) / 2
    return ndimage.affine_transform(picture_HW, stretch, middle - stretch * middle + shift, order=1, mode="nearest")


def local_contrast(small_NHW: np.ndarray) -> np.ndarray:
    """float32: detail over its local standard deviation, normalized to unit length; zero for a constant picture."""
    contrast_NHW = np.empty(small_NHW.shape, np.float32)
    for start in range(0, len(small_NHW), ROWS):
        part = small_NHW[start : start + ROWS].astype(np.float32)
        detail = _blurred(part, _SMOOTH) - _blurred(part, _LOCAL)
        part = detail / (np.sqrt(_blurred(detail**2, _LOCAL)) + _DARK)
        contrast_NHW[start : start + ROWS] = unit(part.reshape(len(part), -1)).reshape(part.shape)
    return contrast_NHW


def _blurred(pictures_NHW: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(pictures_NHW, (0, sigma, sigma))


def _identical(fingerprints: Sequence[Fingerprint]) -> t.Iterator[tuple[int, int]]:
    same: dict[bytes, list[int]] = {}
    for position, fingerprint in enumerate(fingerprints):
        earlier = same.setdefault(fingerprint.digest, [])
        yield from ((first, position) for first in earlier)
        earlier.append(position)


def _near(
    hashes: np.ndarray, others: np.ndarray, is_picture: np.ndarray, most_bits: int
) -> t.Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions i < j of pictures with hashes[i] near others[j], in chunks."""
    pictures = np.flatnonzero(is_picture)
    for start in range(0, len(pictures), ROWS):
        differing = np.bitwise_count(hashes[pictures[start : start + ROWS], None] ^ others[None, pictures])
        first, second = np.nonzero(differing <= most_bits)
        ordered = start + first < second
        first, second = pictures[start + first[ordered]], pictures[second[ordered]]
        for part in range(0, len(first), ROWS):
            yield first[part : part + ROWS], second[part : part + ROWS]
