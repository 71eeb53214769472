"""How a setting is declared: one field with a default, a sentence, a unit and what it affects.

    @config_class
    class SamplerConfig(Settings):
        steps: int = setting(50, "Steps per sample.", ge=1, affects="predictions")

Types, bounds and words (`Literal[...]`) are checked by pydantic wherever such a class is constructed; `__post_init__`
is for combinations of fields. Whatever is wrong is a ConfigError that names the field, its value, what is allowed and
an example that works.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing as t

import pydantic.dataclasses
import typing_extensions as te
from pydantic import ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from bushpc.errors import ConfigError, unknown_name

Affects = t.Literal["training", "predictions", "evaluation", "nothing"]
C = t.TypeVar("C", bound="Settings")
F = t.TypeVar("F", bound=t.Callable[..., t.Any])
# The longest part of a wrong value that a message shows, in characters.
MOST_SHOWN = 200
# In a list of texts, an item with one of these stands in quotes.
COMMAS = ",'\""


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a setting besides its type and bounds.

    affects: `training` (the trained weights), `predictions` (what a trained model predicts), `evaluation` (how
        predictions are scored) or `nothing` of a cell's results. Only the last kind is left out of a cell's hash.
    order: the order of training samples depends on it, so no run can resume with another value.
    since: the config format that introduced it. One newer than format 1 is left out of the hash while at its default,
        so that the cells of older runs keep their hash.
    """

    sentence: str
    unit: str = ""
    affects: Affects = "training"
    order: bool = False
    since: int = 1


def cached(function: F) -> F:
    """functools.cache, whose stub refuses classes as arguments."""
    return t.cast("F", functools.cache(function))


def _kept(about: About) -> dict[str, t.Any]:
    return {"about": about}  # in pydantic's place for what it does not know


class Settings:
    """Base of all config classes. prefix: what stands before a field's name in messages, such as `train.`."""

    prefix: t.ClassVar[str] = ""

    @classmethod
    def about(cls, name: str) -> About:
        """What is known of a field."""
        return _about(cls, name)

    @classmethod
    def default(cls, name: str) -> t.Any:
        """A field's default. Raises: LookupError where it has none."""
        info = fields_of(cls)[name]
        if info.is_required():
            raise LookupError(name)
        return info.get_default(call_default_factory=True, validated_data={})


