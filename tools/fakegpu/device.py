"""`cuda:0` on a machine that has none: fake tensors, and stand-ins for what asks the driver.

    with fake_cuda(): model, Engine, losses, update … as on a GPU; shapes, dtypes and devices are real, values are not

FakeTensorMode runs the operators' shape functions and raises where tensors of two devices meet. Patched is what a
driver would answer: autocast's support of bf16, streams, events, generators, a value read by the host.
"""

from __future__ import annotations

import contextlib
import typing as t
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tools.fakegpu.attention import Attention
from tools.fakegpu.backward import backward, saved_tensors

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeGpu]:
    """Tensors made inside are fake, and `cuda:0` exists.

    Values read by the host are 1: a loss is finite, a mask is not empty. `.numpy()` gives zeros.
    """
    with contextlib.ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        stack.enter_context(_accelerate_on_cuda())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(saved_tensors())
        attention = Attention()
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        yield FakeGpu(stack.enter_context(HostReads()), attention)


# Products whose kernels want all operands of one type. Fake tensors do not check that of all of them.
ONE_TYPE = (
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default),
    *(aten.convolution.default, aten._scaled_dot_product_flash_attention.default),
    aten._scaled_dot_product_efficient_attention.default,
)


class FakeGpu(t.NamedTuple):
    """reads: what the host has read from the GPU. attention: the kernels that were chosen."""

    reads: HostReads
    attention: Attention


class HostReads(TorchDispatchMode):
    """Answers `.item()`, which has no value to give, and counts how often the host waits for the GPU.

    Products of several types raise RuntimeError, as on a GPU.

    Pinned memory, which FakeTensorMode does not have, becomes common memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: t.Any, types: t.Any, args: tuple[t.Any, ...] = (), kwargs: dict[str, t.Any] | None = None
    ) -> t.Any:
        kwargs = kwargs or {}
        if func in ONE_TYPE:
            _require_one_type(func, args)
        if func is aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            self.count += args[0].device.type == "cuda"
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is aten.nonzero.default:  # its length is a value, too
            self.count += args[0].device.type == "cuda"
            return torch.zeros(1, args[0].ndim, dtype=torch.int64, device=args[0].device)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _require_one_type(func: t.Any, args: tuple[t.Any, ...]) -> None:
    types = {x.dtype for x in args if isinstance(x, torch.Tensor)}
    if len(types) > 1:
        raise RuntimeError(f"{func.name()} of {' and '.join(sorted(map(str, types)))}")


class _Event:
    """torch.cuda.Event of a stream without work."""

    def __init__(self, *_: t.Any, **__: t.Any) -> None: ...

    def record(self, stream: t.Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _IsGenerator(type):
    def __instancecheck__(cls, thing: t.Any) -> bool:
        return type(thing).__name__ == "Generator"


class _Generator(metaclass=_IsGenerator):
    """torch.Generator of any device, on the CPU."""

    def __new__(cls, device: t.Any = "cpu", make: t.Any = torch.Generator) -> t.Any:
        return make("cpu")


def _numpy(tensor: torch.Tensor, *, force: bool = False) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert a tensor on {tensor.device} to numpy")  # as torch says
    kind = torch.empty(0, dtype=tensor.dtype, device="meta").dtype
    return np.zeros(tuple(tensor.shape), dtype=str(kind).removeprefix("torch."))


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """torch.utils.swap_tensors without its check for weak references, which fake tensors always have."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def _patches() -> Iterator[contextlib.AbstractContextManager[t.Any]]:
    one = mock.patch.object
    yield mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False)
    yield one(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    yield one(torch.cuda, "Event", _Event)
    yield one(torch.cuda, "current_stream", lambda device=None: None)
    yield one(torch, "Generator", _Generator)
    yield mock.patch("torch.utils.swap_tensors", _swap)
    yield one(torch.Tensor, "backward", backward)
    yield one(FakeTensor, "numpy", _numpy)
    # AdamW, clipping and the average work on lists of tensors, on a GPU as here.
    kinds = [torch.Tensor, torch.nn.Parameter, FakeTensor]
    yield mock.patch("torch.optim.optimizer._foreach_supported_types", kinds)
    yield mock.patch("torch.utils._foreach_utils._foreach_supported_types", kinds)


@contextlib.contextmanager
def _accelerate_on_cuda() -> Iterator[None]:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState().device = CUDA
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
