"""Hydra yaml + overrides → one typed, frozen `CellConfig` per training run. Every command starts here.

`configs/` documents each field where it stands; the dataclasses below give each its type. A name, key or value
that cannot work is refused here, on the login node, before anything is queued.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import re
import typing as t
from pathlib import Path

import yaml

from bushpc.config import places
from bushpc.config.fields import Settings
from bushpc.config.read import build, flat
from bushpc.config.schema import TOOLS, CellConfig
from bushpc.errors import ConfigError, unknown_name

GROUPS = ("data", "model", "engine", "cluster")
S = t.TypeVar("S", bound=Settings)


def compose(overrides: t.Sequence[str]) -> CellConfig:
    """Compose `configs/` with Hydra-style overrides into one checked config.

    Raises: ConfigError naming the nearest valid group, option or key for anything unknown.
    """
    return Composer(overrides)({})


class Composer:
    """Overrides that many cells share → cells. Hydra takes a third of a second, and is asked once per choice of groups.

    overrides: as on the command line; a later word wins. Raises: ConfigError, as `compose` does.
    """

    def __init__(self, overrides: t.Sequence[str]) -> None:
        self.overrides = tuple(overrides)
        self._chosen = {group: _group_choice(overrides, group) for group in GROUPS}
        self._composed: dict[tuple[str, ...], tuple[set[str], dict[str, t.Any]]] = {}

    def __call__(self, settings: t.Mapping[str, t.Any]) -> CellConfig:
        """The cell with `settings` besides, as `train.lr` → value, or a group → one of its names; they win.

        Raises: ConfigError.
        """
        groups = {key: _group_choice([f"{key}={value}"], key) for key, value in settings.items() if key in GROUPS}
        chosen = self._chosen | groups
        valid, content = self._compose(chosen)
        content = copy.deepcopy(content)
        for key, value in settings.items():
            if key in GROUPS:
                continue
            if key not in valid:
                raise ConfigError(unknown_name("setting", key, valid))
            *path, last = key.split(".")
            group = content
            for name in path:
                group = group[name]
            group[last] = value
        content["choices"] = chosen
        return _resolve(CellConfig.from_dict(content))

    def _compose(self, chosen: t.Mapping[str, str]) -> tuple[set[str], dict[str, t.Any]]:
        """Valid keys under this choice of groups, and the settings that the overrides give them."""
        groups = tuple(f"{group}={choice}" for group, choice in chosen.items())
        if groups not in self._composed:
            values = [word for word in self.overrides if word.partition("=")[0] not in GROUPS]
            valid = _leaf_keys(_hydra_compose(list(groups)))
            for word in values:
                key, equals, _ = word.partition("=")
                if not equals:
                    raise ConfigError(f"'{word}' is not an override: write key=value, for example train.lr=3e-4")
                if key not in valid:
                    raise ConfigError(unknown_name("setting", key, sorted(valid)))
            self._composed[groups] = valid, _hydra_compose([*groups, *values])
        return self._composed[groups]


def reconfigure(cell: CellConfig, overrides: t.Sequence[str], kept: t.Mapping[str, t.Any]) -> CellConfig:
    """A frozen cell with these overrides, which may choose another cluster profile. kept: wins over that profile.

    Raises: ConfigError.
    """
    if not overrides:
        return cell
    content = cell.to_dict()
    profiles = [word.partition("=")[2] for word in overrides if word.startswith("cluster=")]
    settings: dict[str, t.Any] = {}
    if profiles:
        name = _group_choice([f"cluster={profiles[-1]}"], "cluster")
        content["cluster"] = yaml.safe_load((places.CONFIG_DIR / "cluster" / f"{name}.yaml").read_text())
        content["choices"] = {**cell.choices, "cluster": name}
        settings |= kept
    for word in overrides:
        key, equals, _ = word.partition("=")
        if equals and key not in GROUPS:
            settings[key] = _parsed(word)
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if not isinstance(content.get(group), dict) or name not in content[group]:
            raise ConfigError(unknown_name("setting", key, sorted(_leaf_keys(content))))
        content[group][name] = value
    changed = _resolve(CellConfig.from_dict(content))
    if changed.cluster.gpus_per_node and changed.engine.device == "cpu":
        raise ConfigError(
            f"cluster.gpus_per_node={changed.cluster.gpus_per_node}: this run trains on the CPU (engine.device=cpu, on "
            "which its result depends); add cluster.gpus_per_node=0"
        )
    return changed


def compose_command(cls: type[S], name: str, overrides: t.Sequence[str]) -> S:
    """`configs/<name>.yaml` with overrides: the settings of a command that trains nothing. Raises: ConfigError."""
    content = yaml.safe_load((places.CONFIG_DIR / f"{name}.yaml").read_text())
    valid = _leaf_keys(content)
    for word in overrides:
        *path, last = word.partition("=")[0].split(".")
        if ".".join([*path, last]) not in valid:
            raise ConfigError(unknown_name("setting", word.partition("=")[0], valid))
        group = content
        for key in path:
            group = group[key]
        group[last] = _parsed(word)
    return build(cls, content)


def _parsed(word: str) -> t.Any:
    """The value of one override in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word).value()
    except HydraException as error:
        raise ConfigError(f"{word} cannot be read: {error}") from error


