"""One case on the fake GPU: two training steps through the real Engine, a checkpoint's copy, prediction, generation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback
import typing as t
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from bushpc.cell import build_model
from bushpc.config import CellConfig
from bushpc.config.gpu_memory import memory_settings
from bushpc.dist import World
from bushpc.models.base import Model
from bushpc.sample import Batch
from bushpc.train.engine import Engine, start_ranks
from bushpc.train.loop import Health
from tools.fakegpu.cases import Case, batch_of, cell_of
from tools.fakegpu.deterministic import judge
from tools.fakegpu.device import CUDA, fake_cuda
from tools.fakegpu.memory import PeakMemory
from tools.fakegpu.record import Record

ROOT = Path(__file__).resolve().parents[2]
OK = "ok"
# Batches of the memory's line: the first, the largest, and by what factor two slopes may differ.
FIRST, MOST, EVEN = 2, 512, 1.02


@dataclasses.dataclass
class Row:
    """What one case showed. training, prediction, generation: ok, or the error; None where there is none to try.

    host_reads: how often the host waits for a value of the GPU in a step. peak_gb: of the second step, which has the
    optimizer's state; floor_gb, base_gb, image_gb: see bushpc.config.gpu_memory; not measured where 0. gflop, gbyte,
    ideal_s: of that step; operators: how many calls. kernels: of attention. settings: what memory depends on.
    """

    name: str
    precision: str
    image_size: int
    batch: int
    training: str = OK
    prediction: str = OK
    generation: str | None = None
    host_reads: int = 0
    peak_gb: float = 0.0
    checkpoint_gb: float = 0.0
    floor_gb: float = 0.0
    base_gb: float = 0.0
    image_gb: float = 0.0
    gflop: float = 0.0
    gbyte: float = 0.0
    ideal_s: float = 0.0
    operators: int = 0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    without_kernel: list[str] = dataclasses.field(default_factory=list)
    raises: list[str] = dataclasses.field(default_factory=list)
    documented: list[str] = dataclasses.field(default_factory=list)
    differs: list[str] = dataclasses.field(default_factory=list)
    settings: dict[str, t.Any] = dataclasses.field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def failed(self) -> bool:
        return any(one not in (None, OK) for one in (self.training, self.prediction, self.generation))


def try_case(case: Case, precision: str) -> Row:
    """Everything that a cell does on a GPU; no error is raised, it is in the row. Memory's line is taken in bf16."""
    cell = cell_of(case, precision)
    part = cell.train.batch_size // cell.train.accumulate
    row = Row(case.name, precision, cell.model.image_size, part, settings=memory_settings(cell))
    began = time.perf_counter()
    memory = PeakMemory()
    with _as_a_rank(), fake_cuda() as gpu, memory:
        try:
            start_ranks(cell, World())
            engine = Engine(cell, World(), build_model(cell))
            _train(row, cell, engine, gpu, memory)
            if case.memory and precision == "bf16":
                _measure_line(row, cell, engine, memory)
        except Exception as error:
            row.training = _told(error)
            row.prediction = "not tried"
        else:
            _use(row, cell, engine)
        row.kernels = dict(gpu.attention.chosen)
    row.wall_s = time.perf_counter() - began
    return row


