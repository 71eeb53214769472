"""All settings of a config class as one list: `train.lr` → what is known of it, and its default."""

from __future__ import annotations

import typing as t

from bushpc.config.fields import About, Settings, cached, fields_of
from bushpc.config.model import ModelConfig
from bushpc.config.read import plain


@cached
def kinds(cls: type[Settings], prefix: str | None = None) -> dict[str, tuple[About, t.Any]]:
    """`train.lr` → what is known of it and its default, for a config class and those that it holds."""
    prefix = cls.prefix if prefix is None else prefix
    found: dict[str, tuple[About, t.Any]] = {}
    for name, info in fields_of(cls).items():
        inner = info.annotation
        if name in ("model_class", "choices"):  # what the groups' names stand for, no settings
            continue
        if isinstance(inner, type) and issubclass(inner, Settings):
            found |= {} if inner is ModelConfig else kinds(inner, f"{prefix}{name}.")
            continue
        default = None if info.is_required() else cls.default(name)
        found[prefix + name] = cls.about(name), default
        if isinstance(default, dict):
            found |= {f"{prefix}{name}.{key}": (cls.about(name), value) for key, value in default.items()}
    return found


def field_of(cls: type[Settings], key: str, model: type[Settings] | None = None) -> tuple[type[Settings], str] | None:
    """The class and the name of the field that `train.lr` is; None if there is none. model: what `model.` means."""
    name, _, rest = key.partition(".")
    if name not in fields_of(cls):
        return None
    inner = model if name == "model" and model else fields_of(cls)[name].annotation
    if rest and isinstance(inner, type) and issubclass(inner, Settings):
        return field_of(inner, rest)
    return cls, name


def is_hashed(kind: tuple[About, t.Any] | None, value: t.Any) -> bool:
    """Whether a setting is part of a cell's hash. One of a later format is not while it has its default."""
    about, default = kind or (About(sentence=""), None)
    return about.affects != "nothing" and (about.since == 1 or value != plain(default))
