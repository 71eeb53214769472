"""`<run>/frozen/`: parameters that training does not change, stored once for all cells of a run."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from bushpc.errors import ResumeError
from bushpc.files import sha256_of, write_atomically


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


def has_content(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _is_stored(path: Path, sha256: str) -> bool:
    try:
        return has_content(path, sha256)
    except OSError:  # unreadable, so write it again
        return False


def read_frozen(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if not has_content(path, sha256):
        raise OSError(f"frozen parameters {path} are missing or changed since they were stored")
    return load_file(path)
