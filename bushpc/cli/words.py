"""Typed `key=value` words of one command, declared as a table. Errors and help text come from the table.

    WORDS = Words(
        Word("out", PATH, "Folder for the shards.", shown="shards/<data>", instead_of=("dst",)),
        Word("workers", WHOLE, "Processes that decode and encode.", default=1),
        command="bushpc pack",
        example="bushpc pack data=phantom out=shards/phantom",
    )
    WORDS.read(["out=here"])  # {"out": Path("here"), "workers": 1}

Settings of a training (`model=…`, `train.lr=…`) are not words: `bushpc.config` reads them.
"""

from __future__ import annotations

import difflib
import typing as t
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bushpc.errors import ConfigError, unknown_name

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A type of value. allowed: what a user may write. read: text to value; a ValueError or LookupError rejects it."""

    allowed: str
    read: Callable[[str], t.Any]
    example: str


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _shards(text: str) -> Path:
    from bushpc.config import shards_folder

    return shards_folder(text)


TEXT = Kind(allowed="text", read=str, example="name")
WHOLE = Kind(allowed="a whole number", read=int, example="4")
NUMBER = Kind(allowed="a number", read=_number, example="4")
SWITCH = Kind(allowed="true or false", read=lambda text: {"true": True, "false": False}[text], example="true")
PATH = Kind(allowed="a path", read=lambda text: Path(text).expanduser(), example="folder")
SHARDS = Kind(allowed="a dataset's name or a folder of shards", read=_shards, example="breast")


@dataclass(frozen=True)
class Word:
    """One word of a command.

    help: one sentence. default: the value if the word isn't given. required: there is no default.
    repeated: may be given several times; the value is then a list.
    choices: the valid values, as a function where finding them takes work.
    shown: the default as help shows it, where the value itself would not tell.
    instead_of: other names that users type for this one. They are not accepted; the error names the right word.
    """

    name: str
    kind: Kind
    help: str
    default: t.Any = None
    required: bool = False
    repeated: bool = False
    choices: Callable[[], Sequence[str]] | Sequence[str] = ()
    shown: str = ""
    instead_of: tuple[str, ...] = ()

    def value(self, text: str, example: str) -> t.Any:
        """The typed value of a text. Raises: ConfigError with what is allowed and an example."""
        valid = self.choices() if callable(self.choices) else self.choices
        if valid and text not in valid:
            raise ConfigError(unknown_name(self.name, text, valid, f"Example: {example}"))
        if not text:
            raise ConfigError(f"{self.name}= has no value: {self.kind.allowed} is needed. Example: {example}")
        try:
            return self.kind.read(text)
        except (ValueError, LookupError):
            raise ConfigError(
                f"{self.name}={text}: {self.kind.allowed} is needed, for example {self.name}={self.kind.example}"
            ) from None

    @property
    def default_text(self) -> str:
        """The default for the help text."""
        if self.required:
            return "required"
        if self.shown:
            return f"default {self.shown}"
        if isinstance(self.default, bool):
            return f"default {str(self.default).lower()}"
        return "" if self.default is None else f"default {self.default}"


def setting_hint(key: str) -> str:
    """What a word is that this command does not take but a training does; "" for one that no command knows."""
    from bushpc.config import described, group_names

    is_setting = key in group_names() or key in {each.key for each in described()} or key.startswith("model.")
    return ": it is a setting of a training, such as `bushpc cv` and `bushpc grid` take." if is_setting else ""


@dataclass(frozen=True, init=False)
class Words:
    """The table of a command's words.

    more: further words, which may depend on those of the table (the parameters of a dataset's card). Help shows those
    that depend on none. rest: what the help text says of the others.
    """

    table: tuple[Word, ...]
    command: str
    example: str
    more: Callable[[Mapping[str, t.Any]], Sequence[Word]] | None = field(compare=False)
    rest: str

    def __init__(
        self,
        *table: Word,
        command: str,
        example: str,
        more: Callable[[Mapping[str, t.Any]], Sequence[Word]] | None = None,
        rest: str = "",
    ) -> None:
        for name, value in {"table": table, "command": command, "example": example, "more": more, "rest": rest}.items():
            object.__setattr__(self, name, value)

    def read(self, words: Iterable[str]) -> dict[str, t.Any]:
        """Every word's value, defaults included; further words under `more`. Raises: ConfigError."""
        given: dict[str, list[str]] = {}
        for typed in words:
            key, equals, text = typed.partition("=")
            if not equals:
                raise ConfigError(f"'{typed}': write key=value. Example: {self.example}")
            given.setdefault(key, []).append(text)
        known = {word.name: word for word in self.table}
        values = {name: self._value(known[name], given[name]) for name in known if name in given}
        table = {**known, **{word.name: word for word in self.more(values)}} if self.more else known
        for key in given:
            if key not in table:
                raise ConfigError(self._unknown(key, given[key][0], table.values()))
        for word in self.table:
            if word.name not in given:
                if word.required:
                    raise ConfigError(f"{word.name}= is missing: {word.help} Example: {self.example}")
                values[word.name] = [] if word.repeated else word.default
        values["more"] = {key: self._value(table[key], texts) for key, texts in given.items() if key not in known}
        return values

    def knows(self, typed: str) -> bool:
        """Whether `key=value` is one of the table's words, or is typed instead of one."""
        key = typed.partition("=")[0]
        return any(key in (word.name, *word.instead_of) for word in self.table)

    def _value(self, word: Word, texts: list[str]) -> t.Any:
        values = [word.value(text, self.example) for text in texts]
        if len(values) > 1 and not word.repeated:
            raise ConfigError(f"{word.name}= is given {len(texts)} times ({', '.join(texts)}): give it once")
        return values if word.repeated else values[0]

    def _unknown(self, key: str, text: str, table: Iterable[Word]) -> str:
        names = {name: word.name for word in table for name in (word.name, *word.instead_of)}
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = (
            f"; did you mean '{names[near[0]]}'? Write {names[near[0]]}={text}." if near else setting_hint(key) or "."
        )
        valid = ", ".join(f"{name}=" for name in dict.fromkeys(names.values()))
        return f"unknown word '{key}'{hint} Words of `{self.command}`: {valid}. Example: {self.example}"

    def lines(self) -> list[str]:
        """The table for the help text."""
        import textwrap

        lines = ["words:"]
        for word in (*self.table, *(self.more({}) if self.more else ())):
            choices = [] if callable(word.choices) or not word.choices else [f"one of {', '.join(word.choices)}"]
            notes = [*choices, word.default_text, *(["may be repeated"] if word.repeated else [])]
            note = "; ".join(part for part in notes if part)
            text = f"{word.help} ({note})" if note else word.help
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {word.name + '=':<20}  ", subsequent_indent=" " * 24)
        if self.rest:
            lines += textwrap.wrap(self.rest, WIDTH, initial_indent="  ", subsequent_indent="  ")
        return lines
