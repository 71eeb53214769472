"""Plain data, as yaml and the command line give it, → config classes; and back."""

from __future__ import annotations

import dataclasses
import re
import types
import typing as t

import yaml

from bushpc.config.fields import Options, Settings, allowed, cached, example, fields_of, shown
from bushpc.errors import ConfigError, unknown_name

S = t.TypeVar("S", bound=Settings)
# What reading YAML that is not what it should be raises.
YAML_FAILS = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError)
# libyaml's where PyYAML was built with it: ten times as fast, and a grid has a thousand configs.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
YAML_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# Deepest nesting that libyaml reads here; where its stack ends it takes the process with it.
DEEP = 500
MOST_INT = 2**63
YAML_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INT = re.compile(r"[+-]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[+-]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)")
OPTION = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
INFINITE = re.compile(r"[+-]?\.?(inf|nan)", re.IGNORECASE)


def build(cls: type[S], content: t.Any, prefix: str | None = None) -> S:
    """A config class from its group of settings; fields that are left out have their defaults. Raises: ConfigError."""
    prefix = cls.prefix if prefix is None else prefix
    if not isinstance(content, t.Mapping):
        raise ConfigError(f"{prefix[:-1]}={shown(content)}: expected a group of settings")
    return cls(**build_fields(cls, content, prefix))


def build_fields(
    cls: type[Settings], content: t.Mapping[str, t.Any], prefix: str, skip: t.Sequence[str] = ()
) -> dict[str, t.Any]:
    """The keyword arguments of `cls` from plain data. Raises: ConfigError for unknown keys and wrong values."""
    fields = {name: info for name, info in fields_of(cls).items() if name not in skip}
    for key in content:
        if key not in fields:
            raise ConfigError(unknown_name("setting", f"{prefix}{key}", [prefix + name for name in fields]))
    missing = [prefix + name for name, info in fields.items() if name not in content and info.is_required()]
    if missing:
        raise ConfigError(f"settings without a value: {', '.join(missing)}. Add them to the yaml of their group.")
    return {
        name: _coerced(cls, name, _hint(cls, name), content[name], prefix + name) for name in fields if name in content
    }


@cached
def _hint(cls: type[Settings], name: str) -> t.Any:
    return fields_of(cls)[name].annotation


def _coerced(cls: type[Settings], name: str, hint: t.Any, value: t.Any, key: str) -> t.Any:
    """`value` in the containers that the field declares. Only losslessly: list → tuple, number → text; never "3" → 3.

    Types of numbers and words are pydantic's to check.
    """
    origin, args = t.get_origin(hint), t.get_args(hint)
    if origin in (t.Union, types.UnionType):
        if value is None or (isinstance(value, Scalar) and value.is_null):
            return None
        return _coerced(cls, name, next(arg for arg in args if arg is not type(None)), value, key)
    if isinstance(hint, type) and issubclass(hint, Settings):
        return build(hint, _read(value, hint), key + ".")
    if hint is Options:
        return _options(value, key)
    is_text = hint is str or origin is t.Literal
    if origin is tuple and args[0] is str and isinstance(value, Scalar) and not value.quoted:
        value = _split(value, key)
    elif not is_text:
        value = _read(value, hint)
    elif isinstance(value, (Scalar, TypedInt, TypedFloat)):
        value = None if isinstance(value, Scalar) and value.is_null else value.text
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerced(cls, name, args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, t.Mapping):
        return {
            _coerced(cls, name, args[0], each, f"{key} (a name)"): _coerced(cls, name, args[1], item, f"{key}.{each}")
            for each, item in value.items()
        }
    if value != value or (type(value) is int and abs(value) >= MOST_INT):
        raise ConfigError(f"{key} is not a number, or one too large to count with; allowed: below 2^63")
    if is_text and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # `name: 2024` in the frozen config of an older version
    if is_text and isinstance(value, str) and not value.isprintable():
        raise ConfigError(
            f"{key}={shown(value)}: line breaks and control characters are not allowed, jobs are shell scripts"
        )
    if isinstance(value, (dict, list)) or origin is tuple or (hint is str and not isinstance(value, str)):
        raise ConfigError(
            f"{key}={shown(value)} is a {type(value).__name__}; allowed: {allowed(cls, name)}{example(cls, name)}"
        )
    return value


