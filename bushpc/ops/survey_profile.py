"""The profile of a site that `bushpc doctor --slurm --write NAME` writes: configs/cluster/<NAME>.yaml."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import math
import re
import textwrap
import typing as t
from collections.abc import Sequence
from pathlib import Path

import yaml

from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import OK, Check
from bushpc.config import CellConfig, ClusterConfig, Settings, as_word, compose, places
from bushpc.config.fields import fields_of
from bushpc.config.read import plain
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import why_not_writable, write_atomically
from bushpc.ops.survey import CLEARED, Say, Survey

# Killed at once is measured as 0.0, and a cluster's grace_s has to be more than that.
LEAST_GRACE_S = 0.1
COMMENT_WIDTH = 118


def profile_path(name: str, force: bool, option: str = "--write") -> Path:
    """Where the profile goes; nothing is made. option: what the user gave the name to.

    Raises: ConfigError for a name that cannot be one, a place that can't be written, or (without `force`) a name that
    is taken.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(f"{option} {name!r}: a name of letters, digits, '_' and '-' is needed, then used as cluster=")
    path = places.new_config_folder() / "cluster" / f"{name}.yaml"
    there = places.config_file(f"cluster/{name}")
    if there and not force:
        raise ConfigError(f"{option} {name}: {there} exists; choose another name, or overwrite it with --force")
    if reason := why_not_writable(path.parent):
        raise ConfigError(f"{option} {name}: {reason}. Set {places.VARIABLE} to a folder of yours for configs")
    return path


def write_profile(path: Path, text: str) -> None:
    """Write a profile whole, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def completed(config: CellConfig, typed: Sequence[str], *, say: Say) -> CellConfig:
    """The config with what the site has for settings of its profile that are left open. typed: words, which win.

    Raises: ConfigError; DispatchError where the cluster does not answer.
    """
    given = {word.partition("=")[0] for word in typed}
    found = cluster_for(config.cluster.executor).suggest(config.cluster)
    if config.engine.device == "cpu" and given & {"engine", "engine.device"}:
        found = {key: value for key, value in found.items() if key not in ("gpus", "cells_per_job", "cpus_per_rank")}
    words = [f"cluster.{key}={as_word(value)}" for key, value in found.items() if f"cluster.{key}" not in given]
    if words:
        say(f"from the site: {' '.join(words)}")
    return compose([*words, *typed])


def profile_text(config: CellConfig, found: Survey, date: datetime.date) -> str:
    """A yaml with what differs from the defaults: composed values, the measured grace time, a comment per finding."""
    cluster = config.cluster
    if found.grace_s is not None:
        cluster = dataclasses.replace(cluster, grace_s=max(found.grace_s, LEAST_GRACE_S))
    if found.time_limit_min < cluster.time_min:
        cluster = dataclasses.replace(cluster, time_min=int(found.time_limit_min))
    template = places.config_file(f"cluster/{config.choices['cluster']}")
    stated = template.read_text(encoding="utf-8").splitlines() if template else []
    about = itertools.takewhile(lambda line: line.startswith("#"), stated)
    # Its first paragraph; where the template was measured itself, its findings are of another day.
    header = list(itertools.takewhile(lambda line: line != "#" and not line.startswith("# Measured "), about))
    if config.choices["cluster"] == cluster.executor:  # the file of its defaults, which says nothing of a site
        header = ["# This site's Slurm."]
    measured = f"# Measured {date.isoformat()} by `bushpc doctor --slurm`, from cluster={config.choices['cluster']}:"
    checks = [*what_is_there(cluster), *(check for check in found.checks if check.name != CLEARED)]
    return yaml_text([*header, measured], checks, cluster)


def what_is_there(cluster: ClusterConfig) -> list[Check]:
    """The site's partitions and limits, as far as its Slurm tells."""
    there: list[Check] = []
    with contextlib.suppress(DispatchError):
        there += cluster_for(cluster.executor).describe()
        limits = cluster_for(cluster.executor).limits(cluster)
        there.append(Check(name="limits", verdict=OK, found=limits.why or "the site tells of none on jobs"))
    return there


def yaml_text(header: Sequence[str], checks: Sequence[Check], cluster: ClusterConfig) -> str:
    """The yaml of a profile: comments, one per finding, then what differs from the defaults, each with its sentence."""
    lines = list(header)
    for check in checks:
        text = f"- {check.name}: {check.found}"
        lines += textwrap.wrap(text, COMMENT_WIDTH, initial_indent="# ", subsequent_indent="#   ")
    lines.append("")
    for name, value in stated(cluster).items():
        sentence = ClusterConfig.about(name).sentence
        lines += textwrap.wrap(sentence, COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# ")
        lines.append(f"{name}: {_yaml(value)}")
    return "\n".join(lines) + "\n"


def stated(cluster: ClusterConfig) -> dict[str, t.Any]:
    """What a profile's file has to state, as plain data: the executor, and all that differs from the defaults."""
    values = {field.name: getattr(cluster, field.name) for field in dataclasses.fields(ClusterConfig)}
    own = (name for name, value in values.items() if name == "executor" or value != ClusterConfig.default(name))
    return {name: _what_differs(values[name]) for name in own}


def _what_differs(value: t.Any) -> t.Any:
    """Of a group of settings those that differ from their defaults, as plain data; anything else as it is."""
    if isinstance(value, Settings):
        own = {name: getattr(value, name) for name in fields_of(type(value))}
        return {name: plain(item) for name, item in own.items() if item != type(value).default(name)}
    return plain(value)


def _yaml(value: t.Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=math.inf)).removesuffix("...\n").strip()
