"""The base of all notes in a run folder: typed JSON.

    <record>.write(path) → JSON that people can read → read | read_whole | read_valid → <record>

How much damage is tolerated depends on the reader: what a decision rests on is refused (`read`), a note that can be
done without counts as missing (`read_whole`), and what is only shown loses the fields that do not fit (`read_valid`).

msgspec checks types while it decodes: `bushpc status` reads three thousand notes in less time than it takes to import
pydantic. No torch.
"""

from __future__ import annotations

import json
import typing as t
from collections.abc import Mapping
from pathlib import Path

import msgspec

from bushpc.errors import DataError
from bushpc.files import read_quickly, write_atomically

# No count and no number of seconds of a real run comes near it; a damaged one may exceed what a float holds.
MOST = 1e12
# Steps per second. A lower rate in a heartbeat is damage, and the time left would not fit into hours.
SLOWEST_RATE = 1e-6
# A process id has fewer digits.
MOST_DIGITS = 10

Count = t.Annotated[int, msgspec.Meta(ge=0, lt=10**12)]
Number = t.Annotated[float, msgspec.Meta(gt=-MOST, lt=MOST)]
Rate = t.Annotated[float, msgspec.Meta(ge=SLOWEST_RATE, lt=MOST)]


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """A note in a run folder. Fields that a file has and the class lacks are passed over."""

    @classmethod
    def read(cls, path: Path) -> t.Self | None:
        """The record in a file; None without the file. Raises: DataError, which names the damaged fields."""
        try:
            text = read_quickly(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return cls._decode(path, text)

    @classmethod
    def read_whole(cls, path: Path) -> t.Self | None:
        """The record in a file; None if the file is missing or damaged."""
        try:
            return cls.read(path)
        except DataError:
            return None

    @classmethod
    def read_valid(cls, path: Path) -> t.Self:
        """What is valid in a file: a damaged field, or all of a missing file, gets the defaults."""
        try:
            text = read_quickly(path)
        except OSError:
            return cls()
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass
        try:
            content = json_object(text)
        except (ValueError, RecursionError):
            return cls()
        return cls(**_fields(cls, content)[0])

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_atomically(path, self.to_json())

    def to_json(self) -> str:
        return json.dumps(msgspec.to_builtins(self))

    @classmethod
    def _decode(cls, path: Path, text: bytes) -> t.Self:
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass  # it may still be what Python's json writes, with NaN, say; and one error is not all of them
        try:
            content = json_object(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is damaged: {error}. {cls._mend(path)}") from error
        fields, wrong = _fields(cls, content)
        if wrong:
            raise DataError(f"{path} is damaged: {'; '.join(wrong)}. {cls._mend(path)}")
        return cls(**fields)

    @classmethod
    def _mend(cls, path: Path) -> str:
        """What to do about a damaged file."""
        return "Restore it, or delete it if it can be made again"


def json_object(text: bytes) -> dict[str, t.Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} where an object is needed")
    return content


def _fields(cls: type[Record], content: Mapping[str, t.Any]) -> tuple[dict[str, t.Any], list[str]]:
    """The valid fields, and for each invalid or missing one its name and what is wrong with it."""
    valid: dict[str, t.Any] = {}
    wrong = []
    for field in msgspec.structs.fields(cls):
        if field.name in content:
            try:
                valid[field.name] = msgspec.convert(content[field.name], field.type)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                wrong.append(f"{field.name}: {error}")
        elif field.required:
            wrong.append(f"{field.name} is missing")
    return valid, wrong