def _options(value: t.Any, key: str) -> Options:
    """Options of a command. What is typed is what the command gets: `no` and `010` stay as they are."""
    if not isinstance(value, t.Mapping):
        raise ConfigError(
            f"{key}={shown(value)}: write options as {{name: value}}; for example {key}={{hint:nomultithread}}"
        )
    found = {}
    for name, item in value.items():
        if not OPTION.fullmatch(str(name)):
            raise ConfigError(f"{key}.{name}: write the option's long name without dashes, such as mail-type")
        found[str(name).replace("_", "-")] = _option(item, f"{key}.{name}")
    return Options(found)


def _option(value: t.Any, key: str) -> str | bool | None:
    if isinstance(value, Scalar):
        words = {} if value.quoted else {"true": True, "false": False}
        value = None if value.is_null else words.get(value.text, value.text)
    if value is None or value is True:
        return value
    if value is False or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{key}={shown(value)}: a text is needed, true for an option without a value, or null")
    if isinstance(value, (TypedInt, TypedFloat)):
        value = value.text
    if not str(value).isprintable() or value == "":
        raise ConfigError(f"{key}={shown(value)}: empty texts, line breaks and control characters are not allowed")
    return str(value)


class Scalar:
    """A value as it is typed, in a yaml file or as a word, for the field to read.

    is_null: whether it can stand for no value. where: file and line, or the word.
    """

    __slots__ = ("is_null", "quoted", "text", "where")

    def __init__(self, text: str, *, quoted: bool, where: str, nulls: t.Collection[str] = YAML_NULLS) -> None:
        self.text, self.quoted, self.where = text, quoted, where
        self.is_null = not quoted and text in nulls

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return repr(self.text)


class TypedInt(int):
    """A number that remembers how it was typed, should its field be text."""

    text = ""


class TypedFloat(float):
    """As `TypedInt`."""

    text = ""


def number(text: str) -> t.Any:
    """A plain scalar of a yaml file as number or text, which remembers how it was typed."""
    value = typed(text)
    if type(value) in (int, float):
        value = TypedInt(value) if type(value) is int else TypedFloat(value)
        value.text = text
    return value


def typed(text: str) -> t.Any:
    """What a plain text stands for where its field is no text: null, true, a number; else the text itself.

    >>> typed("1e2"), typed("10"), typed("010"), typed("no")
    (100.0, 10, '010', False)
    """
    if text in YAML_NULLS:
        return None
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text) or INFINITE.fullmatch(text):
        return float(text if FLOAT.fullmatch(text) else text.replace(".", ""))
    return text


def _read(value: t.Any, hint: t.Any) -> t.Any:
    """The value of a field that is no text."""
    if isinstance(value, Scalar):
        return value.text if value.quoted else typed(value.text)
    if isinstance(value, (TypedInt, TypedFloat)):
        return typed(value.text)
    return value


def _split(value: Scalar, key: str) -> list[str]:
    """`[a, 'b, c']` → its texts. Quotes are needed around a text with a comma, and taken away."""
    text = value.text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise ConfigError(f"{key}={value.text}: a list is needed; write {key}=[{value.text}]")
    items = _items(text[1:-1])
    if not all(items) and items != [""]:
        raise ConfigError(f"{key}={value.text}: an item of the list is empty; write {key}=[a,b], or [] for none")
    return [_unquoted(item) for item in items if item]


def _items(text: str) -> list[str]:
    """`a, 'b, c'` → its items, split at commas outside quotes. A quote counts where an item starts with it."""
    items, quote = [""], ""
    for before, char in zip(" " + text, text, strict=False):
        if char == "," and not quote:
            items.append("")
            continue
        if quote:
            quote = "" if char == quote and before != "\\" else quote
        elif char in "'\"" and not items[-1].strip():
            quote = char
        items[-1] += char
    return [item.strip() for item in items]


def _unquoted(item: str) -> str:
    if len(item) > 1 and item[0] in "'\"" and item[-1] == item[0]:
        return item[1:-1].replace(f"\\{item[0]}", item[0])
    return item


def load_yaml(text: str) -> t.Any:
    """What a yaml text holds. Each level of nesting costs one of these characters, or a column of indentation."""
    deepest = sum(map(text.count, "[{?-:")) + max(len(line) - len(line.lstrip()) for line in text.split("\n"))
    return yaml.load(text, Loader=YAML_LOADER if deepest < DEEP else yaml.SafeLoader)


def plain(value: t.Any) -> t.Any:
    """Config classes, tuples and what they hold as dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, t.Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def flat(content: t.Mapping[str, t.Any], prefix: str = "") -> dict[str, t.Any]:
    """Nested settings by their dotted names: {"train": {"lr": 1}} → {"train.lr": 1}."""
    out: dict[str, t.Any] = {}
    for key, value in content.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, t.Mapping) else {prefix + key: value})
    return out
