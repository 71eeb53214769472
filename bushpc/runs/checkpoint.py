"""Sealed checkpoints: complete and verified, or absent. The trainer writes them; resume and evaluation read them.

<cell>/checkpoints/step_00000300/
  model.safetensors      trained parameters and buffers
  optimizer.safetensors  the optimizer's tensors, <key>/<parameter>
  ema.safetensors        averaged parameters, where train.ema is on
  meta.json              step, settings, loss scale, measurements, and other state
  seal.json              SHA-256 of the other files, written last; then the folder is renamed into place
  validation.json        only if a stop signal preceded the validation: its later result, outside the seal
<cell>/checkpoints/unread_step_…    failed verification when a run resumed from an earlier one; kept for inspection
<run>/frozen/<sha256>.safetensors   parameters that training does not change, stored once for all cells of a run

Tensors are stored unpartitioned, whatever engine and number of ranks wrote them, so any other can resume from them.
Random numbers and the loader's position are functions of the step (bushpc.dist, bushpc.data.loader), so storing the
step is enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import typing as t
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

from bushpc.config import freeze
from bushpc.dist import from_main_or_raise, gather
from bushpc.errors import ResumeError
from bushpc.files import flush_file, flush_folder, sha256_of, share_file, write_atomically
from bushpc.runs.layout import checkpoint_in

SEAL, META, LATE_VALIDATION = "seal.json", "meta.json", "validation.json"
NAME = re.compile(r"step_(\d{8,})")
# What json and safetensors raise for invalid files.
READING_FAILS = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError),
    SafetensorError,
)

# Part of a checkpoint (model, optimizer, ema) → tensor name → tensor.
Parts = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint in memory; tensors are on the CPU. `parts["model"]` includes the frozen parameters."""

    path: Path
    step: int
    parts: Parts
    meta: dict[str, t.Any]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints to keep: the newest `keep`, those at multiples of `every` (0 for none), and the best.

    best: a validation metric (`more`: higher is better); None for none.
    """

    keep: int
    every: int = 0
    best: str | None = None
    more: bool = True


def frozen_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters with requires_grad off, on the CPU."""
    named = model.named_parameters()
    return {name: p.detach().cpu().contiguous() for name, p in named if not p.requires_grad}


def store_frozen(store: Path, frozen: dict[str, torch.Tensor]) -> str | None:
    """Store frozen parameters in the run, once per content; returns their SHA-256 (None if empty).

    A damaged stored file is replaced. Raises: ResumeError if they cannot be written.
    """
    if not frozen:
        return None
    content = save(frozen)
    sha256 = hashlib.sha256(content).hexdigest()
    target = store / f"{sha256}.safetensors"
    if not _is_stored(target, sha256):
        try:
            store.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content)
        except OSError as error:
            # Another cell may have stored the same meanwhile and deleted our partial file as a leftover.
            if not _is_stored(target, sha256):
                raise ResumeError(
                    f"the frozen parameters could not be written to {store} ({error}). Fix that, or free some space "
                    "there, and run the same command again"
                ) from error
    for leftover in store.glob(f".{target.name}.*"):
        with contextlib.suppress(OSError):
            leftover.unlink()
    return sha256


def write(
    folder: Path, step: int, parts: Parts, meta: Mapping[str, t.Any], still_ours: Callable[[], None] = lambda: None
) -> Path:
    """Write checkpoint `step` in `folder` and seal it; an intact one of this step is left unchanged.

    still_ours: called before the final rename; if it raises, nothing is left behind.
    Raises: OSError, for example for a full disk; the partial checkpoint is then deleted, and nothing else changes.
    """
    target = checkpoint_in(folder, step)
    if os.path.lexists(target) and _is_whole(target):
        return target
    # Include the host: processes in containers on two nodes often have the same ids.
    aside = folder / f".{target.name}.{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        (aside / META).write_text(
            json.dumps({**freeze.CHECKPOINT.stamp(), "step": step, "parts": list(parts), **meta}, indent=1)
        )
        for part, tensors in parts.items():
            path = aside / f"{part}.safetensors"
            save_file(tensors, path)
            shutil.copymode(aside / META, path)  # safetensors ignores the umask and omits group permissions
        hashes = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        for name in hashes:
            flush_file(aside / name)
        write_atomically(aside / SEAL, json.dumps(hashes, indent=1))
        still_ours()
        if os.path.lexists(target):
            _set_aside(target)
        aside.rename(target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, SafetensorError):  # safetensors reports a full disk like this
            raise OSError(f"{aside} could not be written: {error}") from error
        raise
    flush_folder(folder)
    return target


