"""Topological loss: W₁ between the persistence diagrams of two batches of maps, with gradients at critical pixels.

two predictions of one mask (models/vit_diffusion.py) → diagrams and their matching, on CPU threads → Losses

The ViT-diffusion paper's (9) leaves some choices open. We use:

- Superlevel sets. As the threshold falls, a component is born at its most probable pixel and dies when it meets an
  older one; a hole is born when its rim closes and dies at its least probable pixel. Dimension 0 counts components
  and dimension 1 holes, the "flickering components or holes" of the paper. (With sublevel sets, a lesion would be a
  hole of the background.) As in gudhi's complexes of top-dimensional cells, foreground pixels connect at corners and
  background pixels do not.
- The ground metric L∞, as in the stability theorem of persistence and by default in gudhi.wasserstein.
- The component that never dies (the essential class; every map has one) is matched with that of the other map, at the
  difference of their births, which are the two maxima; gudhi.wasserstein does the same. It is given no finite death.

In the coordinates m = (birth + death) / 2 and h = |birth - death| / 2, the L∞ distance of two points is
|m - m'| + |h - h'|, and the distance to the diagonal is h. `bushpc.losses.matching` finds the cheapest matching:
exactly up to a thousand points in each diagram, and nearly so for more.

The time depends on the number of points. A smooth 256 x 256 prediction has about a hundred, and a pair takes
milliseconds; pixel noise has 6,000, which takes seconds on one core. With downsample=4 the same noise has 700 and
takes 0.06 s.
"""

from __future__ import annotations

import functools
import typing as t
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bushpc.errors import BushpcWarning, ConfigError, TrainingError
from bushpc.losses.matching import match

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.int64]
Slopes = list[tuple[npt.ArrayLike, npt.ArrayLike]]  # pixels, and the loss's derivative by the value of each

# From about this number of points in each of two diagrams, a pair of maps takes a second and more.
MANY_POINTS = 5000

# A float64 has 29 bits more in its significand than a float32.
SPARE_BITS = (1 << 29) - 1


def topological_loss(
    a_BKHW: torch.Tensor,
    b_BKHW: torch.Tensor,
    *,
    min_persistence: float = 0.0,
    downsample: int = 1,
) -> torch.Tensor:
    """L_topo of the ViT-diffusion paper's (9), per sample and class: W₁ in dimension 0 plus W₁ in dimension 1.

    a_BKHW, b_BKHW: maps on the same scale, such as probabilities, any floating type; compared in float32.
    min_persistence: points with birth - death ≤ this are removed from both diagrams; in the maps' unit.
    downsample: average squares of this side, in pixels, before computing the diagrams; 1 for none.
    Returns (B, K), float32, ≥ 0. Gradients flow into the inputs that require them, at the pixels where classes are born
    and die (ties are always resolved in the same way). Pass `b.detach()` to get them for `a` only.
    Raises: TrainingError for different shapes and for maps with NaN or infinite values, ConfigError for a setting out
    of range.
    """
    return start_topological_loss(a_BKHW, b_BKHW, min_persistence=min_persistence, downsample=downsample).loss()


def start_topological_loss(
    a_BKHW: torch.Tensor,
    b_BKHW: torch.Tensor,
    *,
    min_persistence: float = 0.0,
    downsample: int = 1,
) -> PendingLoss:
    """Start `topological_loss` and return at once, even if a GPU is still computing the maps.

    `torch.get_num_threads()` extra threads do the work, without the GIL and without waiting for other work on the GPU;
    code between this call and `loss()` overlaps with it.
    """
    if a_BKHW.shape != b_BKHW.shape or a_BKHW.ndim != 4:
        raise TrainingError(
            f"The topological loss was given maps of shapes {tuple(a_BKHW.shape)} and {tuple(b_BKHW.shape)}; both must "
            "have the same (B, K, H, W). Pass two predictions of the same batch."
        )
    if not min_persistence >= 0:
        raise ConfigError(f"min_persistence = {min_persistence}; it must be ≥ 0 (0 counts every point).")
    if downsample < 1:
        raise ConfigError(f"downsample = {downsample}; it must be ≥ 1 (1 for no downsampling).")
    a_BKHW, b_BKHW = _reduced(a_BKHW, downsample), _reduced(b_BKHW, downsample)
    a_host, b_host, ready = _on_host(a_BKHW, b_BKHW)
    pool = _pool(torch.get_num_threads())
    jobs = [
        pool.submit(_compare, a_host[i, k].numpy(), b_host[i, k].numpy(), min_persistence, ready, (i, k))
        for i in range(a_host.shape[0])
        for k in range(a_host.shape[1])
    ]
    return PendingLoss(a_BKHW, b_BKHW, jobs)


