"""A file, a package or a trained model → its tensors, and where they are from.

Nothing is unpickled that could run code: torch.load is called with weights_only=True and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pickle
import re
import typing as t
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from bushpc import weight_file
from bushpc.data.starts import WHAT, Starts
from bushpc.errors import WeightsError, unknown_name
from bushpc.files import sha256_of
from bushpc.weight_file import Origin

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
KINDS = (".safetensors", *PICKLED)
# Where training scripts keep the weights, the ones to predict with first.
NESTED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "net", "module"),
)
GIVE = f"Give a {', '.join(KINDS)} file, an installed Python package that holds one, or {WHAT}"
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """tensors: in the order of the file. origin: all that is known before they are matched."""

    tensors: Tensors
    origin: Origin


def open_source(given: str, *, part: str | None = None, fold: int | None = None, row: str | None = None) -> Source:
    """The tensors of `given`.

    part: take only what has this prefix (`image_encoder.`), or what lies in this entry of a training script's file.
    fold, row: of a run or an export. Raises: WeightsError; ConfigError for a run or an export.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        source = _of_trained(path, fold, row)
    elif fold is not None or row is not None:
        raise WeightsError(f"{given}: fold= and row= choose from a run folder or an export, and this is none. {GIVE}")
    elif path.is_file():
        tensors, nested = _read(path, part)
        source = Source(tensors=tensors, origin=_of_file(path))
        part = None if nested else part
    else:
        source, part = _of_package(given, part)
    tensors = _below(source.tensors, part, given)
    return dataclasses.replace(source, tensors={name: _dense(name, tensor) for name, tensor in tensors.items()})


def _of_file(path: Path) -> Origin:
    """Of a single file. One that was imported before keeps its origin."""
    if path.suffix == ".safetensors" and (before := weight_file.read_header(path).origin):
        return before
    return Origin(kind="file", name=path.name, file=path.name, sha256=sha256_of(path))


def _of_trained(path: Path, fold: int | None, row: str | None) -> Source:
    starts = Starts.open(path, row)
    if fold is None and not starts.one:
        raise WeightsError(f"{path} has a model for each fold: choose one with fold=0, for example")
    start = starts.for_fold(fold)
    file = start.path.name if start.kind == "run" else f"{start.cell}/{start.path.name}"
    of_data = sorted({each["licence"] for each in start.licences})
    origin = Origin(
        kind=start.kind,
        name=f"{start.name}/{start.cell}",
        file=file,
        sha256=start.sha256,
        licence="; ".join(of_data),
        trained_on=start.trained_on,
        licences=start.licences,
    )
    return Source(tensors=start.tensors(), origin=origin)


# --- packages ---------------------------------------------------------------------------------------------------


def _of_package(given: str, part: str | None) -> tuple[Source, str | None]:
    """The weights in an installed distribution: `NAME`, or `NAME:file.pth` where it holds several."""
    name, _, wanted = given.partition(":")
    try:
        found = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise WeightsError(f"{given} is no file here and no installed package. {GIVE}") from None
    files = {file.name: file for file in found.files or () if file.suffix in KINDS}
    if not files:
        raise WeightsError(f"package {name} {found.version} holds no {', '.join(KINDS)} file. {GIVE}")
    if wanted and wanted not in files:
        raise WeightsError(unknown_name(f"file of package {name}", wanted, files))
    if not wanted and len(files) > 1:
        raise WeightsError(f"package {name} holds several files: write {name}:FILE. Valid: {', '.join(sorted(files))}")
    file = files[wanted or next(iter(files))]
    path = Path(str(found.locate_file(file)))
    tensors, nested = _read(path, part)
    about: t.Any = found.metadata
    origin = Origin(
        kind="package",
        name=str(about["Name"]),
        version=found.version,
        file=file.name,
        sha256=sha256_of(path),
        licence=_licence(found),
        where=str(about.get("Home-page") or f"https://pypi.org/project/{name}"),
    )
    return Source(tensors=tensors, origin=origin), None if nested else part


def _licence(package: importlib.metadata.Distribution) -> str:
    """As the package states it: by its metadata, a classifier, or the first line of its licence file."""
    about: t.Any = package.metadata
    for field in ("License-Expression", "License"):
        stated = (about.get(field) or "").strip()
        if stated and stated.upper() != "UNKNOWN":
            return stated.splitlines()[0][:100]
    for classifier in about.get_all("Classifier") or ():
        if classifier.startswith("License ::"):
            return str(classifier.rpartition("::")[2].strip())
    for file in package.files or ():
        if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            return lines[0][:100] if lines else ""
    return ""


# --- files ------------------------------------------------------------------------------------------------------


def _read(path: Path, part: str | None) -> tuple[Tensors, bool]:
    """The tensors of a file, and whether `part` was the entry that they lay in. Raises: WeightsError."""
    if path.suffix == ".safetensors":
        return weight_file.read_tensors(path), False
    if path.suffix not in PICKLED:
        raise WeightsError(f"{path}: files with {', '.join(KINDS)} are read, not '{path.suffix}'. {GIVE}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of any content: torch raises what the content leads to, such as KeyError
        if isinstance(error, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(error))):
            raise WeightsError(
                f"{path} cannot be read without running code that it contains (it names {named[1]}), so it is not "
                "read. Save its tensors alone where you trust it: torch.save(model.state_dict(), FILE), or as "
                ".safetensors"
            ) from None
        reason = f"{type(error).__name__}: {str(error).strip()[:150]}"
        raise WeightsError(f"{path} is no file of tensors that torch can read ({reason}). {GIVE}") from None
    return _unwrapped(path, content, part)


def _unwrapped(path: Path, content: t.Any, part: str | None) -> tuple[Tensors, bool]:
    """The tensors of a training script's file, which often lie below `state_dict` or `model`."""
    found = {name: tensors for name, tensors in _state_dicts(content, "") if tensors}
    if not found:
        raise WeightsError(f"{path} holds no tensors with names, but a {type(content).__name__}: is it a state dict?")
    if part is not None and part.rstrip(".") in found and part.rstrip("."):
        return found[part.rstrip(".")], True
    for name in ("", *NESTED):
        if name in found:
            return found[name], False
    if len(found) > 1:
        raise WeightsError(f"{path} holds several sets of tensors: choose one with part=. Valid: {', '.join(found)}")
    return next(iter(found.values())), False


def _state_dicts(content: t.Any, name: str) -> Iterator[tuple[str, Tensors]]:
    """Name → tensors of every mapping that has any, the outermost first."""
    if not isinstance(content, Mapping):
        return
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if len(tensors) >= max(1, len(content) // 2):
        yield name, tensors
        return
    for key, value in content.items():
        yield from _state_dicts(value, f"{name}.{key}".lstrip("."))


def _below(tensors: Tensors, part: str | None, given: str) -> Tensors:
    if part is None:
        return tensors
    prefix = part.rstrip(".") + "."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        valid = {name.partition(".")[0] for name in tensors}
        raise WeightsError(unknown_name(f"part of {given}", part, valid))
    return found


def _dense(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Raises: WeightsError for a tensor that is no plain array of finite numbers."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise WeightsError(f"{name} is no plain tensor (sparse, quantized or without data): convert it first")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise WeightsError(f"{name} holds numbers that are not finite: these weights are damaged")
    return tensor
