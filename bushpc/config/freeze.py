"""Format numbers of what is written to stay: configs, checkpoints, exports, manifests. What an older version wrote, a
newer one reads.

A field that is added needs no new format: where it is missing, it has its default. A field that is renamed or changes
its meaning does: raise the number, and add the function that makes the new form of the old one. A setting that is
renamed also goes on being read under its earlier name in yaml files, words and grids: add it to RENAMED.
"""

from __future__ import annotations

import functools
import importlib.metadata
import typing as t
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bushpc.errors import BushpcError, ConfigError, DataError

Content = dict[str, t.Any]
# Settings by their earlier names. A new name stays in the group of the old one.
RENAMED = {"cluster.gpus_per_node": "cluster.gpus"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file with its number.

    migrations: number → what makes the content of the next one. What has no number is of format 1: 71c433b and before.
    """

    kind: str
    number: int
    error: type[BushpcError]
    migrations: Mapping[int, Callable[[Content], Content]] = field(default_factory=dict)

    def stamp(self) -> Content:
        """What a file states about itself: its format, and which bushpc wrote it."""
        return {"format": self.number, "bushpc": version()}

    def read(self, content: Mapping[str, t.Any], where: str = "") -> Content:
        """The content in today's format, without its stamp. where: the file, for the message. Raises: `error`."""
        content = dict(content)
        written, by = content.pop("format", 1), content.pop("bushpc", None)
        if type(written) is not int or written < 1:
            raise self.error(
                f"{where or self.kind} has format {written!r:.80}: it is damaged, formats are numbered 1, 2, …"
            )
        if written > self.number:
            raise self.error(
                f"{where or f'this {self.kind}'} has format {written}, and bushpc {version()} reads {self.kind}s up to "
                f"format {self.number}. It was written by bushpc {by or '(unknown)'}: use that version or a newer one"
            )
        for number in range(written, self.number):
            content = self.migrations[number](content)
        return content


def todays_name(key: str) -> str:
    """Of a setting that may be given by an earlier name.

    >>> todays_name("cluster.gpus_per_node")
    'cluster.gpus'
    """
    return RENAMED.get(key, key)


def with_todays_names(content: Mapping[str, t.Any], prefix: str = "", where: str = "") -> Content:
    """Settings, of which some may have earlier names. prefix: of their group, such as `cluster.`.

    Raises: ConfigError where a setting has both its names.
    """
    found: Content = {}
    for name, value in content.items():
        today = todays_name(f"{prefix}{name}").removeprefix(prefix)
        if today != name and today in content:
            raise ConfigError(f"{where}: {name} is the earlier name of {today}; keep {today} alone".lstrip(": "))
        nested = isinstance(value, Mapping)
        found[today] = with_todays_names(value, f"{prefix}{name}.", where) if nested else value
    return found


@functools.cache
def version() -> str:
    """Of this bushpc, as it is installed."""
    try:
        return importlib.metadata.version("bushpc")
    except importlib.metadata.PackageNotFoundError:  # run from a copy of its code
        return "(not installed)"


def _conditions_by_name(content: Content) -> Content:
    """Format 1 of an export knew spatial prompts alone: size bins of each fold, a threshold tau of all."""
    recipe = {key: value for key, value in content["recipe"].items() if key != "tau"}
    folds = []
    for fold in content["folds"]:
        bins = fold["size_bins"]
        state = {"spatial_prompts": {"size_bins": bins, "tau": content["recipe"]["tau"]}} if bins else {}
        folds.append({**fold, "conditions": state})
    return {**content, "recipe": recipe, "folds": folds}


CONFIG = Format(kind="config", number=2, error=ConfigError, migrations={1: with_todays_names})
# No ResumeError: a run must not walk back from a newer checkpoint to an older one, as it does from a damaged one.
CHECKPOINT = Format(kind="checkpoint", number=1, error=ConfigError)
EXPORT = Format(kind="export", number=2, error=DataError, migrations={1: _conditions_by_name})
MANIFEST = Format(kind="manifest", number=1, error=DataError)
