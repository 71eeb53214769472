"""Ranks share out optimizer state, gradients and weights: DeepSpeed's ZeRO."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import torch
import torch.distributed as torch_dist
from accelerate import Accelerator
from torch import nn

from bushpc.config import CellConfig
from bushpc.dist import World
from bushpc.models.base import Model
from bushpc.train.optim import adamw, set_lr


class Zero:
    """DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) partitioned over the ranks."""

    def __init__(self, cell: CellConfig, world: World, model: Model, trained: dict[str, nn.Parameter]) -> None:
        import deepspeed.ops
        from accelerate import DeepSpeedPlugin
        from accelerate.utils import InitProcessGroupKwargs

        # On a CPU, DeepSpeed compiles collectives that only its inference uses: a minute of two cores at the first
        # start from each environment, while all ranks wait, and an error where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage = int(cell.engine.kind[-1])
        self.size, self.trained = world.size, list(trained.values())
        gradients = sum(parameter.numel() for parameter in self.trained)
        config = {
            "train_micro_batch_size_per_gpu": cell.train.batch_size // (world.size * cell.train.accumulate),
            "gradient_accumulation_steps": cell.train.accumulate,
            "gradient_clipping": cell.train.grad_clip,
            # By default DeepSpeed allocates room for 500 million gradients, which deterministic mode fills each step.
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": min(int(5e8), gradients)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        self.accelerator = Accelerator(
            mixed_precision="no",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            # Without an explicit backend, Accelerate on a CPU assumes a single process.
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if cell.engine.device == "cuda" else "gloo")],
        )
        self.wrapped, _ = self.accelerator.prepare(model, adamw(model, cell.train))
        self.zero = self.wrapped.optimizer
        self._start_optimizer_state()

    def kind(self) -> str:
        from deepspeed import DeepSpeedEngine

        is_zero = isinstance(self.wrapped, DeepSpeedEngine)
        return f"zero{self.wrapped.zero_optimization_stage()}" if is_zero else type(self.wrapped).__name__

    def global_batch(self) -> int:
        return int(self.wrapped.train_batch_size())

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, scale: float | None) -> None:
        if scale is not None:
            self.zero.override_loss_scale(scale)
        self.wrapped.backward(loss)

    def update(self, lr: float, scale: float | None) -> torch.Tensor:
        set_lr(self.zero.optimizer.param_groups, lr)
        self.wrapped.step()
        norm = self.wrapped.get_global_grad_norm()
        return torch.as_tensor(math.inf if self.zero.overflow or norm is None else norm)

    def local_weights(self) -> list[torch.Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param

        if self.stage < 3:
            return [p.detach() for p in self.trained]
        return [safe_get_local_fp32_param(p).detach() for p in self.trained]

    def full_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return parameter.detach() if self.stage < 3 else safe_get_full_fp32_param(parameter).detach()

    def full(self, local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        if self.stage < 3:
            return local
        parts = local.new_empty(self.size * local.numel())
        torch_dist.all_gather_into_tensor(parts, local.contiguous())
        return parts[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]

    def local_part(self, full: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        if self.stage < 3:
            return full
        flat = full.new_zeros(self.size * parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        flat[: full.numel()] = full.flatten()
        return flat.chunk(self.size)[torch_dist.get_rank()]

    def optimizer_state(self, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for key, value in self._flat_state(parameter).items():
            yield key, value if key == "step" else safe_get_full_optimizer_state(parameter, key)

    def load_optimizer(self, parameter: nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for key, value in state.items():
            if key == "step":
                self._flat_state(parameter)[key].copy_(value)
            elif self.stage < 3:
                safe_set_full_optimizer_state(parameter, value.to(self.accelerator.device), key)
            else:  # DeepSpeed can set the full state only if its length is a multiple of the number of ranks
                local = self.local_part(value.to(self.accelerator.device), parameter)
                safe_set_local_optimizer_state(parameter, local, key)

    def _start_optimizer_state(self) -> None:
        """Create AdamW's state now instead of at the first step, filled with zeros, so that a resume can load it."""
        for flat in self._flats():
            self.zero.optimizer.state[flat] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[torch.Tensor]:
        """This rank's flat partition of each parameter group; the optimizer steps on these."""
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def _flat_state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        groups = self.zero.bit16_groups if self.stage < 3 else self.zero.fp16_groups
        [group] = [i for i, members in enumerate(groups) if any(member is parameter for member in members)]
        return self.zero.optimizer.state[self._flats()[group]]
