"""Does a training step fit its GPU? Estimated peaks (gpu_memory.yaml, from tools/fake_gpu), before the queue.

CellConfig → the estimate of the same network and training → a warning, or nothing
"""

from __future__ import annotations

import functools
import typing as t
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from bushpc.config.cell import CellConfig
from bushpc.config.fields import fields_of
from bushpc.config.gpus import memory_gb
from bushpc.config.read import YAML_LOADER, plain

TABLE = Path(__file__).with_name("gpu_memory.yaml")
# Share of a GPU's memory that a step may take: the CUDA context, the workspaces of cuDNN and cuBLAS, and free blocks
# between others are not in the estimate.
SHARE = 0.9
FIRST_WEIGHTS = ("pretrained", "weights_sha256", "base", "base_sha256")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Peak of a step on one GPU in GB (10^9 bytes): base_gb + image_gb for each image of a micro-batch.

    floor_gb: at the least, as the optimizer has a peak too, which does not depend on the images. image_s: seconds of an
    A100 for an image of a step, at half of what its peaks allow; a stated guess, see benchmarks/2026-11-30_fake_gpu.
    """

    name: str
    floor_gb: float
    base_gb: float
    image_gb: float
    image_s: float = 0.0

    def peak_gb(self, images: int) -> float:
        """With this many images at a time."""
        return max(self.floor_gb, self.base_gb + self.image_gb * images)

    def fits(self, gigabytes: float) -> int:
        """The most images at a time on a GPU of this size; 0 if not even one fits."""
        room = SHARE * gigabytes
        return 0 if self.floor_gb > room else max(0, int((room - self.base_gb) / self.image_gb))


def memory_settings(cell: CellConfig) -> dict[str, t.Any]:
    """What the memory of a step depends on: the network and how it is trained, by the names of the settings.

    Of the model's settings those that affect training and are no fractions: weights of losses change no memory, and
    neither do the values that the network starts from.
    """
    model = {
        f"model.{name}": plain(getattr(cell.model, name))
        for name in fields_of(type(cell.model))
        if cell.model.about(name).affects == "training" and name not in FIRST_WEIGHTS
    }
    return {
        "model": cell.model_class.__name__,
        **{name: value for name, value in model.items() if not isinstance(value, float)},
        "loader.features": cell.loader.features,
        "half": cell.engine.precision in ("bf16", "fp16"),
        "engine.recompute": cell.engine.recompute,
        "engine.channels_last": cell.engine.channels_last,
        "engine.deterministic": cell.engine.deterministic,
        "train.ema": bool(cell.train.ema),
    }


def estimate(cell: CellConfig) -> Estimate | None:
    """Of this very network and training; None if the table has none, and with ZeRO, torch.compile or train.freeze."""
    if cell.engine.kind != "ddp" or cell.engine.compile or cell.train.freeze:
        return None
    ours = memory_settings(cell)
    defaults = {f"model.{name}": plain(info.default) for name, info in fields_of(type(cell.model)).items()}
    for row in _table():
        # A setting that is newer than the table must have its default.
        if ours == {**{name: defaults.get(name) for name in ours}, **row["settings"]}:
            return Estimate(**{name: value for name, value in row.items() if name != "settings"})
    return None


def smallest(gpus: Iterable[str]) -> str | None:
    """The name of the GPU with the least memory; None if none is known."""
    known = {name: size for name in gpus if (size := memory_gb(name)) is not None}
    return min(known, key=known.__getitem__, default=None)


def images_at_a_time(cell: CellConfig) -> int:
    """Of a micro-batch of one rank."""
    return max(1, cell.train.batch_size // (cell.cluster.world_size * cell.train.accumulate))


def too_large(cell: CellConfig, gpus: Iterable[str]) -> str | None:
    """Why a step probably does not fit the smallest of these GPUs, and what to do; None if it fits or nobody knows.

    gpus: their names.
    """
    name = smallest(gpus)
    expected = estimate(cell) if name and cell.engine.device == "cuda" else None
    if name is None or expected is None:
        return None
    size = memory_gb(name) or 0.0
    images = images_at_a_time(cell)
    if expected.peak_gb(images) <= SHARE * size:
        return None
    most = expected.fits(size)
    parts = f"train.accumulate={-(-cell.train.batch_size // (cell.cluster.world_size * most))} or more" if most else ""
    ways = [parts, "" if cell.engine.recompute else "engine.recompute=true", "a larger GPU"]
    return (
        f"a step of {images} image(s) takes about {expected.peak_gb(images):.0f} GB, and {name} has {size:g} GB "
        f"({most} image(s) fit): use {', or '.join(way for way in ways if way)}"
    )


@functools.cache
def _table() -> list[dict[str, t.Any]]:
    return t.cast(list[dict[str, t.Any]], yaml.load(TABLE.read_text(), YAML_LOADER)["rows"])
