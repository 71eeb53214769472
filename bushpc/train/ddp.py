"""Every rank holds all of the model and its optimizer: DistributedDataParallel, through Accelerate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from bushpc.config import CellConfig
from bushpc.dist import World
from bushpc.models.base import Model
from bushpc.train.optim import adamw, set_lr


class Ddp:
    """The whole model on every rank."""

    def __init__(self, cell: CellConfig, world: World, model: Model) -> None:
        self.cell = cell
        self.accelerator = Accelerator(mixed_precision="no", cpu=cell.engine.device == "cpu")
        self.model, self.optimizer = model, adamw(model, cell.train)
        self.wrapped, self._prepared = self.accelerator.prepare(model, self.optimizer)
        self.size = world.size

    def kind(self) -> str:
        wrapped = isinstance(self.wrapped, nn.parallel.DistributedDataParallel)
        return "ddp" if wrapped == (self.size > 1) else "separate ranks"

    def global_batch(self) -> int:
        return self.cell.train.batch_size

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last or self.size == 1 else self.wrapped.no_sync()

    def backward(self, loss: torch.Tensor, scale: float | None) -> None:
        (loss * ((scale or 1.0) / self.cell.train.accumulate)).backward()

    def update(self, lr: float, scale: float | None) -> torch.Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if scale is not None:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm = nn.utils.get_total_norm(gradients)
        if scale is None or math.isfinite(float(norm)):
            if self.cell.train.grad_clip:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cell.train.grad_clip, norm)
            set_lr(self.optimizer.param_groups, lr)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def local_weights(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.model.parameters() if p.requires_grad]

    def full_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    def full(self, local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        return local

    def local_part(self, full: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        return full

    def optimizer_state(self, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.optimizer.state.get(parameter, {}).items()

    def load_optimizer(self, parameter: nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        if state:
            self.optimizer.state[parameter] = {
                # AdamW keeps its step counter on the CPU.
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in state.items()
            }
