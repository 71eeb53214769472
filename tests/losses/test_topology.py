"""Topological loss against gudhi's generic complexes and POT, finite differences, and diagrams worked by hand."""

import gudhi
import numpy as np
import pytest
import torch
from gudhi.wasserstein import wasserstein_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from bushpc.errors import BushpcWarning, ConfigError, TrainingError
from bushpc.losses import topology
from bushpc.losses.topology import start_topological_loss, topological_loss

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def as_map(rows, requires_grad=True):
    """One sample of one class."""
    return torch.tensor(rows, dtype=torch.float32)[None, None].requires_grad_(requires_grad)


def random_pair(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator).requires_grad_() for _ in range(2))


def generic_loss(a, b, min_persistence=0.0):
    """One pair of (H, W) maps the plain way; differentiable, through cofaces and the matching. Float64."""
    total = torch.zeros((), dtype=torch.float64)
    diagrams = []
    for x in (a, b):
        complex_ = gudhi.CubicalComplex(top_dimensional_cells=-x.detach().double().numpy())
        complex_.compute_persistence(min_persistence=min_persistence)
        cells = -x.double().T.flatten()  # gudhi counts cells column by column
        finite, essential = complex_.cofaces_of_persistence_pairs()
        pairs = [finite[d] if d < len(finite) else np.empty((0, 2), int) for d in (0, 1)]
        points = [cells[torch.from_numpy(pair).long()].reshape(-1, 2) for pair in pairs]
        diagrams.append((points, cells[int(essential[0][0])]))
    (points_a, birth_a), (points_b, birth_b) = diagrams
    total = total + (birth_a - birth_b).abs()
    for p, q in zip(points_a, points_b, strict=True):
        if not len(p) or not len(q):  # nothing to match
            total = total + sum((x[:, 1] - x[:, 0]).sum() / 2 for x in (p, q))
            continue
        value, matching = wasserstein_distance(
            p.detach().numpy(), q.detach().numpy(), order=1, internal_p=np.inf, matching=True
        )
        ours = torch.zeros((), dtype=torch.float64)
        for i, j in matching:
            if i >= 0 and j >= 0:
                ours = ours + (p[i] - q[j]).abs().max()
            else:
                birth, death = p[i] if j < 0 else q[j]
                ours = ours + (death - birth) / 2
        assert ours.item() == pytest.approx(value, abs=1e-9)
        total = total + ours
    return total


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=SHAPES)
def test_value_is_gudhis_on_random_maps_with_and_without_ties(data, shape):
    levels = data.draw(st.sampled_from([2, 3, 8, 2**20]))
    a, b = (
        torch.from_numpy(data.draw(arrays(np.int32, shape, elements=st.integers(-levels, levels)))) / levels
        for _ in range(2)
    )
    loss = topological_loss(a[None, None], b[None, None])
    assert loss.shape == (1, 1)
    assert loss.item() == pytest.approx(generic_loss(a, b).item(), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_gradient_is_gudhis_through_cofaces_and_matching(seed):
    a, b = random_pair(seed, 2, 2, 13, 9)
    loss_BK = topological_loss(a, b)
    weight_BK = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    (weight_BK * loss_BK).sum().backward()
    for i in range(2):
        for k in range(2):
            p, q = (x.detach()[i, k].clone().requires_grad_() for x in (a, b))
            reference = generic_loss(p, q)
            reference.backward()
            assert loss_BK[i, k].item() == pytest.approx(reference.item(), abs=1e-6, rel=1e-6)
            torch.testing.assert_close(a.grad[i, k], weight_BK[i, k] * p.grad, rtol=0, atol=1e-6)
            torch.testing.assert_close(b.grad[i, k], weight_BK[i, k] * q.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_the_finite_difference_at_every_pixel(seed):
    # Integers far apart: steps of 1 cross no kink, and float32 holds values and differences exactly.
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        (100 * torch.randperm(2000, generator=generator)[:42] + torch.randint(20, (42,), generator=generator))
        .float()
        .reshape(1, 1, 6, 7)
        .requires_grad_()
        for _ in range(2)
    )
    topological_loss(a, b).sum().backward()
    pixels = torch.eye(42).reshape(42, 1, 6, 7)
    with torch.no_grad():
        for x, up, down in ((a, (a + pixels, b), (a - pixels, b)), (b, (a, b + pixels), (a, b - pixels))):
            difference = topological_loss(*(y.expand(42, 1, 6, 7) for y in up)) - topological_loss(
                *(y.expand(42, 1, 6, 7) for y in down)
            )
            assert torch.equal(difference.flatten() / 2, x.grad.flatten())


def test_a_hole_worked_by_hand():
    # The ring closes at 0.8, its least probable pixel, and fills at 0.2; the other map has none: h = (0.8 - 0.2) / 2.
    ring = as_map([[0.0, 0.0, 0, 0, 0], [0, 0.9, 0.9, 0.9, 0], [0, 0.8, 0.2, 0.9, 0], [0, 0.9, 0.9, 0.9, 0], [0.0] * 5])
    disc = as_map([[0.0, 0.0, 0, 0, 0], [0, 0.9, 0.9, 0.9, 0], [0, 0.9, 0.9, 0.9, 0], [0, 0.9, 0.9, 0.9, 0], [0.0] * 5])
    loss = topological_loss(ring, disc)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.3)
    expected = torch.zeros(5, 5)
    expected[2, 1], expected[2, 2] = 0.5, -0.5  # going down the slope opens the rim and fills the hole
    assert torch.equal(ring.grad[0, 0], expected)
    assert not disc.grad.any()