@contextlib.contextmanager
def _as_a_rank() -> Iterator[None]:
    """What `start_ranks` sets for the process is as before afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), matmul.allow_tf32, cudnn.allow_tf32
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        deterministic, matmul.allow_tf32, cudnn.allow_tf32 = before
        torch.use_deterministic_algorithms(deterministic)


def _train(row: Row, cell: CellConfig, engine: Engine, gpu: t.Any, memory: PeakMemory) -> None:
    engine.train()
    step(engine, cell, _batch(engine, cell))
    batch, before, record = _batch(engine, cell), gpu.reads.count, Record()
    with record:
        row.peak_gb = _peak_gb(engine, cell, batch, memory)
    row.host_reads = gpu.reads.count - before
    row.gflop, row.gbyte, row.ideal_s = record.flops / 1e9, record.bytes / 1e9, record.seconds
    row.operators = record.calls
    row.without_kernel = sorted(record.without_kernel)
    row.raises, row.documented, row.differs = judge(record.operators)
    copied = [tensor.to("cpu") for _, _, tensor in engine.tensors()]
    row.checkpoint_gb = sum(tensor.numel() * tensor.element_size() for tensor in copied) / 1e9


def _measure_line(row: Row, cell: CellConfig, engine: Engine, memory: PeakMemory) -> None:
    """floor_gb, base_gb and image_gb, from batches of 1, 2, 4 … images until the peak grows evenly."""
    peaks: list[float] = []
    slopes: list[float] = []
    while len(slopes) < 2 or not 0 < slopes[-2] < slopes[-1] * EVEN or slopes[-1] > slopes[-2] * EVEN:
        images = FIRST << len(peaks)
        train = dataclasses.replace(cell.train, batch_size=images, accumulate=1)
        engine.cell = dataclasses.replace(cell, train=train)
        peaks.append(_peak_gb(engine, engine.cell, _batch(engine, engine.cell), memory))
        if len(peaks) > 1:
            slopes.append((peaks[-1] - peaks[-2]) / (images / 2))
        if images >= MOST:
            break
    row.floor_gb, row.image_gb = peaks[0], slopes[-1]
    row.base_gb = peaks[-1] - row.image_gb * (FIRST << len(peaks) - 1)


def _peak_gb(engine: Engine, cell: CellConfig, batch: Batch, memory: PeakMemory) -> float:
    memory.restart()
    step(engine, cell, batch)
    return memory.peak(CUDA) / 1e9


def _batch(engine: Engine, cell: CellConfig) -> Batch:
    """As the loader hands it over, with the stored features where there are some."""
    batch = batch_of(cell, cell.train.batch_size)
    if not cell.loader.features:
        return batch
    with torch.no_grad(), engine.autocast():
        features = engine.model.features(batch.to(CUDA).image_BCHW)
    return dataclasses.replace(batch, features={name: value.to("cpu") for name, value in features.items()})


def step(engine: Engine, cell: CellConfig, batch: Batch) -> None:
    """One optimizer step as the loop makes it."""
    health = Health(engine.device)
    parts = batch.split(cell.train.accumulate)
    losses = [engine.losses(part, last=part is parts[-1]) for part in parts]
    norm = engine.update(cell.train.lr)
    health.watch(1, losses, norm, batch, overflow_allowed=engine.scale is not None)
    assert not health.broken()


def _use(row: Row, cell: CellConfig, engine: Engine) -> None:
    batch = batch_of(cell, min(2, row.batch)).to(CUDA)
    with engine.predictor() as model:
        row.prediction = _tried(lambda: _predict(engine, model, batch))
        if hasattr(model, "generate") and "vae" not in row.name:
            row.generation = _tried(lambda: _generate(engine, model, batch))


def _predict(engine: Engine, model: Model, batch: t.Any) -> None:
    with torch.inference_mode(False), torch.no_grad(), engine.autocast():
        made = model.predict(batch)
    for field in dataclasses.fields(made):
        for value in _tensors(getattr(made, field.name)):
            assert value.device == CUDA, f"{field.name} is on {value.device}"
            assert value.dtype == torch.float32, f"{field.name} is {value.dtype}"


def _generate(engine: Engine, model: Model, batch: t.Any) -> None:
    with torch.no_grad(), engine.autocast():
        t.cast(t.Any, model).generate(batch.mask_BKHW[:, 0], batch.conditions["captions"], [1] * len(batch.keys))


def _tensors(value: t.Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)


def _tried(work: t.Callable[[], None]) -> str:
    try:
        work()
    except Exception as error:
        return _told(error)
    return OK


def _told(error: Exception) -> str:
    """The error and the line of ours that it came through."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        with contextlib.suppress(ValueError):
            inside = Path(frame.filename).relative_to(ROOT)
            if inside.parts[0] == "bushpc":
                where = f"{inside}:{frame.lineno}: "
    return f"{where}{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
