"""Topological loss: W₁ between the persistence diagrams of two batches of maps, with gradients at critical pixels.

two predictions of one mask (models/vit_diffusion.py) → diagrams and their matching, on CPU threads → Losses

Of the ViT-diffusion paper's (9), what it leaves open is settled here:

- Superlevel sets: a component is born at its most probable pixel, as the threshold falls, and dies where it meets an
  older one; a hole is born when its rim closes and dies at its least probable pixel. Components are what
  dimension 0 counts and holes what dimension 1 counts, the "flickering components or holes" of the paper. In
  sublevel sets a lesion would be a hole of the background. As in gudhi's complexes of top-dimensional cells, pixels
  that touch at a corner are connected in the foreground and not in the background.
- The ground metric is L∞, as in the stability theorem of persistence and as gudhi.wasserstein has it by default.
- The component that never dies (the essential class; one in every map) is matched with that of the other map at the
  difference of their births, which are the two maxima; gudhi.wasserstein does the same. No death is made up for it.

In the coordinates m = (birth + death) / 2 and h = |birth - death| / 2, L∞ between two points is |m - m'| + |h - h'| and
the way to the diagonal is h. Against sending both to the diagonal, matching them saves 2 min(h, h') - |m - m'|. So

    W₁ = Σ h + Σ h' - the largest total that a matching can save,

an assignment over n · n' savings, in which a pair that saves nothing stands for both on the diagonal. It is exact, and
quicker than the transport problem over (n + 1) · (n' + 1) masses that gudhi.wasserstein hands to POT.

Its time is that of the number of points. A smooth 256 x 256 prediction has some hundred, and a pair of them takes
milliseconds; noise in every single pixel makes 6,000 of them, which takes a minute on one core. With downsample=4 the
same noise has 700, and takes 0.06 s.
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

from bushpc.errors import ConfigError, TrainingError

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.int64]
Slopes = list[tuple[npt.ArrayLike, npt.ArrayLike]]  # pixels, and the loss's slope along the value of each

# From about here on an assignment takes seconds; its time grows faster than the square of the number.
MANY_POINTS = 2000

# float64 has 29 bits more than float32 to tell values apart.
SPARE_BITS = (1 << 29) - 1


def topological_loss(
    a_BKHW: torch.Tensor,
    b_BKHW: torch.Tensor,
    *,
    min_persistence: float = 0.0,
    downsample: int = 1,
) -> torch.Tensor:
    """L_topo of the ViT-diffusion paper's (9), per sample and class: W₁ in dimension 0 plus W₁ in dimension 1.

    a_BKHW, b_BKHW: maps on one scale, such as probabilities, any floating type; compared in float32.
    min_persistence: points with birth - death at or below it are left out of both diagrams, in the maps' unit.
    downsample: side in pixels of the squares whose means the diagrams are made of; 1 takes the maps as they are.
    Returns (B, K), float32, at least 0. Gradients flow into whichever input requires them, at the pixels where classes
    are born and die (of pixels with the same value, always the same one): pass `b.detach()` for `a` alone.
    Raises TrainingError for shapes that differ and for maps with NaN or infinite values, ConfigError for a setting
    out of range.
    """
    return start_topological_loss(a_BKHW, b_BKHW, min_persistence=min_persistence, downsample=downsample).loss()


def start_topological_loss(
    a_BKHW: torch.Tensor,
    b_BKHW: torch.Tensor,
    *,
    min_persistence: float = 0.0,
    downsample: int = 1,
) -> PendingLoss:
    """`topological_loss` under way: returns at once, also where the maps are still being computed on a GPU.

    The work is done on `torch.get_num_threads()` threads of their own, without the interpreter lock and without
    waiting for other work on the GPU; whatever is called between this and `loss()` overlaps with it.
    """
    if a_BKHW.shape != b_BKHW.shape or a_BKHW.ndim != 4:
        raise TrainingError(
            f"The topological loss was given maps of shapes {tuple(a_BKHW.shape)} and {tuple(b_BKHW.shape)}; both must "
            "have the same (B, K, H, W). Pass two predictions of the same batch."
        )
    if not min_persistence >= 0:
        raise ConfigError(f"min_persistence = {min_persistence}; it must be 0 (every point counts) or more.")
    if downsample < 1:
        raise ConfigError(f"downsample = {downsample}; it must be 1 (maps as they are) or more pixels.")
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
    """A topological loss that CPU threads are working on."""

    a_BKHW: torch.Tensor
    b_BKHW: torch.Tensor
    jobs: list[Future[Comparison]]

    def loss(self) -> torch.Tensor:
        """Waits for the threads; then as `topological_loss`."""
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
    """A loss whose value and gradients are known already."""

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
    """W₁ of one pair of maps and its gradients with respect to both, flat."""

    distance: float
    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]


class Diagram(t.NamedTuple):
    """Points of one dimension of the map's negative, whose sublevel sets are the map's superlevel sets.

    m_N: middle of birth and death; h_N: half their difference. birth_N, death_N: flat indices of the pixels that
    have these values.
    """

    m_N: Floats
    h_N: Floats
    birth_N: Pixels
    death_N: Pixels


def _reduced(maps_BKHW: torch.Tensor, downsample: int) -> torch.Tensor:
    maps_BKHW = maps_BKHW.float()
    # Squares cut off by the border are means of what they still hold.
    return maps_BKHW if downsample == 1 else F.avg_pool2d(maps_BKHW, downsample, ceil_mode=True)


def _on_host(*batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]:
    """Both batches in memory that the CPU may read once the event has passed."""
    a, b = (batch.detach().contiguous() for batch in batches)
    if not a.is_cuda:
        return a.cpu(), b.cpu(), None
    # Pinned, else the copy would hold up this thread until the GPU has done all its work.
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
    """One pair of maps; runs on a thread of the pool."""
    if ready is not None:
        ready.synchronize()
    for name, one_HW in (("first", a_HW), ("second", b_HW)):
        if not np.isfinite(one_HW).all():
            raise TrainingError(
                f"The topological loss was given NaN or infinite values: the {name} batch's map of sample "
                f"{position[0]}, class {position[1]}. Such a map has no diagram; look at what predicted it, "
                "for instance at the learning rate and at the precision."
            )
    a_max, a_diagrams = _persistence(a_HW, min_persistence)
    b_max, b_diagrams = _persistence(b_HW, min_persistence)
    essential = float(a_HW.flat[a_max]) - float(b_HW.flat[b_max])
    distance = abs(essential)
    a_slopes: Slopes = [([a_max], [np.sign(essential)])]
    b_slopes: Slopes = [([b_max], [-np.sign(essential)])]
    for diagrams in zip(a_diagrams, b_diagrams, strict=True):
        a, b = _without_common(*diagrams)
        i, j = _matching(a, b)
        dm, dh = a.m_N[i] - b.m_N[j], a.h_N[i] - b.h_N[j]
        distance += float(abs(dm).sum() + abs(dh).sum())
        for diagram, slopes, sign, matched in ((a, a_slopes, 1.0, i), (b, b_slopes, -1.0, j)):
            # Off the matching the way is h itself, hence 0 and 1.
            by_m, by_h = np.zeros_like(diagram.m_N), np.ones_like(diagram.h_N)
            distance += float(np.delete(diagram.h_N, matched).sum())
            by_m[matched], by_h[matched] = sign * np.sign(dm), sign * np.sign(dh)
            # The diagrams are those of the negative map, hence the signs.
            slopes += [(diagram.birth_N, (by_h - by_m) / 2), (diagram.death_N, -(by_h + by_m) / 2)]
    return Comparison(distance, _summed(a_slopes, a_HW.size), _summed(b_slopes, b_HW.size))


def _summed(slopes: Slopes, size: int) -> npt.NDArray[np.float32]:
    """One slope per pixel; a pixel may be where several classes are born or die."""
    pixels, values = (np.concatenate(parts) for parts in zip(*slopes, strict=True))
    return np.bincount(pixels, values, size).astype(np.float32)


def _persistence(map_HW: npt.NDArray[np.float32], min_persistence: float) -> tuple[int, tuple[Diagram, Diagram]]:
    """Flat index of the pixel where the essential class is born, and the diagrams of dimensions 0 and 1.

    gudhi's way for rectangles is 100 times as fast as its general complexes, but gives values without pixels. So the
    values themselves carry their pixels, in the bits that float64 has over float32: no two are then the same, which
    also settles ties, always the same way.
    """
    # Imported here as only this loss needs it. The function has no public door that does without scikit-learn.
    from gudhi._pers_cub_low_dim_ext import _persistence_on_rectangle_from_top_cells

    marked_HW = map_HW.astype(np.float64)
    np.subtract(0.0, marked_HW, out=marked_HW)  # not the negative: with bits set, -0.0 would be another value than 0.0
    bits_HW = marked_HW.view(np.int64)
    bits_HW |= np.arange(map_HW.size).reshape(map_HW.shape)
    if min(map_HW.shape) < 3:  # gudhi wants sides of 3; a border that repeats itself changes no class
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
    # Pairs within a plateau, which the marks alone told apart, go here: their persistence is 0.
    kept = value_N2[:, 1] - value_N2[:, 0] > min_persistence
    birth_N, death_N = value_N2[kept].T
    return Diagram((birth_N + death_N) / 2, (death_N - birth_N) / 2, pixel_N2[kept, 0], pixel_N2[kept, 1])


def _without_common(a: Diagram, b: Diagram) -> tuple[Diagram, Diagram]:
    """Both without the points that both have, as often as both have them; in clipped maps they are thousands.

    W₁ stays the same: with the diagonal as one more point, the least cost between two points is a metric, and W₁ for a
    metric depends on the difference of the two measures alone (Kantorovich-Rubinstein duality).
    """
    points = np.concatenate([a.m_N + 1j * a.h_N, b.m_N + 1j * b.h_N])
    kinds, kind = np.unique(points, return_inverse=True)
    a_kind, b_kind = np.split(kind, [a.m_N.size])
    left = []
    for diagram, own, other in ((a, a_kind, b_kind), (b, b_kind, a_kind)):
        order = np.argsort(own, kind="stable")
        nth = np.arange(own.size) - np.searchsorted(own[order], own[order])  # of its kind, in this order
        kept = order[nth >= np.bincount(other, minlength=kinds.size)[own[order]]]
        left.append(Diagram(diagram.m_N[kept], diagram.h_N[kept], diagram.birth_N[kept], diagram.death_N[kept]))
    return left[0], left[1]


def _matching(a: Diagram, b: Diagram) -> tuple[Pixels, Pixels]:
    """Indices into `a` and `b` of the points matched with one another in an optimal matching."""
    from scipy.optimize import linear_sum_assignment

    if min(a.h_N.size, b.h_N.size) > MANY_POINTS:
        warnings.warn(
            f"Persistence diagrams have more than {MANY_POINTS} points: these maps are noise at the level of single "
            "pixels, and the topological loss takes seconds to minutes for each. Set downsample or min_persistence.",
            stacklevel=2,
        )
    cost_NM = np.subtract.outer(a.m_N, b.m_N)
    np.abs(cost_NM, out=cost_NM)
    cost_NM -= np.minimum.outer(2 * a.h_N, 2 * b.h_N)
    np.minimum(cost_NM, 0, out=cost_NM)  # minus what the pair saves
    i, j = linear_sum_assignment(cost_NM)
    saves = cost_NM[i, j] < 0
    return i[saves], j[saves]
