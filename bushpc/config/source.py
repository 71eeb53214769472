"""Config files for Hydra: yaml whose scalars keep their text, looked for in all folders of `places.config_folders`.

What `010`, `12:30` or `2026_11` mean depends on the field they are given to, which yaml does not know. So a scalar
stays as it is typed, and `read.py` makes of it what its field declares.
"""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import yaml

from bushpc.config import freeze, places
from bushpc.config.read import YAML_FAILS, Scalar
from bushpc.errors import ConfigError

MAIN = "config.yaml"
INTERPOLATION = re.compile(r"\$\{([^{}]*)")


def interpolates(text: str) -> bool:
    """Whether a text has `${oc.env:USER}` or `${train.lr}` in it; `${HOME}` is the shell's to read."""
    return any("." in name or ":" in name for name in INTERPOLATION.findall(text))


class _Loader(yaml.SafeLoader):
    """Scalars as typed; a key that stands twice is refused. file: where they stand."""

    file = ""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[t.Any, t.Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{line}: a name of a setting is needed")
            if key.value in seen:
                raise ValueError(f"{line}: {key.value} stands twice")
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> t.Any:
    if interpolates(node.value):
        return node.value
    where = f"{loader.file}:{node.start_mark.line + 1}"
    return Scalar(node.value, quoted=node.style is not None, where=where)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, t.Any]:
    return loader.construct_mapping(node)


def _list(loader: _Loader, node: yaml.SequenceNode) -> list[t.Any]:
    return [loader.construct_object(item, deep=True) for item in node.value]


for kind in ("str", "int", "float", "bool", "null", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _list)


def read_config(path: Path) -> tuple[str, dict[str, t.Any]]:
    """The text of a config file, and its settings. Raises: ConfigError that names file and line."""
    try:
        text = path.read_text()
        loader = _Loader(text)
        loader.file = shown_path(path)
        content = loader.get_single_data()
    except YAML_FAILS as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if content is None or (isinstance(content, Scalar) and content.is_null):
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings, one `name: value` per line")
    return text, content


def read_main_config(path: Path) -> tuple[str, dict[str, t.Any]]:
    """As `read_config`, of a config.yaml. A user's own may state a few settings and choose a few groups: the others are
    chosen as the shipped one does. What a chosen yaml states wins over it. Raises: ConfigError.
    """
    text, content = read_config(path)
    own, shipped = content.get("defaults", []), read_config(places.shipped_configs() / MAIN)[1]["defaults"]
    if not isinstance(own, list):
        raise ConfigError(f"{path}: `defaults` is a list of groups, such as `- model: xbusnet`")
    own = _unmarked(own)
    chosen = {group for entry in own if isinstance(entry, dict) for group in entry}
    others = [entry for entry in _unmarked(shipped) if isinstance(entry, dict) and not chosen & entry.keys()]
    # The user's after the others, but augment before model: a yaml may choose only of groups that stand before its own.
    first = [entry for entry in others if "augment" in entry]
    others = [entry for entry in others if entry not in first]
    content["defaults"] = [*(entry for entry in ["_self_"] if entry not in own), *first, *own, *others]
    return text, content


def shown_path(path: Path) -> str:
    """A config file's path as messages name it: from the current folder or the clone where it lies below."""
    for folder in (Path.cwd(), places.CLONE):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


def hydra_compose(name: str, groups: t.Sequence[str]) -> t.Any:
    """`<name>.yaml` with these choices of groups, as Hydra composes it: a DictConfig, nothing resolved yet.

    Raises: ConfigError.
    """
    return hydra_choices(name, groups)[0]


def hydra_choices(name: str, groups: t.Sequence[str]) -> tuple[t.Any, dict[str, str]]:
    """As `hydra_compose`, and what is chosen of every group: by `groups`, by a yaml's `override /group`, by `name`."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _register()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize(config_path=None, version_base="1.3"):
            composed = hydra.compose(name, overrides=list(groups), return_hydra_config=True)
            choices = dict(composed.hydra.runtime.choices)
            OmegaConf.set_struct(composed, False)
            OmegaConf.set_readonly(composed, False)
            del composed["hydra"]
            return composed, choices
    except (HydraException, OmegaConfBaseException) as error:
        reason = re.sub(r"\n\s*(provider=|Config search path:).*", "", str(error))
        raise ConfigError(f"{' '.join([f'{name}.yaml', *groups])} cannot be composed: {reason.strip()}") from error


def _register() -> None:
    """Tell Hydra of our kind of config files; once per process."""
    from hydra.core.object_type import ObjectType
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigResult, ConfigSource
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import OmegaConf

    if "bushpc_config_files" in _registered:
        return
    _registered.add("bushpc_config_files")

    class ConfigFiles(ConfigSource):
        """All config folders as one. Scalars are objects to OmegaConf, which hands them on untouched."""

        @staticmethod
        def scheme() -> str:
            return "bushpc"

        def load_config(self, config_path: str) -> ConfigResult:
            path = places.config_file(config_path.removesuffix(".yaml"))
            assert path is not None, config_path
            text, content = read_main_config(path) if path.name == MAIN else read_config(path)
            if "defaults" in content:
                content["defaults"] = _unmarked(content["defaults"])
            header = self._get_header_dict(text)
            group = "" if header.get("package") == "_global_" else config_path.rpartition("/")[0]
            content = freeze.with_todays_names(content, f"{group}." if group else "", shown_path(path))
            config = OmegaConf.create(content, flags={"allow_objects": True})
            return ConfigResult(config=config, path="bushpc://", provider=self.provider, header=header)

        def available(self) -> bool:
            return True

        def is_group(self, config_path: str) -> bool:
            return any((folder / config_path).is_dir() for folder in places.config_folders())

        def is_config(self, config_path: str) -> bool:
            return places.config_file(config_path.removesuffix(".yaml")) is not None

        def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
            names = {
                path.stem if path.is_file() else path.name
                for folder in places.config_folders()
                for path in (folder / config_path).glob("*")
                if (path.suffix == ".yaml" and results_filter in (None, ObjectType.CONFIG))
                or (path.is_dir() and results_filter in (None, ObjectType.GROUP))
            }
            return sorted(names)

    class ConfigFolders(SearchPathPlugin):
        def manipulate_search_path(self, search_path: t.Any) -> None:
            search_path.append("bushpc", "bushpc://")

    Plugins.instance().register(ConfigFiles)
    Plugins.instance().register(ConfigFolders)


_registered: set[str] = set()


def _unmarked(value: t.Any) -> t.Any:
    """A `defaults` list, which is Hydra's to read, in plain data."""
    if isinstance(value, dict):
        return {key: _unmarked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    return (None if value.is_null else value.text) if isinstance(value, Scalar) else value
