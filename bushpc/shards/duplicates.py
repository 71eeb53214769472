"""Which images are the same picture, though re-encoded, resized, brightened, mirrored or cropped a little.

    image → look (a small picture, a digest) → pairs with near hashes → those whose pixels correlate → groups

The hash says where to look and the correlation decides, on the local contrast of small pictures: what all ultrasound
images share (bright skin above, darkness below) is taken out of it. On BrEaST and the BUS-BRA excerpt, 65,341 pairs of
different images, no pair of two patients correlates by more than 0.62 when laid over each other as well as can be, and
no pair of one patient by more than 0.71; copies that were re-encoded, halved, brightened or cropped by up to 4 % a side
correlate by 0.92 and more, by 0.90 and more where all of that meets.
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

EDGE = 64  # of a small picture, in pixels
# Hashes of copies differ by up to 10 of 64 bits, by 16 where several changes meet. Of unrelated pairs one in 1,000 is
# that near, few enough to compare each.
MOST_BITS = 16
# Half-way between the most alike of unrelated images and the least alike of copies, nearer to the latter: a false
# pair is looked at in vain, and its two patients share a fold.
LEAST_CORRELATION = 0.85

_HASHED_EDGE = 32
_HASH_EDGE = 8
_SMOOTH, _LOCAL = 0.7, 6.0  # standard deviations of Gaussians, in pixels of a small picture
_DARK = 2.0  # grey levels: contrast below it is the noise of an empty region
_WORTH_ALIGNING = 0.35  # correlation as they lie: copies cropped by 4 % a side have 0.59 and more
_ROOM = 0.12  # of an edge: how far a copy may be shifted, and by half as much again a side stretched
_ROWS = 512  # images in one step, which bounds the memory
# What many copies of one picture would cost: in a group so large, pairs that only an alignment would tell are left out,
# and two groups are two pictures once so many alignments between them have failed.
_WHOLE_GROUP, _MOST_FAILURES = 8, 8


class Look(t.NamedTuple):
    """What of an image is kept to compare it.

    digest: of its pixels and size. small_HW: uint8, EDGE x EDGE, grey.
    """

    digest: bytes
    small_HW: np.ndarray


class Pair(t.NamedTuple):
    """Two images, by position, the first before the second, that are the same picture.

    identical: pixel by pixel. mirrored: left to right. correlation: of their local contrast, 1 if identical.
    """

    first: int
    second: int
    identical: bool
    mirrored: bool
    correlation: float


def look_at(image_HWC: np.ndarray) -> Look:
    """The look of a uint8 image with any number of channels; squeezed to a square, so that stretching is forgiven."""
    digest = hashlib.sha256(repr(image_HWC.shape).encode() + image_HWC.tobytes()).digest()
    channels = (Image.fromarray(image_HWC[..., channel]) for channel in range(image_HWC.shape[2]))
    small = [np.asarray(channel.resize((EDGE, EDGE), Image.Resampling.BILINEAR)) for channel in channels]
    return Look(digest, np.mean(small, axis=0).round().astype(np.uint8))


def perceptual_hash(small_NHW: np.ndarray) -> np.ndarray:
    """uint64 for each small picture: whether each of its lowest 8 x 8 cosine terms is above their median.

    The "pHash" of Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010.
    """
    step = EDGE // _HASHED_EDGE
    coarse = small_NHW.reshape(-1, _HASHED_EDGE, step, _HASHED_EDGE, step).mean(axis=(2, 4))
    terms = fft.dctn(coarse, axes=(1, 2), norm="ortho")[:, :_HASH_EDGE, :_HASH_EDGE].reshape(len(coarse), -1)
    above = terms > np.median(terms[:, 1:], axis=1, keepdims=True)  # the first term is the mean brightness
    return np.packbits(above, axis=1).view(np.uint64)[:, 0]


def find_pairs(
    looks: Sequence[Look],
    *,
    most_bits: int = MOST_BITS,
    least_correlation: float = LEAST_CORRELATION,
) -> list[Pair]:
    """The pairs that are the same picture, in the order of positions. Constant images are no picture.

    They are all pairs, but for groups of more than 8 pictures: there each picture is in a pair, and the pairs hang
    together, so `group` finds the whole group, and where it straddles folds or labels a pair does, too.

    most_bits: by how many of 64 bits the hashes of a pair may differ to be compared at all.
    least_correlation: from which correlation on it counts.
    """
    if not looks:
        return []
    small_NHW = np.stack([look.small_HW for look in looks])
    upright_NHW = local_contrast(small_NHW)
    is_picture = small_NHW.min(axis=(1, 2)) < small_NHW.max(axis=(1, 2))
    found = {(i, j): Pair(i, j, True, False, 1.0) for i, j in _identical(looks) if is_picture[i]}
    hashes, mirrored_hashes = perceptual_hash(small_NHW), perceptual_hash(small_NHW[:, :, ::-1])
    candidates = [
        (mirrored, first, second)
        for mirrored, others in ((False, hashes), (True, mirrored_hashes))
        for first, second in _near(hashes, others, is_picture, most_bits)
    ]
    unsure = []
    for mirrored, firsts, seconds in candidates:
        others_NHW = upright_NHW[:, :, ::-1] if mirrored else upright_NHW
        as_they_lie = np.einsum("nhw,nhw->n", upright_NHW[firsts], others_NHW[seconds])
        for i, j, correlation in zip(firsts.tolist(), seconds.tolist(), as_they_lie.tolist(), strict=True):
            known = found.get((i, j))
            correlation = round(min(correlation, 1.0), 4)  # of identical ones it may come out a little above 1
            if correlation >= least_correlation and (known is None or known.correlation < correlation):
                found[i, j] = Pair(i, j, False, mirrored, correlation)
            elif _WORTH_ALIGNING <= correlation < least_correlation:
                unsure.append((correlation, i, j, mirrored))
    groups = _Groups(len(looks), found)
    for _, i, j, mirrored in sorted(unsure, reverse=True):  # the likeliest first, which makes the groups early
        if (i, j) in found or not groups.worth_aligning(i, j):
            continue
        other_HW = upright_NHW[j, :, ::-1] if mirrored else upright_NHW[j]
        correlation = aligned_correlation(upright_NHW[i], other_HW)
        if correlation >= least_correlation:
            found[i, j] = Pair(i, j, False, mirrored, round(min(correlation, 1.0), 4))
            groups.join(i, j)
        else:
            groups.failed(i, j)
    return sorted(found.values())


class _Groups:
    """Pictures that are known to be the same, while more are found; it says which pairs are left to align."""

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
        """The groups of two pictures, the smaller number first; a group's number is that of one of its pictures."""
        i, j = (self._top(one) for one in (i, j))
        return min(i, j), max(i, j)

    def _top(self, i: int) -> int:
        while self._above[i] != i:
            self._above[i] = i = self._above[self._above[i]]
        return i