def newest(folder: Path, frozen_store: Path, log: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint that every rank can read and verify; logs why newer ones are skipped. None without any.

    Collective. Raises: ResumeError if `folder` cannot be listed, as starting from scratch would be wrong.
    """
    for step in from_main_or_raise(lambda: steps(folder)[::-1]):
        found, why = None, []
        try:
            found = read(checkpoint_in(folder, step), frozen_store)
        except ResumeError as error:
            why = [str(error)]
        anywhere = gather(why)
        for reason in dict.fromkeys(anywhere):
            log(f"{reason}; trying the one before")
        if not anywhere:
            return found
    return None


def read(path: Path, frozen_store: Path) -> Checkpoint:
    """Verify and load one checkpoint. Raises: ResumeError naming the damaged file."""
    sealed = verify(path)
    try:
        meta = freeze.CHECKPOINT.read(_read_json(path / META), str(path / META))
        if (validation := _validation(path)) is not None:
            meta["validation"] = validation
        step, files = meta["step"], {part: f"{part}.safetensors" for part in meta["parts"]}
        if checkpoint_in(path.parent, step).name not in path.name:
            raise ResumeError(f"checkpoint {path} is of step {step}, which differs from its name")
        if unsealed := sorted(set(files.values()) - sealed):
            raise ResumeError(f"checkpoint {path} is damaged: {', '.join(unsealed)} are not under its seal")
        parts = {part: load_file(path / file) for part, file in files.items()}
        if meta["frozen"]:
            parts["model"] |= _read_frozen(frozen_store / f"{meta['frozen']}.safetensors", meta["frozen"])
        return Checkpoint(path=path, step=step, parts=parts, meta=meta)
    except READING_FAILS as error:
        raise ResumeError(f"checkpoint {path} is not whole: {type(error).__name__}: {error}") from error


def verify(path: Path) -> set[str]:
    """Compare every file of a checkpoint with its seal; returns the files' names.

    Raises: ResumeError naming the files that changed.
    """
    try:
        hashes = _read_json(path / SEAL)
        damaged = [name for name, sha256 in hashes.items() if not _is_sealed(path, name, sha256)]
    except READING_FAILS as error:
        raise ResumeError(f"checkpoint {path} is not whole: {type(error).__name__}: {error}") from error
    if damaged:
        raise ResumeError(f"checkpoint {path} is damaged: {', '.join(damaged)} changed since it was sealed")
    if META not in hashes:
        raise ResumeError(f"checkpoint {path} is damaged: its {SEAL} does not name {META}")
    return set(hashes)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`, from which a run resumes, to `unread_step_…`: they failed verification.

    Retention sorts by step number, so it would keep damaged later checkpoints and delete good earlier ones. Nothing is
    deleted here, because a checkpoint may be unreadable only for now, while a disk or the frozen parameters are away.
    Raises: ResumeError if that is not possible.
    """
    try:
        for later, path in _paths(folder).items():
            if later > step:
                _set_aside(path)
    except OSError as error:
        raise ResumeError(f"checkpoints after step {step} in {folder} cannot be set aside: {error}") from error


def retain(folder: Path, rule: Retention, log: Callable[[str], None] = print) -> None:
    """Delete the checkpoints that `rule` does not keep, and leftovers of killed writers. Call it after a sealed write.

    Nothing is deleted unless the newest checkpoint verifies, so the last good one survives a faulty disk.
    Raises: OSError for what cannot be deleted; it no longer counts as a checkpoint, and the next call tries again.
    """
    for path in _surplus(folder, rule, log):
        # Rename first: a kill during the deletion must not leave a partial checkpoint that looks sealed.
        path.rename(path.with_name(f".{path.name}.deleted"))
    errors = []
    for path in folder.glob(".step_*"):
        try:
            _delete(path)
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def note_validation(path: Path, metrics: Mapping[str, float]) -> None:
    """Record a validation that ran after its checkpoint was sealed, so that retention can find the best.

    Raises: OSError if it cannot be written; the checkpoint stays valid.
    """
    write_atomically(path / LATE_VALIDATION, json.dumps(dict(metrics)))


def steps(folder: Path) -> list[int]:
    """The steps of all sealed checkpoints, ascending, taken from their names without verification.

    Raises: ResumeError if `folder` cannot be listed.
    """
    try:
        return list(_paths(folder))
    except OSError as error:
        raise ResumeError(f"the checkpoints in {folder} cannot be listed: {error}") from error


def newest_whole(folder: Path) -> int | None:
    """The step of the newest checkpoint that matches its seal; None without any."""
    try:
        return next((step for step, path in reversed(_paths(folder).items()) if _is_whole(path)), None)
    except OSError:
        return None


def share(path: Path, folder: Path) -> None:
    """Link or copy a sealed checkpoint of another cell into `folder`; each cell's copy is independent of the other.

    Sealed files never change, so they are hard-linked if the file system supports it.
    Raises: OSError; what is then left is a leftover that `retain` deletes.
    """
    for leftover in folder.glob(".step_*"):
        _delete(leftover)
    aside = folder / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    aside.mkdir(parents=True)
    for file in sorted(path.iterdir()):
        share_file(file, aside / file.name)
    flush_folder(aside)
    aside.rename(folder / path.name)
    flush_folder(folder)


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


def _paths(folder: Path) -> dict[int, Path]:
    """Step → path, ascending. Other files that a user keeps there, such as a copy, are ignored by their names."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    found = {int(match[1]): folder / name for name in names if (match := NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def _surplus(folder: Path, rule: Retention, log: Callable[[str], None]) -> list[Path]:
    paths = _paths(folder)
    kept = _kept(paths, rule)
    if len(paths) == len(kept):
        return []
    try:
        verify(paths[max(paths)])
    except ResumeError as error:
        log(f"{error}; as it is the newest, no older checkpoint is deleted")
        return []
    return [path for step, path in paths.items() if step not in kept]


def _kept(paths: dict[int, Path], rule: Retention) -> set[int]:
    """The steps of `paths` (ascending) that `rule` keeps."""
    kept = set(list(paths)[-rule.keep :])
    if rule.every:
        kept |= {step for step in paths if step % rule.every == 0}
    if rule.best and len(paths) > len(kept):
        scores = {step: score for step, path in paths.items() if (score := _score(path, rule.best)) is not None}
        if scores:
            kept.add((max if rule.more else min)(scores, key=lambda step: scores[step]))
    return kept


def _validation(path: Path) -> dict[str, t.Any] | None:
    """The metrics of a checkpoint's validation, run at its step or later; None without one."""
    with contextlib.suppress(*READING_FAILS):
        if (metrics := _read_json(path / META).get("validation")) is not None:
            return dict(metrics)
    with contextlib.suppress(*READING_FAILS):
        return dict(_read_json(path / LATE_VALIDATION))
    return None


def _score(path: Path, metric: str) -> float | None:
    """One metric of a checkpoint's validation; None without one, or if it is not finite."""
    try:
        value = float((_validation(path) or {})[metric])
    except READING_FAILS:
        return None
    return value if math.isfinite(value) else None


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except ResumeError:
        return False
    return True


def _is_sealed(path: Path, name: str, sha256: str) -> bool:
    """Whether a file directly in the folder has this content."""
    return (path / name).parent == path and _has_content(path / name, sha256)


def _has_content(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _read_json(path: Path) -> t.Any:
    if path.exists() and not path.is_file():  # reading a device or a pipe may never end
        raise OSError(f"{path} is not a regular file")
    return json.loads(path.read_text())


def _set_aside(path: Path) -> None:
    aside, count = path.with_name(f"unread_{path.name}"), 1
    while os.path.lexists(aside):
        count += 1
        aside = path.with_name(f"unread_{path.name}.{count}")
    path.rename(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_stored(path: Path, sha256: str) -> bool:
    try:
        return _has_content(path, sha256)
    except OSError:  # unreadable, so write it again
        return False


def _read_frozen(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if not _has_content(path, sha256):
        raise OSError(f"frozen parameters {path} are missing or changed since they were stored")
    return load_file(path)
