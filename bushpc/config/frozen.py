"""A run's frozen config.yaml: whole, or without the model, whose class would import torch, for `report` and `audit`."""

from __future__ import annotations

import functools
import sys
import typing as t
from dataclasses import dataclass
from pathlib import Path

from bushpc.config import freeze
from bushpc.config.cell import CellConfig
from bushpc.config.data import DataConfig
from bushpc.config.evaluate import EvaluateConfig
from bushpc.config.fields import Settings, fields_of
from bushpc.config.read import YAML_FAILS, build, flat, load_yaml, plain
from bushpc.config.train import TrainConfig
from bushpc.errors import ConfigError

S = t.TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class FrozenSettings:
    """What does not need the model."""

    seed: int
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig

    @classmethod
    def load(cls, path: Path) -> FrozenSettings:
        """Settings that this version does not know are ignored.

        Raises: ConfigError for a file that is missing, damaged or no config.
        """
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error})") from error

    @classmethod
    def parse(cls, text: str) -> FrozenSettings:
        """Raises: ConfigError."""
        try:
            content = _read(text)
            return cls(
                seed=int(content.get("seed", _defaults()["seed"])),
                data=_known(DataConfig, content.get("data", {})),
                train=_known(TrainConfig, content.get("train", {})),
                evaluate=_known(EvaluateConfig, content.get("evaluate", {})),
            )
        except YAML_FAILS as error:
            raise ConfigError(f"no settings of a cell: {error}") from error


def load_frozen(path: Path, run_dir: Path, command: str) -> CellConfig:
    """A frozen `config.yaml` of a run. command: what else goes on with that run, by the code that lies in it.

    Raises: ConfigError with the command to use where another version of bushpc wrote it.
    """
    try:
        return CellConfig.load(path)
    except ConfigError as error:
        codes = sorted((run_dir / "code").glob("*"), key=lambda code: code.stat().st_mtime)
        # Not by PYTHONPATH: `python -m` looks into the current folder first, which may be a clone.
        way_on = f"(cd {codes[-1]} && {sys.executable} -m bushpc.cli {command})" if codes else "none"
        raise ConfigError(
            f"{path} is no config of this version of bushpc ({error}). The version that wrote it continues the run: "
            f"{way_on}. Or start again under another name=…"
        ) from error


def flat_settings(text: str, instead: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """All that a config.yaml states as `train.lr` → value, and the defaults of what it lacks. Values are not checked.

    instead: replaces some of the defaults. Raises: ConfigError for what is no YAML of settings.
    """
    try:
        return {**_defaults(), **instead, **flat(_read(text))}
    except YAML_FAILS as error:
        raise ConfigError(f"no settings of a cell: {error}") from error


def _read(text: str) -> dict[str, t.Any]:
    content = load_yaml(text)
    if not isinstance(content, dict):
        raise TypeError(f"a {type(content).__name__} where groups of settings are needed")
    return dict(freeze.CONFIG.read(content))


def _known(cls: type[S], content: t.Any) -> S:
    known = fields_of(cls)
    return build(cls, {key: value for key, value in content.items() if key in known})


@functools.cache
def _defaults() -> dict[str, t.Any]:
    stated = {name: info for name, info in fields_of(CellConfig).items() if not info.is_required()}
    return flat({name: plain(info.get_default(call_default_factory=True)) for name, info in stated.items()})
