"""A cell's config.yaml without its model, whose class would import torch: for `bushpc report` and `bushpc audit`."""

from __future__ import annotations

import functools
import typing as t
from dataclasses import dataclass
from pathlib import Path

from bushpc.config import freeze
from bushpc.config.fields import Settings, fields_of
from bushpc.config.read import YAML_FAILS, build, flat, load_yaml, plain
from bushpc.config.schema import CellConfig, DataConfig, EvaluateConfig, TrainConfig
from bushpc.errors import ConfigError

S = t.TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class FrozenSettings:
    """What does not need the model. settings: all that the file states, and the defaults of what it lacks, as
    `train.lr` → value. stated: which of them the file states.
    """

    seed: int
    prompts: str
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    settings: dict[str, t.Any]
    stated: frozenset[str]

    @classmethod
    def load(cls, path: Path) -> FrozenSettings:
        """Raises: ConfigError for a file that is missing, damaged or no config."""
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error})") from error

    @classmethod
    def parse(cls, text: str) -> FrozenSettings:
        """Settings that this version does not know are kept in `settings` alone. Raises: ConfigError."""
        try:
            content = load_yaml(text)
            if not isinstance(content, dict):
                raise TypeError(f"a {type(content).__name__} where groups of settings are needed")
            content = freeze.CONFIG.read(content)
            stated = flat(content)
            settings = {**_defaults(), **stated}
            return cls(
                seed=int(settings["seed"]),
                prompts=str(settings["prompts"]),
                data=_known(DataConfig, content.get("data", {})),
                train=_known(TrainConfig, content.get("train", {})),
                evaluate=_known(EvaluateConfig, content.get("evaluate", {})),
                settings=settings,
                stated=frozenset(stated),
            )
        except YAML_FAILS as error:
            raise ConfigError(f"no settings of a cell: {error}") from error


def _known(cls: type[S], content: t.Any) -> S:
    known = fields_of(cls)
    return build(cls, {key: value for key, value in content.items() if key in known})


@functools.cache
def _defaults() -> dict[str, t.Any]:
    stated = {name: info for name, info in fields_of(CellConfig).items() if not info.is_required()}
    return flat({name: plain(info.get_default(call_default_factory=True)) for name, info in stated.items()})
