"""The backward pass of fake tensors on `cuda:0`, node by node.

torch's own engine asks the driver for streams and raises where there is none. The graph that the forward pass left can
be walked from Python: the same nodes, in the engine's order, with the same casts and sums between them.
"""

from __future__ import annotations

import heapq
import itertools
import typing as t
from unittest import mock

import torch

_walks = itertools.count(1)
_running: list[int] = []
Node = t.Any


class _Saved:
    """A tensor that a node keeps for its backward pass, until that has run: then nothing may keep it alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def get(self) -> torch.Tensor:
        assert self.tensor is not None, "this node has run before"
        if _running:
            _used.append(self)
        return self.tensor


_used: list[_Saved] = []


def saved_tensors() -> t.Any:
    """The context in which forward passes must run, so that `backward` can free what it has used."""
    return torch.autograd.graph.saved_tensors_hooks(_Saved, _Saved.get)


def _release() -> None:
    for saved in _used:
        saved.tensor = None
    _used.clear()


def backward(loss: torch.Tensor, gradient: torch.Tensor | None = None, **_: t.Any) -> None:
    """`loss.backward()`: gradients of every leaf land in its `.grad`. The graph is freed on the way, as torch does."""
    root = loss.grad_fn
    if root is None:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    with torch.no_grad():
        first = torch.ones_like(loss) if gradient is None else gradient
        _running.append(next(_walks))
        try:
            with mock.patch.object(torch._C, "_current_graph_task_id", return_value=_running[-1]):
                _walk(root, first)
        finally:
            _running.pop()


def _walk(root: Node, first: torch.Tensor) -> None:
    waits, number = _dependencies(root), itertools.count()
    given: dict[Node, list[torch.Tensor | None]] = {root: [first]}
    # The engine takes the latest node of the forward pass first.
    ready: list[tuple[int, int, Node]] = [(-root._sequence_nr(), next(number), root)]
    del root, first
    while ready:
        *_, node = heapq.heappop(ready)
        gradients = [_fitting(*pair) for pair in zip(given.pop(node), node._input_metadata, strict=True)]
        if hasattr(node, "variable"):
            _accumulate(node.variable, gradients[0])
            continue
        run = node if callable(node) else node.apply  # an autograd.Function of ours has only the latter
        made = run(*gradients) if any(g is not None for g in gradients) else None
        del gradients
        _release()
        after = node.next_functions
        made = made if isinstance(made, tuple) else (made,) * len(after)
        # A Function of ours also answers for arguments that are no tensors, with None.
        made, rest = made[: len(after)], made[len(after) :]
        assert all(gradient is None for gradient in rest), f"{node}: a tensor behind arguments that are none"
        for (child, slot), gradient in zip(after, made, strict=True):
            if child is None:
                continue
            slots = given.setdefault(child, [None] * len(child._input_metadata))
            if gradient is not None:
                slots[slot] = gradient if slots[slot] is None else slots[slot] + gradient
            waits[child] -= 1
            if not waits[child]:
                del waits[child]
                heapq.heappush(ready, (-child._sequence_nr(), next(number), child))
        node = run = after = made = child = gradient = None


def _accumulate(leaf: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """As AccumulateGrad, which takes a gradient over where nobody else has it; called from here it would copy it."""
    if gradient is None:
        return
    if leaf.grad is None:
        leaf.grad = gradient.detach() if gradient.is_contiguous() else gradient.clone()
    else:
        leaf.grad.add_(gradient)


def _dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    waits: dict[Node, int] = {}
    seen, stack = {root}, [root]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                waits[child] = waits.get(child, 0) + 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    return waits


def _fitting(gradient: torch.Tensor | None, like: t.Any) -> torch.Tensor | None:
    """As the engine hands it over: summed to the input's shape, in its type. Raises: RuntimeError on another device."""
    if gradient is None:
        return None
    if gradient.device != like.device:
        raise RuntimeError(f"a gradient on {gradient.device} for an input on {like.device}")
    if gradient.shape != like.shape:
        gradient = gradient.sum_to_size(like.shape)
    return gradient.to(like.dtype)
