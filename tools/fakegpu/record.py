"""Every operator that runs, forward and backward: how many there are, with how many operations and bytes.

Counts of operations are torch's own (torch.utils.flop_counter); bytes are those of what each operator reads and writes.
"""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
# Neither memory nor time: questions about a tensor.
FREE = {"prim::device", "prim::layout", "aten::detach", "aten::alias", "aten::lift_fresh"}


@dataclass(frozen=True)
class Gpu:
    """Peaks of a data sheet: operations a second by type, bytes a second of its memory."""

    name: str
    half: float
    single: float
    memory: float


# NVIDIA, A100 Tensor Core GPU data sheet (dense, without sparsity). Single: TF32 products, as engine.precision=bf16 and
# fp16 allow them; other float32 work is bound by memory.
A100_40 = Gpu("A100 40 GB (SXM)", half=312e12, single=156e12, memory=1555e9)


class Record(TorchDispatchMode):
    """What ran on `cuda:0` since it was entered. operators: their names; flops, bytes: of all calls together; seconds:
    on the stated GPU at its peaks. without_kernel: operators that torch's build does not register for CUDA."""

    def __init__(self, gpu: Gpu = A100_40) -> None:
        super().__init__()
        self.gpu = gpu
        self.operators: set[str] = set()
        self.without_kernel: set[str] = set()
        self.calls, self.flops, self.bytes, self.seconds = 0, 0, 0, 0.0

    def __torch_dispatch__(
        self, func: t.Any, types: t.Any, args: tuple[t.Any, ...] = (), kwargs: dict[str, t.Any] | None = None
    ) -> t.Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        if name in FREE:
            return made
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cuda" for x in (*given, *results)):
            self._note(func, name, given, results, (args, kwargs, made))
        return made

    def _note(
        self, func: t.Any, name: str, given: list[torch.Tensor], results: list[torch.Tensor], call: tuple[t.Any, ...]
    ) -> None:
        args, kwargs, made = call
        dtype = next((x.dtype for x in (*given, *results) if x.is_floating_point()), None)
        self.operators.add(name)
        self.calls += 1
        if not has_cuda_kernel(func):
            self.without_kernel.add(func.name())
        if func.is_view:
            return
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=made) if count else 0
        moved = sum(x.numel() * x.element_size() for x in (*given, *results))
        self.flops += flops
        self.bytes += moved
        peak = self.gpu.half if dtype in HALF else self.gpu.single
        self.seconds += max(flops / peak, moved / self.gpu.memory)


@functools.cache
def has_cuda_kernel(func: t.Any) -> bool:
    """Whether this build of torch registers the operator for CUDA, itself or by other operators."""
    keys = torch._C.DispatchKey
    if func.name().startswith("prims::"):
        return True
    composite = (
        keys.CompositeImplicitAutograd,
        keys.CompositeExplicitAutograd,
        keys.CompositeExplicitAutogradNonFunctional,
    )
    return any(func.has_kernel_for_dispatch_key(key) for key in (keys.CUDA, *composite))