def group(count: int, pairs: Sequence[Pair]) -> list[int]:
    """The number of the group that each of `count` images is in: a copy of a copy is of the same group."""
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    links = sparse.coo_array((np.ones(len(pairs)), (first, second)), shape=(count, count))
    return sparse.csgraph.connected_components(links, directed=False)[1].tolist()


def tie_patients(records: Sequence[Record], pairs: Sequence[Pair]) -> list[Record]:
    """The records as `make_folds` shall see them: patients who share a picture count as one patient.

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
    """Correlation of two local contrasts where they overlap, the second shifted and stretched to fit the first.

    Shift and stretch by Gauss-Newton steps on the squared difference (Lucas and Kanade, 1981; Baker and Matthews,
    2004), first on blurred pictures, which have a wider basin.
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
            ridge = 1e-6 * np.trace(normal) + 1e-12  # a picture of stripes says nothing of shifts along them
            step = np.linalg.solve(normal + ridge * np.eye(4), slopes.T @ (target_HW - moved_HW).ravel())
            stretch = np.clip(stretch + step[:2], 1 - 1.5 * _ROOM, 1 + 1.5 * _ROOM)
            shift = np.clip(shift + step[2:], -_ROOM * EDGE, _ROOM * EDGE)
            if np.abs(step * (EDGE, EDGE, 1, 1)).max() < 0.02:  # of a pixel
                break
    inside = []
    for axis in (0, 1):
        place = (np.arange(EDGE) - middle) * stretch[axis] + middle + shift[axis]
        inside.append(np.flatnonzero((place >= 0) & (place <= EDGE - 1)))
    overlap = np.ix_(*inside)
    one, other = _unit(one_HW[overlap].ravel()), _unit(_moved(other_HW, stretch, shift)[overlap].ravel())
    return float(one @ other)


def _moved(picture_HW: np.ndarray, stretch: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The picture read at (place - middle) * stretch + middle + shift."""
    middle = (EDGE - 1) / 2
    return ndimage.affine_transform(picture_HW, stretch, middle - stretch * middle + shift, order=1, mode="nearest")


def local_contrast(small_NHW: np.ndarray) -> np.ndarray:
    """float32: detail over its local standard deviation, as vectors of length 1; zero for a constant picture."""
    contrast_NHW = np.empty(small_NHW.shape, np.float32)
    for start in range(0, len(small_NHW), _ROWS):
        part = small_NHW[start : start + _ROWS].astype(np.float32)
        detail = _blurred(part, _SMOOTH) - _blurred(part, _LOCAL)
        part = detail / (np.sqrt(_blurred(detail**2, _LOCAL)) + _DARK)
        contrast_NHW[start : start + _ROWS] = _unit(part.reshape(len(part), -1)).reshape(part.shape)
    return contrast_NHW


def _blurred(pictures_NHW: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(pictures_NHW, (0, sigma, sigma))


def _unit(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(axis=-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-9)


def _identical(looks: Sequence[Look]) -> t.Iterator[tuple[int, int]]:
    same: dict[bytes, list[int]] = {}
    for position, look in enumerate(looks):
        earlier = same.setdefault(look.digest, [])
        yield from ((first, position) for first in earlier)
        earlier.append(position)


def _near(
    hashes: np.ndarray, others: np.ndarray, is_picture: np.ndarray, most_bits: int
) -> t.Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions i < j of pictures with hashes[i] near others[j], in parts."""
    pictures = np.flatnonzero(is_picture)
    for start in range(0, len(pictures), _ROWS):
        differing = np.bitwise_count(hashes[pictures[start : start + _ROWS], None] ^ others[None, pictures])
        first, second = np.nonzero(differing <= most_bits)
        ordered = start + first < second
        first, second = pictures[start + first[ordered]], pictures[second[ordered]]
        for part in range(0, len(first), _ROWS):
            yield first[part : part + _ROWS], second[part : part + _ROWS]
