"""Activation checkpointing for any model: blocks are computed again in the backward pass instead of kept in memory."""

from __future__ import annotations

import contextlib
import typing as t
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class _Recomputed:
    """Mixed into a block's class: the whole call is computed again, with whatever hooks an engine put on the block."""

    def __call__(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        call = super().__call__  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        block = t.cast(nn.Module, self)
        return checkpoint(
            call,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(block)),
            **kwargs,
        )


def recompute(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> int:
    """Change every outermost module of the types `blocks` in place; returns how many. Parameter names stay.

    Dropout draws the same numbers again, and BatchNorm's running statistics are updated once, so gradients and
    buffers equal those of the unchanged model.
    """
    count = 0
    for child in model.children():
        if isinstance(child, blocks):
            child.__class__ = type(f"Recomputed{type(child).__name__}", (_Recomputed, type(child)), {})
            count += 1
        else:
            count += recompute(child, blocks)
    return count


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """While a block is computed again, its BatchNorms normalise as before but do not count the batch twice."""
    kept = [(module, dict(module._buffers)) for module in block.modules() if module._buffers]
    for module, buffers in kept:
        module._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
