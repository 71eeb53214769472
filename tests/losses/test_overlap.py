"""Overlap losses against MONAI, torch and cases worked by hand."""

import pytest
import torch
from monai.losses import DiceLoss

from bushpc.losses.overlap import bce_loss, jaccard_loss, overlap_losses, soft_dice_loss


def random_case(*shape):
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(*shape, generator=generator)
    return logits, (torch.rand(*shape, generator=generator) > 0.7).float()


@pytest.mark.parametrize("channels", [1, 3])
def test_soft_dice_agrees_with_monai(channels):
    logits, mask = random_case(4, channels, 16, 12)
    reference = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)(logits, mask)
    torch.testing.assert_close(soft_dice_loss(logits, mask), reference)


def test_soft_dice_of_a_case_worked_by_hand():
    # p = 1/2 at 4 pixels, 1 of them in the mask: 1 - (2 * 0.5 + 1) / (2 + 1 + 1)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert soft_dice_loss(torch.zeros(1, 1, 2, 2), mask).item() == pytest.approx(0.5)


def test_soft_dice_weighs_every_sample_the_same_whatever_its_lesion_size():
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :30, :30], mask[1, :, 0, 0] = 1, 1
    logits = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = [soft_dice_loss(logits[i : i + 1], mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(soft_dice_loss(logits, mask), (alone[0] + alone[1]) / 2)


def test_soft_dice_pushes_down_where_the_mask_is_empty():
    logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
    soft_dice_loss(logits, torch.zeros(1, 1, 8, 8)).backward()
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_jaccard_agrees_with_monai(smooth):
    logits, mask = random_case(4, 2, 16, 12)
    reference = DiceLoss(sigmoid=True, jaccard=True, smooth_nr=2 * smooth, smooth_dr=2 * smooth)(logits, mask)
    torch.testing.assert_close(jaccard_loss(logits, mask, smooth), reference)


def test_jaccard_of_a_case_worked_by_hand():
    # p = 1/2 at 4 pixels, 1 of them in the mask: 1 - (0.5 + 1) / (2 + 1 - 0.5 + 1)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert jaccard_loss(torch.zeros(1, 1, 2, 2), mask).item() == pytest.approx(1 - 1.5 / 3.5)


def test_losses_are_float32_and_equal_under_autocast():
    logits, mask = random_case(2, 1, 64, 64)
    plain = overlap_losses(logits.bfloat16(), mask, dice_weight=1.0, bce_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = overlap_losses(logits.bfloat16(), mask, dice_weight=1.0, bce_weight=1.0)
    assert under_autocast.total.dtype == torch.float32
    assert torch.equal(plain.total, under_autocast.total)


def test_total_is_the_weighted_sum_of_terms_that_carry_no_graph():
    logits, mask = random_case(2, 1, 8, 8)
    losses = overlap_losses(logits.requires_grad_(), mask, dice_weight=0.25, bce_weight=3.0)
    torch.testing.assert_close(losses.total, 0.25 * soft_dice_loss(logits, mask) + 3 * bce_loss(logits, mask))
    assert losses.total.requires_grad
    assert not any(term.requires_grad for term in losses.terms.values())
    assert list(losses.terms) == ["dice", "bce"]


def test_cross_entropy_agrees_with_its_definition():
    logits, mask = random_case(2, 1, 8, 8)
    prob = logits.double().sigmoid()
    reference = -(mask * prob.log() + (1 - mask) * (1 - prob).log()).mean()
    torch.testing.assert_close(bce_loss(logits, mask).double(), reference, rtol=1e-5, atol=1e-6)
