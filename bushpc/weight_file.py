"""A file of imported weights: tensors under a model's own names, and where they are from, in one .safetensors file.

    bushpc weights import → FILE → model.weights=FILE: composition ─header→ hash, model; job ─tensors→ the model

The header is read without torch, so the login node can check it. It holds one JSON text, `bushpc`; see `Origin`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import typing as t
from pathlib import Path

import msgspec

from bushpc.errors import WeightsError
from bushpc.files import sha256_of_unchanged

if t.TYPE_CHECKING:
    import torch

KEY = "bushpc"
FORMAT = 1
# safetensors itself accepts no longer header.
LONGEST_HEADER = 100_000_000
HOW_TO_MAKE = "`bushpc weights import FILE model=… out=…` makes one of any .safetensors or .pth file"
Shape = tuple[int, ...]


class Training(t.TypedDict):
    """As `bushpc.data.lineage` notes it."""

    data: str | None
    manifest_sha256: str | None
    folds_sha256: str | None
    fold: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where imported weights are from, and what became of them; the JSON text in the file's header.

    kind: `file`, `package`, `run` or `export`. name: of the package or run, else of the file. file, sha256: what was
    read. licence, where: "" where they are unknown. target: the model's class. settings: its settings.
    how: names were matched by `name`, `prefix` or `order`. part: prefix of the part of the model that was filled.
    trained_on: trainings behind the weights, as far as bushpc knows them. licences: of their data.
    The rest: as in `bushpc.convert.match.Match`.
    """

    kind: str
    name: str
    version: str = ""
    file: str = ""
    sha256: str = ""
    licence: str = ""
    where: str = ""
    target: str = ""
    settings: dict[str, t.Any] = dataclasses.field(default_factory=dict)
    how: str = ""
    strip: str = ""
    add: str = ""
    part: str = ""
    matched: int = 0
    share_of_file: float = 0.0
    share_of_part: float = 0.0
    reshaped: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    trained_on: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)
    licences: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def to_metadata(self) -> dict[str, str]:
        return {KEY: json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)}


class Header(t.NamedTuple):
    """origin: None of a file that `bushpc weights import` did not write. shapes: of all tensors, in its order."""

    origin: Origin | None
    shapes: dict[str, Shape]


def read_header(path: Path) -> Header:
    """Raises: WeightsError if it is no .safetensors file, or a newer bushpc imported it."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError(f"its header claims {length:,} bytes")
            content = json.loads(file.read(length))
        noted = content.pop("__metadata__", {}).get(KEY)
        shapes = {str(name): tuple(map(int, each["shape"])) for name, each in content.items()}
        origin = None if noted is None else json.loads(noted)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; {HOW_TO_MAKE}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
        raise WeightsError(f"{path} is no .safetensors file, or is damaged ({error}); {HOW_TO_MAKE}") from error
    return Header(None if origin is None else _origin(path, origin), shapes)


def _origin(path: Path, noted: dict[str, t.Any]) -> Origin:
    if noted.pop("format", None) != FORMAT:
        raise WeightsError(f"{path} was imported by a newer bushpc: use that version, or import the source again")
    try:
        msgspec.convert(noted.get("trained_on", []), list[Training])  # a lineage that cannot be compared hides leaks
        return msgspec.convert(noted, Origin)
    except msgspec.ValidationError as error:
        raise WeightsError(f"{path} is damaged ({error}): import the source again") from error


def require(path: Path, sha256: str | None, target: str) -> Origin:
    """The origin of a file that a model of class `target` can start from.

    sha256: what it must be; None takes what is there. Raises: WeightsError.
    """
    origin = read_header(path).origin
    if origin is None:
        raise WeightsError(f"{path} holds weights under names of their own, which no model here knows; {HOW_TO_MAKE}")
    if origin.target != target:
        raise WeightsError(
            f"{path} was imported for {_named(origin.target)}, and this model is {_named(target)}: import its source "
            "again for this model"
        )
    if sha256 is not None and (found := sha256_of_unchanged(path)) != sha256:
        raise WeightsError(
            f"{path} has sha256 {found}, and model.weights_sha256 is {sha256}: the file changed since the run was "
            "submitted. Bring it back, or submit again under another name=…"
        )
    return origin


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors file, on the CPU. Raises: WeightsError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is no readable .safetensors file ({error}); {HOW_TO_MAKE}") from error


def _named(target: str) -> str:
    return target.rpartition(".")[2]
