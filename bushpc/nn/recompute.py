"""Activation checkpointing for any model: the backward pass recomputes blocks instead of storing activations."""

from __future__ import annotations

import contextlib
import typing as t
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class _Recomputed:
    """Mixin for a block's class: recomputes the whole call, including hooks that an engine added to the block."""

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
    """Make every outermost module of the types `blocks` recompute, in place; returns their number. Names stay the same.

    Dropout draws the same numbers again, and BatchNorm's running statistics are updated only once, so gradients and
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
    """During recomputation, BatchNorms normalize as before but do not update their statistics a second time."""
    kept = [(module, dict(module._buffers)) for module in block.modules() if module._buffers]
    for module, buffers in kept:
        module._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