def config_names(group: str) -> list[str]:
    """The valid names of a group: the yaml files in its folder."""
    return sorted(path.stem for path in (places.CONFIG_DIR / group).glob("*.yaml"))


def _group_choice(overrides: t.Sequence[str], group: str) -> str:
    given = [word.partition("=")[2] for word in overrides if word.partition("=")[0] == group]
    if not given:
        given = [entry[group] for entry in _main_defaults() if isinstance(entry, dict) and group in entry]
    choice = given[-1]
    if choice not in config_names(group):
        raise ConfigError(unknown_name(group, choice, config_names(group)))
    return choice


def _main_defaults() -> list[t.Any]:
    return yaml.safe_load((places.CONFIG_DIR / "config.yaml").read_text())["defaults"]


def _hydra_compose(overrides: list[str]) -> dict[str, t.Any]:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(places.CONFIG_DIR), version_base="1.3"):
            config = hydra.compose("config", overrides=overrides)
            return t.cast("dict[str, t.Any]", OmegaConf.to_container(config, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the overrides {overrides} cannot be read: {error}") from error


def _resolve(cell: CellConfig) -> CellConfig:
    """Turn `auto` into what the cluster really has, refuse what is not there, make folders absolute.

    Jobs run from a code snapshot in another folder, so nothing relative may survive composition.
    """
    has_gpu = cell.cluster.gpus_per_node > 0
    device = cell.engine.device
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if device == "cuda" and not has_gpu:
        raise ConfigError(
            f"engine.device=cuda, but cluster={cell.choices['cluster']} gives a cell no GPU: "
            "set cluster.gpus_per_node, or engine=cpu"
        )
    for tool in cell.train.track:
        if importlib.util.find_spec(tool) is None:
            raise ConfigError(
                f"train.track names {tool}, which is not installed: pip install {TOOLS[tool]}, or leave it out"
            )
    precision = cell.engine.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    engine = dataclasses.replace(cell.engine, device=device, precision=precision)
    return dataclasses.replace(
        cell,
        engine=engine,
        train=dataclasses.replace(cell.train, weights_from=_absolute(cell.train.weights_from)),
        data=dataclasses.replace(
            cell.data,
            root=str(cell.data.folder),
            stream=_absolute_stream(cell.data.stream),
            synthetic=_absolute(cell.data.synthetic),
            synthetic_ratio=float(cell.data.mixed) if cell.data.synthetic_ratio is None else cell.data.synthetic_ratio,
        ),
        runs_dir=_absolute(cell.runs_dir) or str(places.ROOT / "runs"),
        weights_dir=_absolute(cell.weights_dir) or str(places.ROOT / "weights"),
        evaluate=dataclasses.replace(
            cell.evaluate, external=tuple(str(shards_folder(given)) for given in cell.evaluate.external)
        ),
        loader=dataclasses.replace(
            cell.loader,
            cache_dir=_absolute(cell.loader.cache_dir),
            features_dir=_absolute(cell.loader.features_dir),
        ),
    )


def shards_folder(data: str) -> Path:
    """The folder of a packed dataset, given by its name or itself. Raises: ConfigError."""
    if data in config_names("data"):
        return places.ROOT / "shards" / data
    if data and Path(data).expanduser().is_dir():
        return Path(data).expanduser().resolve()
    raise ConfigError(unknown_name("data", data, config_names("data"), "Or a folder of shards that is there."))


def _absolute(folder: str | None) -> str | None:
    return folder and str(Path(folder).expanduser().resolve())


def _absolute_stream(stream: str | None) -> str | None:
    """A local prefix of shard names made absolute, as jobs run elsewhere; URLs and commands as they are."""
    if stream is None or re.match(r"[a-z]+:", stream):
        return stream
    return os.path.abspath(os.path.expanduser(stream)) + ("/" if stream.endswith("/") else "")


def _leaf_keys(content: t.Mapping[str, t.Any]) -> set[str]:
    return set(flat(content)) - {"model._target_"}
