"""One choice of groups, with the words on top → plain settings, each with where its value comes from."""

from __future__ import annotations

import typing as t

from bushpc.config import freeze
from bushpc.config.catalogue import field_of, kinds
from bushpc.config.fields import Settings, fields_of, is_options, is_text
from bushpc.config.read import Scalar, plain
from bushpc.config.source import interpolates
from bushpc.errors import ConfigError, unknown_name


class Content:
    """Settings under one choice of groups: base ← yaml ← words, resolved.

    cls: what they are settings of; model: the Config of its model, if it has one. base: plain settings, texts quoted.
    yaml: as Hydra composed it, unresolved.
    """

    def __init__(
        self,
        cls: type[Settings],
        base: dict[str, t.Any],
        yaml: t.Any,
        words: t.Mapping[str, str],
        model: type[Settings] | None = None,
    ) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        self.cls, self.model, self._yaml = cls, model, yaml
        self.choices: dict[str, str] = {}
        self.valid = set(kinds(cls) | (kinds(model) if model else {}))
        values = {key: self._of_word(key, text) for key, text in words.items()}
        tree = OmegaConf.create(base, flags={"allow_objects": True})
        try:
            tree.merge_with(yaml)
            OmegaConf.set_struct(tree, False)  # options of commands may be new; all other keys are checked above
            for key, value in _settled(values).items():
                *path, last = key.split(".")
                node = tree
                for name in path:
                    node = node[name]
                node[last] = value
            self._content = _typed_where_interpolated(OmegaConf.to_container(tree, resolve=True))
        except (OmegaConfBaseException, TypeError, KeyError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"the settings cannot be composed: {lines[0]}. `${{oc.env:NAME}}` and `${{group.setting}}` stand for "
                "another value; a `${NAME}` for the shell has no '.' or ':'"
            ) from error

    def with_values(self, values: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The settings with these as well, as `train.lr` → value. Raises: ConfigError for an unknown key."""
        content = dict(self._content)
        for key, value in _settled({freeze.todays_name(key): value for key, value in values.items()}).items():
            self._require(key)
            *path, last = key.split(".")
            group = content
            for name in path:
                group[name] = dict(group[name])
                group = group[name]
            group[last] = value
        return content

    def of_row(self, value: t.Any) -> t.Any:
        """A value as a grid's yaml gives it, for the field to read."""
        if isinstance(value, (list, tuple)):
            return [self.of_row(item) for item in value]
        if not isinstance(value, str):
            return value
        if interpolates(value):
            from omegaconf import OmegaConf

            value = str(OmegaConf.create({**self._content, "row": value}, flags={"allow_objects": True})["row"])
        return Scalar(value, quoted=False, where="a row of the grid", nulls=())

    def source(self, key: str) -> str:
        """Where a setting that no word sets comes from: a yaml with its line, or `default`."""
        from omegaconf import OmegaConf

        found: t.Any = OmegaConf.to_container(self._yaml, resolve=False) if self._yaml else {}
        for name in key.split("."):
            if not isinstance(found, dict) or name not in found:
                return "default"
            found = found[name]
        while isinstance(found, list) and found:
            found = found[0]
        return found.where if isinstance(found, Scalar) else "yaml"

    def _of_word(self, key: str, text: str) -> t.Any:
        """What a word gives its field: a text as it is typed, anything else by Hydra's grammar."""
        self._require(key)
        if interpolates(text):
            return text
        place = field_of(self.cls, key, self.model)
        if key not in self.valid:  # one of several options
            return Scalar(text, quoted=False, where=f"{key}={text}", nulls=("null",))
        if place is None or not is_text(*place):
            value = _parsed(key, text)
            return Scalar(value, quoted=True, where=f"{key}={text}") if isinstance(value, str) else value
        return Scalar(text, quoted=False, where=f"{key}={text}", nulls=("null",))

    def _require(self, key: str) -> None:
        place = field_of(self.cls, key.rpartition(".")[0], self.model)
        if key not in self.valid and not (place and is_options(*place)):
            raise ConfigError(unknown_name("setting", key, sorted(self.valid)))


def words_of(overrides: t.Sequence[str]) -> dict[str, str]:
    """`train.lr=3e-4` → key and text; a later word wins."""
    words: dict[str, str] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"'{word}' is not an override: write key=value, for example train.lr=3e-4")
        key = freeze.todays_name(key)
        words.pop(key, None)
        words[key] = text
    return words


def _settled(values: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """An explicit number of iterations counts, even where a yaml counts epochs. Raises: ConfigError for both."""
    if "train.iterations" not in values:
        return dict(values)
    if (epochs := values.get("train.epochs")) is not None:
        raise ConfigError(
            f"train.iterations={values['train.iterations']} with train.epochs={epochs}: epochs determine the number of "
            "iterations, so give one of them"
        )
    return {**values, "train.epochs": None}


def _parsed(key: str, text: str) -> t.Any:
    """The value of one override in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if override.is_sweep_override():
            first = text.partition(",")[0]
            raise ConfigError(
                f"{key}={text}: one value is needed, for example {key}={first}. To train with several, write a grid: "
                f"configs/grid/mine.yaml with `axes: {{{key}: [{text}]}}`, then bushpc grid grid=mine"
            )
        return override.value()
    except HydraException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{key}={text} cannot be read: {reason}") from error


def defaults_of(cls: type[Settings], model: type[Settings] | None = None) -> dict[str, t.Any]:
    """The defaults of a config class as plain settings; fields without one are left out."""
    content = {name: cls.default(name) for name, info in fields_of(cls).items() if not info.is_required()}
    content.pop("choices", None)
    return quoted(plain(content)) | ({"model": defaults_of(model)} if model else {})


def quoted(value: t.Any) -> t.Any:
    """Plain settings whose texts mean themselves, whatever they look like."""
    if isinstance(value, dict):
        return {key: quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [quoted(item) for item in value]
    return Scalar(value, quoted=True, where="default") if isinstance(value, str) else value


def _typed_where_interpolated(value: t.Any) -> t.Any:
    """What is plain text after composition stood as `${…}`: a number comes out of the environment as text, too."""
    if isinstance(value, dict):
        return {key: _typed_where_interpolated(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed_where_interpolated(item) for item in value]
    return Scalar(value, quoted=False, where="interpolation", nulls=()) if isinstance(value, str) else value
