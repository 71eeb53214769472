"""Settings of the engine: device, precision, DDP or ZeRO."""

from __future__ import annotations

import typing as t

from bushpc.config.fields import Settings, config_class, setting
from bushpc.errors import ConfigError

Engine = t.Literal["ddp", "zero1", "zero2", "zero3"]
Device = t.Literal["cpu", "cuda", "auto"]
Precision = t.Literal["fp32", "bf16", "fp16", "auto"]


@config_class
class EngineConfig(Settings):
    """What runs a training step: device, precision, DDP or ZeRO."""

    prefix: t.ClassVar[str] = "engine."

    kind: Engine = setting(
        "ddp",
        "How ranks share the model. ddp: every rank holds all of it (DistributedDataParallel through Accelerate). "
        "zero1, zero2, zero3: DeepSpeed ZeRO shares out optimizer state, then gradients, then weights.",
    )
    device: Device = setting(
        "auto", "auto uses the GPU where the cluster profile has GPUs, and is settled when a command is composed."
    )
    precision: Precision = setting(
        "auto",
        "auto is bf16 on a GPU (fp16 where cluster.gpus, constraint, partition or account name one without bf16, such "
        "as v100) and fp32 on a CPU. XBusNet's paper uses automatic mixed precision without a type.",
    )
    deterministic: bool = setting(True, "Use deterministic kernels only: two runs are equal bit for bit.")
    compile: bool = setting(False, "Use torch.compile; the first step then takes minutes.")
    channels_last: bool = setting(
        False,
        "Keep images and convolution weights as NHWC, which tensor cores read faster; with ZeRO only the images.",
    )
    recompute: bool = setting(
        False,
        "Activation checkpointing: compute the model's blocks again in the backward pass instead of keeping their "
        "outputs in memory. Not together with compile.",
        affects="nothing",
    )
    hang_s: float = setting(
        1800.0,
        "A rank without progress for this long writes the stack of every thread and ends the job; 0 never does.",
        unit="s",
        affects="nothing",
        ge=0,
    )

    def __post_init__(self) -> None:
        if self.compile and self.recompute:
            raise ConfigError(
                "engine.compile=true with engine.recompute=true: torch.compile cannot trace recomputed blocks; set one "
                "of them to false"
            )