class Options(t.Mapping[str, "str | bool | None"]):
    """Options of a command by their long names, as the value of a setting: hashable, in the order of their names.

    True: the option has no value. None: the option is not given, although it would be otherwise.
    """

    def __init__(self, options: t.Mapping[str, str | bool | None] | None = None) -> None:
        self._options = dict(sorted((options or {}).items()))

    def __getitem__(self, name: str) -> str | bool | None:
        return self._options[name]

    def __iter__(self) -> t.Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __hash__(self) -> int:
        return hash(tuple(self._options.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._options == other._options

    def __repr__(self) -> str:
        return f"Options({self._options})"

    def __or__(self, more: t.Mapping[str, str | bool | None]) -> Options:
        """With `more`, which wins."""
        return Options({**self, **more})


def setting(
    default: t.Any,
    sentence: str,
    *,
    unit: str = "",
    affects: Affects = "training",
    order: bool = False,
    since: int = 1,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> t.Any:
    """A field of a config class. ge, gt, le, lt: its bounds (≥, >, ≤, <). The rest: see `About`."""
    about = About(sentence=sentence, unit=unit, affects=affects, order=order, since=since)
    return Field(default, description=sentence, json_schema_extra=_kept(about), ge=ge, gt=gt, le=le, lt=lt)


def group(factory: t.Callable[[], t.Any], sentence: str, *, affects: Affects = "training") -> t.Any:
    """A field that holds another config class, by default with all of its defaults."""
    return Field(
        default_factory=factory,
        description=sentence,
        json_schema_extra=_kept(About(sentence=sentence, affects=affects)),
    )


# `setting` is no field specifier here: to a type checker it is a default like any other.
@te.dataclass_transform(frozen_default=True, kw_only_default=True)
def config_class(cls: type[C]) -> type[C]:
    """Make a subclass of `Settings` a frozen, keyword-only dataclass whose values are checked."""
    # Types of other rooms, such as a model's class, are only checked with isinstance.
    strict = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=strict)(cls)
    checked = made.__init__

    @functools.wraps(checked)
    def init(self: Settings, **values: t.Any) -> None:
        try:
            checked(self, **values)
        except ValidationError as error:
            raise ConfigError(_said(made, error)) from None

    setattr(made, "__init__", init)  # noqa: B010  mypy knows it as a method
    return t.cast("type[C]", made)


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """A config class's fields in the order of their declaration."""
    return t.cast("dict[str, FieldInfo]", cls.__pydantic_fields__)  # type: ignore[attr-defined]


@cached
def _about(cls: type, name: str) -> About:
    extra = fields_of(cls)[name].json_schema_extra
    found = extra.get("about") if isinstance(extra, dict) else None
    return found if isinstance(found, About) else About(sentence="")


def is_text(cls: type, name: str) -> bool:
    """Whether a field holds text, a path, a word of several, or a list of such."""
    members = [
        t.get_args(each)[0] if t.get_origin(each) is tuple else each
        for each in _members(fields_of(cls)[name].annotation)
    ]
    return any(each is str or t.get_origin(each) is t.Literal for each in members)


def is_options(cls: type, name: str) -> bool:
    """Whether a field holds options of a command."""
    return fields_of(cls)[name].annotation is Options


def allowed(cls: type, name: str) -> str:
    """Type and bounds of a field in words: `int ≥ 1, or null`."""
    info = fields_of(cls)[name]
    members = _members(info.annotation)
    bounds = [
        f"{sign} {getattr(rule, word):g}"
        for rule in info.metadata
        for word, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(rule, word, None) is not None
    ]
    kinds = [type_name(member) for member in members if member is not type(None)]
    return " ".join([" or ".join(kinds), " and ".join(bounds)]).strip() + ", or null" * (type(None) in members)


def example(cls: type, name: str) -> str:
    """A word of the command line that works for a field: its default, where it has one."""
    info = fields_of(cls)[name]
    key = f"{getattr(cls, 'prefix', '')}{name}"
    default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
    return "" if default is None or dataclasses.is_dataclass(default) else f"; for example {key}={as_word(default)}"


def as_word(value: t.Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, t.Mapping):
        return f"{{{','.join(f'{name}:{as_word(item)}' for name, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        items = [as_word(item) for item in value]
        return f"[{','.join(repr(item) if set(item) & set(COMMAS) else item for item in items)}]"
    return str(value)


def type_name(hint: t.Any) -> str:
    """A type as messages name it."""
    origin, args = t.get_origin(hint), t.get_args(hint)
    if origin is tuple:
        return f"a list of {type_name(args[0])}"
    if origin is t.Literal:
        return "one of " + ", ".join(map(str, args))
    return {
        int: "int",
        float: "float",
        str: "text",
        bool: "true or false",
        dict: "a group",
        Options: "{option: value}",
    }.get(t.cast(type, origin or hint), getattr(hint, "__name__", str(hint)))


def shown(value: t.Any) -> str:
    """A wrong value for a message. Not the inside of lists: a few lines of YAML can stand for gigabytes of it."""
    return "…" if isinstance(value, (dict, list, tuple)) else repr(value)[:MOST_SHOWN]


def _members(hint: t.Any) -> tuple[t.Any, ...]:
    return t.get_args(hint) if t.get_origin(hint) in (t.Union, types.UnionType) else (hint,)


def _said(cls: type, error: ValidationError) -> str:
    """The first thing that pydantic found, in our words."""
    found = error.errors(include_url=False)[0]
    name, value = str(found["loc"][0]) if found["loc"] else "", found["input"]
    prefix = getattr(cls, "prefix", "")
    key = prefix + name
    if found["type"] == "unexpected_keyword_argument":
        return unknown_name("setting", key, [prefix + field for field in fields_of(cls)])
    if found["type"] in ("missing_keyword_only_argument", "missing_argument", "missing"):
        return f"setting without a value: {key}"
    if name not in fields_of(cls):
        return f"{cls.__name__}: {found['msg']}"
    words = [t.get_args(member) for member in _members(fields_of(cls)[name].annotation)]
    if found["type"] == "literal_error" and isinstance(value, str):
        return unknown_name(key, value, [str(word) for each in words for word in each])
    inside = "".join(f"[{place}]" for place in found["loc"][1:] if isinstance(place, int))
    if found["type"].startswith(("greater_than", "less_than")):
        bounds = allowed(cls, name).partition(" ")[2]
        return f"{key}{inside}={value}: must be {bounds}{example(cls, name)}"
    kind = type(value).__name__
    return f"{key}{inside}={shown(value)} is a {kind}; allowed: {allowed(cls, name)}{example(cls, name)}"
