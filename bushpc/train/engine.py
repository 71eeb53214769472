"""The engine under the loop: ranks, ZeRO, precision, accumulation and averaging behind one interface for all models.

    Engine(cell, world, model, resumed) → losses(batch) → update(lr) → tensors() → checkpoint

Accelerate provides DDP and DeepSpeed's ZeRO. Precision is the same under every engine: autocast around the model's
forward, and our own loss scale. DeepSpeed's own support is not used, because its bf16 casts BatchNorm's weights but
not its buffers, and its autocast clips fp16 gradients before removing the loss scale (both in 0.19). The engine returns
full fp32 tensors, one per parameter, however they are partitioned, so any engine with any number of ranks can resume
from them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import typing as t
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch import nn

from bushpc.config import CellConfig
from bushpc.config.gpus import Capability, has_bf16
from bushpc.data.augment.device import changed
from bushpc.dist import World, join, share_buffers
from bushpc.errors import ResumeError, TrainingError
from bushpc.models.base import Model
from bushpc.nn.recompute import recompute
from bushpc.nn.uncompiled import leave_out_of_graphs
from bushpc.runs.checkpoint import Checkpoint
from bushpc.sample import Batch, Losses
from bushpc.train.ddp import Ddp
from bushpc.train.fine_tune import frozen_norms
from bushpc.train.optim import Average
from bushpc.train.zero import Zero

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# torch's defaults for a loss scale: initial value, growth factor, backoff factor, and steps without overflow to growth.
FIRST_SCALE, GROWTH, RETREAT, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What actually runs, read from the running objects. engine: ddp, zero1, zero2 or zero3."""

    engine: str
    ranks: int
    device: str
    precision: str
    global_batch: int

    def __str__(self) -> str:
        return f"{self.engine}, {self.ranks} rank(s) on {self.device}, {self.precision}, batch {self.global_batch}"