def test_two_lesions_against_one_worked_by_hand():
    # Essential classes 0.9 and 0.7; the second lesion is born at 0.6, and dies at 0.1 on the bridge between them.
    two = as_map([[0.0, 0.0, 0.0, 0.0, 0.0], [0.9, 0.05, 0.1, 0.6, 0.3]])
    one = as_map([[0.0, 0.0, 0.0, 0.0, 0.0], [0.7, 0.0, 0.0, 0.0, 0.0]])
    loss = topological_loss(two, one)
    loss.sum().backward()
    # The bridge is as strong as its weakest pixel, 0.05.
    assert loss.item() == pytest.approx(0.2 + (0.6 - 0.05) / 2)
    assert two.grad[0, 0].tolist() == [[0, 0, 0, 0, 0], [1, -0.5, 0, 0.5, 0]]
    assert one.grad[0, 0].tolist() == [[0, 0, 0, 0, 0], [-1, 0, 0, 0, 0]]


def test_matched_points_worked_by_hand():
    # Components (0.6, 0.1) and (0.5, 0.2), the essential classes alike: both ends are 0.1 off, L∞ counts it once.
    a, b = as_map([[0.9, 0.1, 0.6]]), as_map([[0.9, 0.2, 0.5]])
    loss = topological_loss(a, b)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.1)
    assert a.grad[0, 0].tolist() in ([[0, -1, 0]], [[0, 0, 1]], [[0, -0.5, 0.5]])  # each a subgradient of the kink
    assert torch.equal(a.grad, -b.grad)


def test_pixels_of_the_same_value_take_gradients_only_where_classes_are_born_or_die():
    # 0.1, where the second component dies, and 0.6, where it is born, also occur where nothing happens.
    rows = [[0.6, 0.1, 0.0, 0.0, 0.0, 0.0], [0.9, 0.6, 0.1, 0.1, 0.6, 0.1], [0.6, 0.0, 0.0, 0.0, 0.0, 0.0]]
    slopes = []
    for _ in range(3):
        a = as_map(rows)
        topological_loss(a, as_map(np.where(np.arange(6) < 2, rows, 0), False)).sum().backward()
        slopes.append(a.grad[0, 0])
    assert torch.equal(slopes[0], slopes[1])
    assert torch.equal(slopes[0], slopes[2])
    assert slopes[0][1, 4] == 0.5
    assert sorted(slopes[0][1, 2:4].tolist()) == [-0.5, 0]  # either pixel of the bridge
    assert slopes[0].count_nonzero() == 2


@settings(max_examples=30, deadline=None)
@given(data=st.data(), shape=SHAPES)
def test_loss_is_a_distance_with_finite_gradients_that_vanish_between_equal_maps(data, shape):
    a, b, c = (
        torch.from_numpy(data.draw(arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))))[None, None]
        for _ in range(3)
    )
    ab, bc, ac = topological_loss(a, b), topological_loss(b, c), topological_loss(a, c)
    assert ab == pytest.approx(topological_loss(b, a).item(), abs=1e-5)
    assert ac <= ab + bc + 1e-5
    same, other = a.clone().requires_grad_(), a.clone().requires_grad_()
    zero = topological_loss(same, other)
    zero.sum().backward()
    assert zero.item() == 0
    assert not same.grad.any()
    assert not other.grad.any()
    a.requires_grad_()
    topological_loss(a, b).sum().backward()
    assert a.grad.isfinite().all()


def test_clipped_maps_whose_points_mostly_cancel_have_gudhis_value():
    generator = torch.Generator().manual_seed(8)
    a, b = ((0.5 + 3 * torch.randn(24, 24, generator=generator)).clamp(0, 1) for _ in range(2))
    loss = topological_loss(a[None, None], b[None, None])
    assert loss.item() == pytest.approx(generic_loss(a, b).item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.25, 1.0, -1.0])
def test_constant_maps_have_only_the_class_that_never_dies(value):
    a, b = torch.full((1, 1, 8, 8), value, requires_grad=True), torch.zeros(1, 1, 8, 8, requires_grad=True)
    loss = topological_loss(a, b)
    loss.sum().backward()
    assert loss.item() == abs(value)
    assert a.grad.abs().sum() == (value != 0)
    assert b.grad.abs().sum() == (value != 0)


