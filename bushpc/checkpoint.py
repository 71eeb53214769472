"""Sealed checkpoints: whole and verified, or not there. Written by the trainer, read by resume and evaluation.

<cell>/checkpoints/step_00000300/
  model.safetensors     trained parameters and buffers
  state.pt              optimizer, scheduler and scaler state (plain tensors and numbers, weights_only)
  meta.json             step, config hash, versions, what else is needed
  seal.json             SHA-256 of the three, written last; the folder is renamed into place after that
<run>/frozen/<sha256>.safetensors   parameters that no step changes, stored once for all cells of a run
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import typing as t
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

from bushpc.errors import ResumeError
from bushpc.files import flush_file, flush_folder, sha256_of, write_atomically

SEAL = "seal.json"
# What json, safetensors and torch raise on files that are not what they should be.
READING_FAILS = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError),
    *(SafetensorError, pickle.UnpicklingError),
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint in memory; tensors are on the CPU."""

    path: Path
    step: int
    model: dict[str, torch.Tensor]
    state: dict[str, t.Any]
    meta: dict[str, t.Any]


def split_state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(trained, frozen) tensors of a model: frozen are the parameters with requires_grad off."""
    frozen_names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained: dict[str, torch.Tensor] = {}
    frozen: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        (frozen if name in frozen_names else trained)[name] = tensor.detach().cpu().contiguous()
    return trained, frozen


def store_frozen(store: Path, frozen: dict[str, torch.Tensor]) -> str | None:
    """Put frozen parameters into the run's store, once for equal content; returns their SHA-256 (None if empty)."""
    if not frozen:
        return None
    content = save(frozen)
    sha256 = hashlib.sha256(content).hexdigest()
    target = store / f"{sha256}.safetensors"
    if not target.exists() or sha256_of(target) != sha256:
        store.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
    return sha256


def write(
    folder: Path, step: int, model: dict[str, torch.Tensor], state: dict[str, t.Any], meta: dict[str, t.Any]
) -> Path:
    """Write checkpoint `step` below `folder` and seal it. An equal step that is already sealed is replaced."""
    target = folder / f"step_{step:08d}"
    aside = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(model, aside / "model.safetensors")
    torch.save(state, aside / "state.pt")
    (aside / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=1))
    hashes = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
    for path in aside.iterdir():
        flush_file(path)
    write_atomically(aside / SEAL, json.dumps(hashes, indent=1))
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    flush_folder(folder)
    return target


def newest(folder: Path, frozen_store: Path, log: t.Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint that verifies, walking back over damaged ones and naming each; None if there is none."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            return read(path, frozen_store)
        except ResumeError as error:
            log(f"{error}; trying the one before")
    return None


def read(path: Path, frozen_store: Path) -> Checkpoint:
    """Verify and load one checkpoint. Raises: ResumeError saying which file is damaged."""
    try:
        hashes = json.loads((path / SEAL).read_text())
        damaged = [name for name, sha256 in hashes.items() if sha256_of(path / name) != sha256]
        if damaged:
            raise ResumeError(f"checkpoint {path} is damaged: {', '.join(damaged)} changed since it was sealed")
        meta = json.loads((path / "meta.json").read_text())
        model = load_file(path / "model.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        if meta["frozen"]:
            model |= _read_frozen(frozen_store / f"{meta['frozen']}.safetensors", meta["frozen"])
    except READING_FAILS as error:
        raise ResumeError(f"checkpoint {path} is not whole: {type(error).__name__}: {error}") from error
    return Checkpoint(path=path, step=meta["step"], model=model, state=state, meta=meta)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename to `unread_step_…` what lies beyond `step`, the one that a run goes on from: it did not verify.

    Retention goes by step number, so a damaged later one would make it delete good earlier ones. Nothing is deleted:
    what cannot be read now, because a disk or the frozen parameters are away, may be whole all the same.
    """
    for path in folder.glob("step_*"):
        if path.name > f"step_{step:08d}":
            aside = path.with_name(f"unread_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def retain(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and what killed writers left. Call it after a sealed write."""
    for path in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".step_*"):
        if path.suffix != f".{os.getpid()}":
            shutil.rmtree(path, ignore_errors=True)


def _read_frozen(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if sha256_of(path) != sha256:
        raise ResumeError(f"frozen parameters {path} changed since they were stored")
    return load_file(path)
