"""Writes checkpoints in the background: the loop waits only for the copy from the device."""

from __future__ import annotations

import threading
import time
import typing as t
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from bushpc.errors import ResumeError
from bushpc.runs.checkpoint import Parts, newest_whole, write
from bushpc.runs.retention import Retention, retain


class Saver:
    """Writes checkpoints in the background on the main rank: the loop waits only for the copy from the device.

    A failed write (a full disk) is logged, keeps all older checkpoints, and is retried at the next save; only `finish`
    raises.

    Context manager: on exit it waits for a pending write, even if training failed, so no checkpoint is lost.

    folder: the cell's checkpoints. rule: which to keep. still_ours: raises if this process may no longer write here.
    written_s: seconds of each write so far.
    """

    def __init__(
        self, folder: Path, rule: Retention, still_ours: Callable[[], None], log: Callable[[str], None] = print
    ) -> None:
        self.folder, self.rule, self.still_ours, self.log = folder, rule, still_ours, log
        self.written_s: list[float] = []
        self._staged: Parts = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exc: object) -> None:
        self._wait()

    def save(self, step: int, tensors: Iterable[tuple[str, str, torch.Tensor]], meta: Mapping[str, t.Any]) -> None:
        """Copy (part, name, tensor) triples to the host and start writing them; first waits for the previous save.

        Raises: what `still_ours` raised in the background since the last call.
        """
        self._wait()
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error
        self._error = None
        parts = self._copy_out(tensors)
        self._thread = threading.Thread(target=self._write, args=(step, parts, dict(meta)), name="save", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last save is on disk. Raises: ResumeError if it could not be written."""
        self._wait()
        if self._error is not None:
            error, self._error = self._error, None
            if not isinstance(error, OSError):
                raise error
            intact = newest_whole(self.folder)
            raise ResumeError(
                f"the last checkpoint could not be written to {self.folder} ({error}). "
                + ("" if intact is None else f"A restart resumes from step {intact}, which is intact. ")
                + "Free some space there and run the same command again"
            ) from error

    def _copy_out(self, tensors: Iterable[tuple[str, str, torch.Tensor]]) -> Parts:
        # Reuse the same host memory for every save: fresh memory costs a page fault per 4 KiB, more than the copy.
        parts: Parts = {}
        on_gpu = False
        for part, name, tensor in tensors:
            staged = self._staged.setdefault(part, {})
            if name not in staged:
                staged[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            on_gpu = on_gpu or tensor.is_cuda
            staged[name].copy_(tensor.detach(), non_blocking=True)
            parts.setdefault(part, {})[name] = staged[name]
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return parts

    def _write(self, step: int, parts: Parts, meta: dict[str, t.Any]) -> None:
        began = time.monotonic()
        try:
            self.still_ours()
            write(self.folder, step, parts, meta, self.still_ours)
        except OSError as error:
            self._error = error
            intact = newest_whole(self.folder)
            self.log(
                f"checkpoint of step {step} could not be written: {error}; "
                + ("" if intact is None else f"step {intact} is kept, ")
                + "the next save tries again: free some space"
            )
        except BaseException as error:  # raised again in the loop, where it can end the run
            self._error = error
        else:
            self._retain()
        self.written_s.append(time.monotonic() - began)

    def _retain(self) -> None:
        try:
            self.still_ours()
            retain(self.folder, self.rule, self.log)
        except OSError as error:  # the new checkpoint is sealed anyway
            self.log(f"older checkpoints in {self.folder} could not be deleted: {error}; the next save tries again")
        except BaseException as error:
            self._error = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