def test_empty_mask_against_a_lesion_gives_the_lesions_own_way_to_nothing():
    lesion = torch.zeros(1, 1, 8, 8)
    lesion[0, 0, 2:5, 2:5] = 1
    empty = torch.zeros(1, 1, 8, 8, requires_grad=True)
    loss = topological_loss(lesion.requires_grad_(), empty)
    loss.sum().backward()
    assert loss.item() == 1
    assert lesion.grad.sum() == 1
    assert empty.grad.sum() == -1


def test_descent_gives_two_predictions_the_same_components_and_holes():
    a = torch.zeros(1, 1, 16, 16)
    a[0, 0, 3:12, 3:12] = 0.9
    b = a.clone()
    a[0, 0, 5, 5], a[0, 0, 14, 14] = 0.1, 0.6  # a hole and a speckle that b lacks
    a.requires_grad_()
    for _ in range(40):
        a.grad = None
        topological_loss(a, b).sum().backward()
        a.data -= 0.05 * a.grad
    assert topological_loss(a, b).item() < 0.11
    assert gudhi_betti(a) == gudhi_betti(b) == [1, 0]


def gudhi_betti(maps, persistent=0.2):
    """Numbers of components and of holes with more than this persistence, of the only map."""
    complex_ = gudhi.CubicalComplex(top_dimensional_cells=-maps.detach()[0, 0].double().numpy())
    complex_.compute_persistence(min_persistence=persistent)
    return [len(complex_.persistence_intervals_in_dimension(d)) for d in (0, 1)]


def test_only_inputs_that_require_gradients_get_them():
    a, b = random_pair(0, 1, 1, 8, 8)
    topological_loss(a, b.detach()).sum().backward()
    assert a.grad.any()
    assert b.grad is None
    assert not topological_loss(a.detach(), b.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_type_is_compared_in_float32(dtype):
    a, b = (x.detach().to(dtype) for x in random_pair(1, 2, 1, 12, 12))
    loss = topological_loss(a.requires_grad_(), b)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert a.grad.dtype == dtype
    assert torch.equal(loss, topological_loss(a.float(), b.float()))


def test_min_persistence_leaves_out_what_gudhi_leaves_out():
    a, b = (x.detach() for x in random_pair(2, 1, 1, 16, 16))
    loss = topological_loss(a, b, min_persistence=0.3)
    assert loss.item() == pytest.approx(generic_loss(a[0, 0], b[0, 0], 0.3).item(), rel=1e-6)
    assert loss < topological_loss(a, b)


def test_downsampled_maps_are_means_of_squares():
    a, b = random_pair(3, 2, 1, 14, 11)
    loss = topological_loss(a, b, downsample=3)
    p, q = (F.avg_pool2d(x, 3, ceil_mode=True) for x in (a, b))
    assert p.shape[2:] == (5, 4)
    torch.testing.assert_close(loss, topological_loss(p, q))
    loss.sum().backward()
    assert (a.grad[:, :, :3, :3] == a.grad[:, :, :1, :1]).all()


def test_a_loss_started_early_is_the_same_loss():
    a, b = random_pair(4, 3, 2, 20, 20)
    pending = start_topological_loss(a, b)
    (a * a).sum().backward()  # meanwhile
    torch.testing.assert_close(pending.loss(), topological_loss(a, b), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_maps_on_a_gpu_have_the_loss_and_gradients_of_the_same_maps_on_the_cpu():
    on_cpu = [x.detach() for x in random_pair(7, 4, 2, 32, 32)]
    results = []
    for device in ("cpu", "cuda"):
        a, b = (x.to(device, copy=True).requires_grad_() for x in on_cpu)
        loss = topological_loss(a, b)
        loss.sum().backward()
        assert loss.device.type == device
        results.append([x.cpu() for x in (loss.detach(), a.grad, b.grad)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_an_empty_batch_has_no_losses():
    assert topological_loss(torch.zeros(0, 2, 8, 8), torch.zeros(0, 2, 8, 8)).shape == (0, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_named(bad):
    a, b = (x.detach() for x in random_pair(5, 3, 2, 8, 8))
    b[2, 1, 4, 4] = bad
    with pytest.raises(TrainingError, match=r"second batch's map of sample 2, class 1"):
        topological_loss(a, b)


def test_maps_that_do_not_fit_together_are_refused():
    for a, b in ((torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8)), (torch.zeros(8, 8), torch.zeros(8, 8))):
        with pytest.raises(TrainingError, match=r"same \(B, K, H, W\)"):
            topological_loss(a, b)


@pytest.mark.parametrize("setting", [{"min_persistence": -0.1}, {"min_persistence": float("nan")}, {"downsample": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        topological_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), **setting)


def test_maps_of_noise_are_warned_about(monkeypatch):
    monkeypatch.setattr(topology, "MANY_POINTS", 3)
    with pytest.warns(BushpcWarning, match="downsample or min_persistence"):
        topological_loss(*random_pair(6, 1, 1, 16, 16))
