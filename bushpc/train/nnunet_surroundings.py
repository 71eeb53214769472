"""What nnU-Net finds around it while it is called: our folders, threads for its processes, seeded workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import types
import typing as t
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

from bushpc.config import CellConfig
from bushpc.data.cache import DecodingStopped
from bushpc.dist import keyed_seed
from bushpc.process import STOP_SIGNALS, end_with_parent
from bushpc.train.preempt import StopFlag

_forking_workers = False
_asked_forks = False


def clear(folder: Path) -> None:
    """Delete what nnU-Net trains from; its results stay."""
    (folder / "prepared").unlink(missing_ok=True)
    for part in ("raw", "preprocessed"):
        shutil.rmtree(folder / part, ignore_errors=True)


@contextlib.contextmanager
def surroundings(cell: CellConfig, folder: Path) -> Iterator[None]:
    """nnU-Net is told by the environment where its folders are and what it may use; nothing leaves the machine."""
    words = {
        **{f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")},
        **dict.fromkeys(("nnUNet_n_proc_DA", "nnUNet_def_n_proc"), str(max(1, cell.loader.workers))),
        "nnUNet_compile": str(cell.engine.compile).lower(),
        "nnUNet_wandb_enabled": "0",
    }
    before = {name: os.environ.get(name) for name in words}
    os.environ.update(words)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Threads(ThreadPool):
    """In place of a pool of processes; of each of its scans nnU-Net asks several times a second whether it is ready."""

    def __init__(self, threads: int, stop: StopFlag, alive: Callable[[str], None]) -> None:
        super().__init__(threads)
        self.stop, self.alive = stop, alive

    def starmap_async(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        """As ever, and then asking raises DecodingStopped where a stop signal came."""
        scan: t.Any = super().starmap_async(*args, **kwargs)
        is_ready = scan.ready

        def ready() -> bool:
            if self.stop:
                raise DecodingStopped
            if done := is_ready():
                self.alive("nnU-Net's preparation")
            return bool(done)

        scan.ready = ready
        return scan


@contextlib.contextmanager
def threads_for_processes(stop: StopFlag, alive: Callable[[str], None]) -> Iterator[None]:
    """nnU-Net's pools have threads: each of its processes would import torch anew, and die of a job's stop signal."""
    before = multiprocessing.get_context
    context: t.Any = types.SimpleNamespace(Pool=lambda threads: _Threads(threads, stop, alive))
    multiprocessing.get_context = lambda method=None: context
    try:
        yield
    finally:
        multiprocessing.get_context = before


@contextlib.contextmanager
def workers(cell: CellConfig, trainer: t.Any) -> Iterator[None]:
    """Begin training as nnU-Net does; the processes that it starts for that end with what follows, however it ends.

    Python would end them by TERM, which they are deaf to, and then wait for them.
    """
    augmenters: list[t.Any] = []
    try:
        with _seeded(cell.seed, trainer.current_epoch, augmenters), _ours():
            trainer.on_train_start()
        yield
    finally:
        processes = [process for augmenter in augmenters for process in augmenter._processes]
        for augmenter in augmenters:
            augmenter._finish()
        for process in processes:
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, made: list[t.Any]) -> Iterator[None]:
    """Worker processes draw by the run's seed, not by the system's. made: gets every augmenter that has such."""
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    augmenter = module.NonDetMultiThreadedAugmenter

    def of_seed(**given: t.Any) -> t.Any:
        numbers = range(given["num_processes"])
        seeds = [keyed_seed(seed, "nnunet worker", epoch, len(made), number) % 2**32 for number in numbers]
        made.append(augmenter(**{**given, "seeds": seeds}))
        return made[-1]

    module.NonDetMultiThreadedAugmenter = of_seed
    try:
        yield
    finally:
        module.NonDetMultiThreadedAugmenter = augmenter


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    """Processes forked meanwhile end with this one, however it ends, and leave stop signals to it."""
    global _forking_workers, _asked_forks
    if not _asked_forks:
        _asked_forks = True
        os.register_at_fork(after_in_child=lambda: end_with_parent() if _forking_workers else None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    _forking_workers = True
    try:
        yield
    finally:
        _forking_workers = False
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def always_the_same_kernels(trainer: t.Any) -> None:
    """nnU-Net's blur times two ways of convolving and takes the faster one, which is another one every time."""
    loader = getattr(trainer.dataloader_train, "data_loader", None)
    for transform in loader.transforms.transforms if loader else ():
        of_random: t.Any = getattr(transform, "transform", None)
        if hasattr(of_random, "benchmark"):
            of_random.benchmark = False