@dataclass(frozen=True)
class PendingLoss:
    """A topological loss that CPU threads are computing."""

    a_BKHW: torch.Tensor
    b_BKHW: torch.Tensor
    jobs: list[Future[Comparison]]

    def loss(self) -> torch.Tensor:
        """Wait for the threads; returns the result of `topological_loss`."""
        done = [job.result() for job in self.jobs]
        like = self.a_BKHW
        loss_BK = torch.tensor([one.distance for one in done], dtype=like.dtype).reshape(like.shape[:2])
        slopes_BKHW = [
            torch.from_numpy(np.stack(slopes)).reshape(like.shape).to(like.device)
            if maps.requires_grad and slopes
            else None
            for maps, slopes in ((self.a_BKHW, [one.a for one in done]), (self.b_BKHW, [one.b for one in done]))
        ]
        return _WithSlopes.apply(self.a_BKHW, self.b_BKHW, loss_BK.to(like.device), *slopes_BKHW)


class _WithSlopes(torch.autograd.Function):
    """A loss whose value and gradients have already been computed."""

    @staticmethod
    def forward(ctx: t.Any, a_BKHW: t.Any, b_BKHW: t.Any, loss_BK: t.Any, *slopes_BKHW: t.Any) -> torch.Tensor:
        ctx.save_for_backward(*slopes_BKHW)
        return loss_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: t.Any, by_loss_BK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_maps = (None if slope is None else by_loss_BK[:, :, None, None] * slope for slope in ctx.saved_tensors)
        return (*by_maps, None, None, None)


class Comparison(t.NamedTuple):
    """W₁ of a pair of maps and its flattened gradients with respect to both."""

    distance: float
    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]


class Diagram(t.NamedTuple):
    """Points of one dimension, for the negated map, whose sublevel sets are the map's superlevel sets.

    m_N: mean of birth and death; h_N: half their difference. birth_N, death_N: flat indices of the pixels with these
    values.
    """

    m_N: Floats
    h_N: Floats
    birth_N: Pixels
    death_N: Pixels


def _reduced(maps_BKHW: torch.Tensor, downsample: int) -> torch.Tensor:
    maps_BKHW = maps_BKHW.float()
    # Squares cut off by the border average the pixels that they contain.
    return maps_BKHW if downsample == 1 else F.avg_pool2d(maps_BKHW, downsample, ceil_mode=True)


def _on_host(*batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]:
    """Both batches in host memory, which may be read once the event has completed."""
    a, b = (batch.detach().contiguous() for batch in batches)
    if not a.is_cuda:
        return a.cpu(), b.cpu(), None
    # Pinned memory, or the copy would block this thread until the GPU has finished all its work.
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in (a, b)]
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(a.device))
    return copies[0], copies[1], ready


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "topology")


def _compare(
    a_HW: npt.NDArray[np.float32],
    b_HW: npt.NDArray[np.float32],
    min_persistence: float,
    ready: torch.cuda.Event | None,
    position: tuple[int, int],
) -> Comparison:
    """Compare one pair of maps; runs on a thread of the pool."""
    if ready is not None:
        ready.synchronize()
    for name, one_HW in (("first", a_HW), ("second", b_HW)):
        if not np.isfinite(one_HW).all():
            raise TrainingError(
                f"The topological loss was given NaN or infinite values: the {name} batch's map of sample "
                f"{position[0]}, class {position[1]}. Such a map has no diagram. Check what predicted it, "
                "for instance the learning rate and the precision."
            )
    a_max, a_diagrams = _persistence(a_HW, min_persistence)
    b_max, b_diagrams = _persistence(b_HW, min_persistence)
    essential = float(a_HW.flat[a_max]) - float(b_HW.flat[b_max])
    distance = abs(essential)
    a_slopes: Slopes = [([a_max], [np.sign(essential)])]
    b_slopes: Slopes = [([b_max], [-np.sign(essential)])]
    for diagrams in zip(a_diagrams, b_diagrams, strict=True):
        a, b = _without_common(*diagrams)
        if min(a.h_N.size, b.h_N.size) > MANY_POINTS:
            warnings.warn(
                f"Persistence diagrams have more than {MANY_POINTS} points because the maps have pixel noise. The "
                "topological loss takes seconds for each map. Set downsample or min_persistence.",
                BushpcWarning,
                stacklevel=2,
            )
        i, j = match(np.column_stack([a.m_N, a.h_N]), np.column_stack([b.m_N, b.h_N]))
        dm, dh = a.m_N[i] - b.m_N[j], a.h_N[i] - b.h_N[j]
        distance += float(abs(dm).sum() + abs(dh).sum())
        for diagram, slopes, sign, matched in ((a, a_slopes, 1.0, i), (b, b_slopes, -1.0, j)):
            # Unmatched points contribute h, so their derivatives are 0 by m and 1 by h.
            by_m, by_h = np.zeros_like(diagram.m_N), np.ones_like(diagram.h_N)
            distance += float(np.delete(diagram.h_N, matched).sum())
            by_m[matched], by_h[matched] = sign * np.sign(dm), sign * np.sign(dh)
            # The signs are those of the negated map, from which the diagrams are computed.
            slopes += [(diagram.birth_N, (by_h - by_m) / 2), (diagram.death_N, -(by_h + by_m) / 2)]
    return Comparison(distance, _summed(a_slopes, a_HW.size), _summed(b_slopes, b_HW.size))


