"""Sealed checkpoints: complete and verified, or absent. The trainer writes them; resume and evaluation read them.

<cell>/checkpoints/step_00000300/
  model.safetensors      trained parameters and buffers
  optimizer.safetensors  the optimizer's tensors, <key>/<parameter>
  ema.safetensors        averaged parameters, where train.ema is on
  meta.json              step, settings, loss scale, measurements, and other state
  seal.json              SHA-256 of the other files, written last; then the folder is renamed into place
  validation.json        only if a stop signal preceded the validation: its later result, outside the seal
<cell>/checkpoints/unread_step_…    failed verification when a run resumed from an earlier one; kept for inspection
<run>/frozen/<sha256>.safetensors   parameters that training does not change (frozen_store.py)

saver.py writes them in the background, retention.py decides which are kept.

Tensors are stored unpartitioned, whatever engine and number of ranks wrote them, so any other can resume from them.
Random numbers and the loader's position are functions of the step (bushpc.dist, bushpc.data.loader), so storing the
step is enough.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import typing as t
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bushpc.config import freeze
from bushpc.dist import from_main_or_raise, gather
from bushpc.errors import ResumeError
from bushpc.files import flush_file, flush_folder, sha256_of, share_file, write_atomically
from bushpc.runs.frozen_store import has_content, read_frozen
from bushpc.runs.layout import META_FILE, SEAL_FILE, checkpoint_in

LATE_VALIDATION = "validation.json"
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
        (aside / META_FILE).write_text(
            json.dumps({**freeze.CHECKPOINT.stamp(), "step": step, "parts": list(parts), **meta}, indent=1)
        )
        for part, tensors in parts.items():
            path = aside / f"{part}.safetensors"
            save_file(tensors, path)
            shutil.copymode(aside / META_FILE, path)  # safetensors ignores the umask and omits group permissions
        hashes = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        for name in hashes:
            flush_file(aside / name)
        write_atomically(aside / SEAL_FILE, json.dumps(hashes, indent=1))
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
        meta = freeze.CHECKPOINT.read(read_json(path / META_FILE), str(path / META_FILE))
        if (validation := validation_of(path)) is not None:
            meta["validation"] = validation
        step, files = meta["step"], {part: f"{part}.safetensors" for part in meta["parts"]}
        if checkpoint_in(path.parent, step).name not in path.name:
            raise ResumeError(f"checkpoint {path} is of step {step}, which differs from its name")
        if unsealed := sorted(set(files.values()) - sealed):
            raise ResumeError(f"checkpoint {path} is damaged: {', '.join(unsealed)} are not under its seal")
        parts = {part: load_file(path / file) for part, file in files.items()}
        if meta["frozen"]:
            parts["model"] |= read_frozen(frozen_store / f"{meta['frozen']}.safetensors", meta["frozen"])
        return Checkpoint(path=path, step=step, parts=parts, meta=meta)
    except READING_FAILS as error:
        raise ResumeError(f"checkpoint {path} is not whole: {type(error).__name__}: {error}") from error


def verify(path: Path) -> set[str]:
    """Compare every file of a checkpoint with its seal; returns the files' names.

    Raises: ResumeError naming the files that changed.
    """
    try:
        hashes = read_json(path / SEAL_FILE)
        damaged = [name for name, sha256 in hashes.items() if not _is_sealed(path, name, sha256)]
    except READING_FAILS as error:
        raise ResumeError(f"checkpoint {path} is not whole: {type(error).__name__}: {error}") from error
    if damaged:
        raise ResumeError(f"checkpoint {path} is damaged: {', '.join(damaged)} changed since it was sealed")
    if META_FILE not in hashes:
        raise ResumeError(f"checkpoint {path} is damaged: its {SEAL_FILE} does not name {META_FILE}")
    return set(hashes)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`, from which a run resumes, to `unread_step_…`: they failed verification.

    Retention sorts by step number, so it would keep damaged later checkpoints and delete good earlier ones. Nothing is
    deleted here, because a checkpoint may be unreadable only for now, while a disk or the frozen parameters are away.
    Raises: ResumeError if that is not possible.
    """
    try:
        for later, path in paths_in(folder).items():
            if later > step:
                _set_aside(path)
    except OSError as error:
        raise ResumeError(f"checkpoints after step {step} in {folder} cannot be set aside: {error}") from error


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
        return list(paths_in(folder))
    except OSError as error:
        raise ResumeError(f"the checkpoints in {folder} cannot be listed: {error}") from error


def newest_whole(folder: Path) -> int | None:
    """The step of the newest checkpoint that matches its seal; None without any."""
    try:
        return next((step for step, path in reversed(paths_in(folder).items()) if _is_whole(path)), None)
    except OSError:
        return None


def share(path: Path, folder: Path) -> None:
    """Link or copy a sealed checkpoint of another cell into `folder`; each cell's copy is independent of the other.

    Sealed files never change, so they are hard-linked if the file system supports it.
    Raises: OSError; what is then left is a leftover that `retain` deletes.
    """
    for leftover in folder.glob(".step_*"):
        delete(leftover)
    aside = folder / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    aside.mkdir(parents=True)
    for file in sorted(path.iterdir()):
        share_file(file, aside / file.name)
    flush_folder(aside)
    aside.rename(folder / path.name)
    flush_folder(folder)


def paths_in(folder: Path) -> dict[int, Path]:
    """Step → path, ascending. Other files that a user keeps there, such as a copy, are ignored by their names."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    found = {int(match[1]): folder / name for name in names if (match := NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def validation_of(path: Path) -> dict[str, t.Any] | None:
    """The metrics of a checkpoint's validation, run at its step or later; None without one."""
    with contextlib.suppress(*READING_FAILS):
        if (metrics := read_json(path / META_FILE).get("validation")) is not None:
            return dict(metrics)
    with contextlib.suppress(*READING_FAILS):
        return dict(read_json(path / LATE_VALIDATION))
    return None


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except ResumeError:
        return False
    return True


def _is_sealed(path: Path, name: str, sha256: str) -> bool:
    """Whether a file directly in the folder has this content."""
    return (path / name).parent == path and has_content(path / name, sha256)


def read_json(path: Path) -> t.Any:
    if path.exists() and not path.is_file():  # reading a device or a pipe may never end
        raise OSError(f"{path} is not a regular file")
    return json.loads(path.read_text())


def _set_aside(path: Path) -> None:
    aside, count = path.with_name(f"unread_{path.name}"), 1
    while os.path.lexists(aside):
        count += 1
        aside = path.with_name(f"unread_{path.name}.{count}")
    path.rename(aside)


def delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