class Engine:
    """One rank's part of a training.

    model: trained in place; `predictor` returns the weights to predict with.
    Raises: TrainingError if world, engine or device differ from the config; ResumeError if `resumed` does not fit the
    model.
    """

    def __init__(self, cell: CellConfig, world: World, model: Model, resumed: Checkpoint | None = None) -> None:
        self.cell, self.config, self.model = cell, cell.engine, model
        if resumed:
            _load_model(model, resumed)
        self.parameters = model.parameter_count()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen_norms = frozen_norms(model, cell.train.freeze)
        # Copied before ZeRO-3 partitions the parameters; predictions load the full ones into it.
        self._replica = copy.deepcopy(model) if cell.train.ema or self.config.kind == "zero3" else None
        if self.config.recompute:
            recompute(model, model.config.blocks)
        self.autocast = lambda: torch.autocast(
            self.config.device, DTYPES[self.config.precision], enabled=self.config.precision != "fp32"
        )
        forward = model.forward
        model.forward = lambda batch: self._with_autocast(forward, batch)  # type: ignore[method-assign]
        if self.config.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.config.compile:
            leave_out_of_graphs()
            model.compile()
        if self.config.kind == "ddp":
            self._ranks: Ddp | Zero = Ddp(cell, world, model)
        else:
            self._ranks = Zero(cell, world, model, self.trained)
        self.device: torch.device = self._ranks.accelerator.device
        self.facts = self._check(world)
        self.scale = _LossScale() if self.config.precision == "fp16" else None
        self.average = Average(self._ranks.local_weights(), cell.train.ema) if cell.train.ema else None
        # Averaged weights give other features than today's, whose statistics would not fit them.
        statistics = running_statistics(model)
        averaged = bool(statistics and cell.train.ema)
        self.average_statistics = Average(list(statistics.values()), cell.train.ema) if averaged else None
        if resumed:
            self._load(resumed)

    def train(self) -> None:
        """Switch the model to training mode, all but frozen BatchNorms."""
        self.model.train()
        for norm in self._frozen_norms:
            norm.eval()

    def losses(self, batch: Batch, last: bool = True) -> Losses:
        """Forward and backward pass on one micro-batch of this rank; gradients accumulate until `update`.

        last: this is the step's last micro-batch, after which the ranks exchange gradients.
        """
        if len(batch.keys) * self.facts.ranks * self.cell.train.accumulate != self.cell.train.batch_size:
            raise TrainingError(
                f"{self.cell.train.accumulate} micro-batch(es) of {len(batch.keys)} samples on each of "
                f"{self.facts.ranks} rank(s) do not add up to train.batch_size={self.cell.train.batch_size}"
            )
        batch = changed(batch, self.device).to(self.device)
        if self.config.channels_last:
            batch = batch.channels_last()
        with self._ranks.micro_batch(last):
            losses: Losses = self._ranks.wrapped(batch)
            self._ranks.backward(losses.total, self.scale.value if self.scale else None)
        return losses

    def update(self, lr: float) -> torch.Tensor:
        """Clip the gradients, step, and clear them; returns their norm before clipping, inf if it is not finite.

        With ZeRO and with fp16, a step whose gradient is not finite leaves the weights unchanged. Raises: TrainingError
        if gradients still overflow with an fp16 loss scale below 1.
        """
        norm = self._ranks.update(lr, self.scale.value if self.scale else None)
        if self.scale:
            self.scale.update(overflow=not math.isfinite(float(norm)))
        if self.average:
            self.average.update(self._ranks.local_weights())
        if self.average_statistics:
            self.average_statistics.update(list(running_statistics(self.model).values()))
        return norm

    def tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (part, name, tensor) for everything in a checkpoint. Collective: every rank must exhaust it."""
        for name, parameter in self.trained.items():
            yield "model", name, self._ranks.full_weight(parameter)
        for name, buffer in _saved_buffers(self.model):
            yield "model", name, buffer
        for name, parameter in self.trained.items():
            for key, value in self._ranks.optimizer_state(parameter):
                yield "optimizer", f"{key}/{name}", value
        if self.average:
            for (name, parameter), averaged in zip(self.trained.items(), self.average.tensors, strict=True):
                yield "ema", name, self._ranks.full(averaged, parameter)
        for name, statistic in self._averaged_statistics().items():
            yield "ema", name, statistic

    def state(self) -> dict[str, t.Any]:
        """What a checkpoint's meta.json holds besides the tensors."""
        return {
            "scale": vars(self.scale) if self.scale else None,
            "average_updates": self.average.updates if self.average else 0,
            "engine": self.config.kind,
            "world": self.facts.ranks,
        }

    @contextlib.contextmanager
    def predictor(self) -> Iterator[Model]:
        """The model in evaluation mode with the weights to predict with: their average, if one is kept.

        Collective. Every rank gets rank 0's buffers, which are the ones in a checkpoint.
        """
        share_buffers(self.model)
        if self._replica is None:
            self.model.eval()
            yield self.model
            self.train()
            return
        replica = self._replica.to(self.device)
        replica_parameters = dict(replica.named_parameters())
        averaged = self.average.tensors if self.average else [None] * len(self.trained)
        with torch.no_grad():
            for (name, parameter), mean in zip(self.trained.items(), averaged, strict=True):
                full = self._ranks.full_weight(parameter) if mean is None else self._ranks.full(mean, parameter)
                replica_parameters[name].copy_(full)
            for buffer, replica_buffer in zip(self.model.buffers(), replica.buffers(), strict=True):
                replica_buffer.copy_(buffer)
            for name, statistic in self._averaged_statistics().items():
                replica.get_buffer(name).copy_(statistic)
        share_buffers(replica)
        replica.eval()
        yield replica

    def _averaged_statistics(self) -> dict[str, torch.Tensor]:
        if not self.average_statistics:
            return {}
        return dict(zip(running_statistics(self.model), self.average_statistics.tensors, strict=True))

    def _with_autocast(self, forward: t.Callable[[Batch], Losses], batch: Batch) -> Losses:
        with self.autocast():
            return forward(batch)

    def _check(self, world: World) -> EngineFacts:
        facts = EngineFacts(
            engine=self._ranks.kind(),
            ranks=torch_dist.get_world_size() if torch_dist.is_initialized() else 1,
            device=self.device.type,
            precision=self._real_precision(),
            global_batch=self._ranks.global_batch(),
        )
        asked = EngineFacts(
            engine=self.config.kind,
            ranks=world.size,
            device=self.config.device,
            precision=self.config.precision,
            global_batch=self.cell.train.batch_size,
        )
        if facts != asked:
            raise TrainingError(f"asked for {asked}; got {facts}. Check the launcher, the drivers and cluster.gpus")
        return facts

    def _real_precision(self) -> str:
        """The precision of a matrix product under autocast, which only warns about a type it does not support."""
        with self.autocast():
            ones = torch.ones(8, 8, device=self.device)
            dtype = (ones @ ones).dtype
        return next(name for name, known in DTYPES.items() if known == dtype)

    def _load(self, resumed: Checkpoint) -> None:
        saved = resumed.parts.get("optimizer", {})
        for name, parameter in self.trained.items():
            keys = [key.partition("/")[0] for key in saved if key.partition("/")[2] == name]
            self._ranks.load_optimizer(parameter, {key: saved[f"{key}/{name}"] for key in keys})
        if self.scale and resumed.meta["scale"]:
            self.scale.__dict__.update(resumed.meta["scale"])
        if self.average and "ema" in resumed.parts:
            for (name, parameter), averaged in zip(self.trained.items(), self.average.tensors, strict=True):
                averaged.copy_(self._ranks.local_part(resumed.parts["ema"][name].to(averaged.device), parameter))
            self.average.updates = resumed.meta["average_updates"]
        if self.average_statistics:
            # A checkpoint from before they were averaged has today's alone, which the model has by now.
            ema, today = resumed.parts.get("ema", {}), running_statistics(self.model)
            for name, statistic in self._averaged_statistics().items():
                statistic.copy_(ema.get(name, today[name]))
            self.average_statistics.updates = resumed.meta["average_updates"]