def _summed(slopes: Slopes, size: int) -> npt.NDArray[np.float32]:
    """Sum the slopes by pixel, as several classes can be born or die at the same pixel."""
    pixels, values = (np.concatenate(parts) for parts in zip(*slopes, strict=True))
    return np.bincount(pixels, values, size).astype(np.float32)


def _persistence(map_HW: npt.NDArray[np.float32], min_persistence: float) -> tuple[int, tuple[Diagram, Diagram]]:
    """Flat index of the pixel where the essential class is born, and the diagrams of dimensions 0 and 1.

    gudhi's algorithm for rectangles is 100 times as fast as its general complexes, but returns values without pixels.
    So each value encodes its pixel, in the low bits that a float64 has beyond a float32. All values then differ, which
    also resolves ties consistently.
    """
    # Imported here, as only this loss needs it. Its public interface would require scikit-learn.
    try:
        from gudhi._pers_cub_low_dim_ext import _persistence_on_rectangle_from_top_cells
    except ImportError as error:  # no wheels for Linux on aarch64
        raise ConfigError(
            f"the topological loss needs the package gudhi ({error}). On aarch64 pip has none: install it from "
            "conda-forge, or train without this loss"
        ) from error

    marked_HW = map_HW.astype(np.float64)
    np.subtract(0.0, marked_HW, out=marked_HW)  # not np.negative: -0.0 with bits set differs from 0.0 with bits set
    bits_HW = marked_HW.view(np.int64)
    bits_HW |= np.arange(map_HW.size).reshape(map_HW.shape)
    if min(map_HW.shape) < 3:  # gudhi needs sides of at least 3; a repeated border changes no class
        marked_HW = np.pad(marked_HW, [(0, max(0, 3 - side)) for side in map_HW.shape], mode="edge")
    components, holes = _persistence_on_rectangle_from_top_cells(marked_HW, 0.0)
    essential = np.isinf(components[:, 1])
    (birth,) = _unmarked(components[essential, 0])[1]
    return int(birth), (_diagram(components[~essential], min_persistence), _diagram(holes, min_persistence))


def _unmarked(marked: Floats) -> tuple[Floats, Pixels]:
    bits = np.ascontiguousarray(marked).view(np.int64)
    return (bits & ~SPARE_BITS).view(np.float64), bits & SPARE_BITS


def _diagram(marked_N2: Floats, min_persistence: float) -> Diagram:
    value_N2, pixel_N2 = _unmarked(marked_N2)
    # Drops pairs within a plateau, which differ only in the encoded pixels: their persistence is 0.
    kept = value_N2[:, 1] - value_N2[:, 0] > min_persistence
    birth_N, death_N = value_N2[kept].T
    return Diagram((birth_N + death_N) / 2, (death_N - birth_N) / 2, pixel_N2[kept, 0], pixel_N2[kept, 1])


def _without_common(a: Diagram, b: Diagram) -> tuple[Diagram, Diagram]:
    """Both diagrams without their common points (with multiplicity), of which clipped maps have thousands.

    W₁ stays the same: with the diagonal as one more point, the least cost between two points is a metric, and W₁ for a
    metric depends only on the difference of the two measures (Kantorovich-Rubinstein duality).
    """
    points = np.concatenate([a.m_N + 1j * a.h_N, b.m_N + 1j * b.h_N])
    kinds, kind = np.unique(points, return_inverse=True)
    a_kind, b_kind = np.split(kind, [a.m_N.size])
    left = []
    for diagram, own, other in ((a, a_kind, b_kind), (b, b_kind, a_kind)):
        order = np.argsort(own, kind="stable")
        nth = np.arange(own.size) - np.searchsorted(own[order], own[order])  # rank among equal points
        kept = order[nth >= np.bincount(other, minlength=kinds.size)[own[order]]]
        left.append(Diagram(diagram.m_N[kept], diagram.h_N[kept], diagram.birth_N[kept], diagram.death_N[kept]))
    return left[0], left[1]
