"""Promises of activation checkpointing: the same gradients and buffers as without it, and less kept in memory."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bushpc.nn.recompute import recompute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.norm(self.conv(x)).relu())


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return total


def test_gradients_and_statistics_equal_those_of_the_unchanged_model():
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block(), nn.Conv2d(4, 1, 1))
    changed = copy.deepcopy(plain)
    assert recompute(changed, (Block,)) == 2
    assert list(changed.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 4, 8, 8)
    for model in (plain, changed):
        torch.manual_seed(1)
        model(x).square().sum().backward()
    for (name, ours), theirs in zip(changed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(changed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_less_is_kept_for_the_backward_pass():
    plain = nn.Sequential(Block(), Block())
    changed = copy.deepcopy(plain)
    recompute(changed, (Block,))
    x = torch.randn(2, 4, 16, 16)
    assert saved_bytes(changed, x) < 0.5 * saved_bytes(plain, x)


def test_only_outermost_blocks_are_changed_and_predictions_are_not():
    nested = nn.Sequential(nn.Sequential(Block()))
    x = torch.randn(1, 4, 8, 8)
    expected = copy.deepcopy(nested).eval()(x)
    assert recompute(nested, (nn.Sequential, Block)) == 1
    with torch.no_grad():
        assert torch.equal(nested.eval()(x), expected)