class _LossScale:
    """fp16's loss scale: grows periodically; when a gradient overflows, it halves and the step is skipped."""

    def __init__(self) -> None:
        self.value, self.good_steps = FIRST_SCALE, 0

    def update(self, *, overflow: bool) -> None:
        """Update the scale after a step. Raises: TrainingError if gradients overflow with a scale below 1."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value *= RETREAT
        elif self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * GROWTH, 0
        if self.value < 1.0:
            raise TrainingError(
                "the fp16 loss scale fell below 1 and gradients still overflow. Lower train.lr, or use "
                "engine.precision=bf16 or fp32; the last checkpoint is unchanged"
            )


def start_ranks(cell: CellConfig, world: World) -> None:
    """Start the process group as the config says, ignoring the launcher's environment and library defaults."""
    config = cell.engine
    if config.device == "cuda":
        refuse_emulated_bf16(config.precision)
    if "OMP_NUM_THREADS" not in os.environ:
        # Our jobs set it. Otherwise torch and Accelerate take all cores for each rank, and the ranks wait for each
        # other's threads: two such ranks were six times slower than two with one thread each.
        share = max(1, len(os.sched_getaffinity(0)) // cell.cluster.ranks_per_node)
        torch.set_num_threads(min(torch.get_num_threads(), share))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ["DS_ACCELERATOR"] = config.device
    if world.size == 1 and config.kind == "ddp":  # with a launcher's variables, Accelerate would open a process group
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    if config.device == "cuda":  # torch's default for convolutions is TF32, which must not replace a requested fp32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision != "fp32"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a fixed one to be deterministic
        torch.use_deterministic_algorithms(True)
    join(
        world,
        cuda=config.device == "cuda",
        timeout_s=2 * config.hang_s,  # longer than the watchdog's, whose message is more useful
        alone=config.kind != "ddp",  # DeepSpeed needs a process group even for one rank
    )


def refuse_emulated_bf16(precision: str) -> None:
    """Raises: TrainingError for bf16 on a GPU without it: torch would emulate it, more slowly than fp32."""
    if precision != "bf16" or torch.version.hip or not torch.cuda.is_available():
        return
    capability = Capability(*torch.cuda.get_device_capability())
    if not has_bf16(capability):
        raise TrainingError(
            f"engine.precision=bf16, and {torch.cuda.get_device_name()} (compute capability {capability}) has no bf16: "
            "start anew with engine.precision=fp16. Where the profile names the type of the GPUs, as in "
            "cluster.gpus=v100:4, engine.precision=auto chooses fp16 by itself"
        )


def _load_model(model: Model, resumed: Checkpoint) -> None:
    try:
        model.load_state_dict(resumed.parts["model"])
    except RuntimeError as error:
        raise ResumeError(f"{resumed.path} does not fit this model: {error}") from error


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances of all BatchNorms, by name, in float32."""
    norms = ((name, norm) for name, norm in model.named_modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm))
    return {
        f"{name}.{buffer}": tensor.float()
        for name, norm in norms
        for buffer, tensor in norm.named_buffers()
        if tensor.is_floating_point()
    }


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers in the state dict, by name."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            yield name, tensor
