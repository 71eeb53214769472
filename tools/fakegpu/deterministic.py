"""Which operators of a step raise in deterministic mode on CUDA: what ran, against torch's lists.

deterministic.yaml has the lists and their source.
"""

from __future__ import annotations

import functools
import typing as t
from collections.abc import Iterable
from pathlib import Path

import yaml

LISTS = Path(__file__).with_name("deterministic.yaml")
NEWEST = "2.15"


class Listed(t.NamedTuple):
    """Operators of a step. raises: documented as raising, and the kernel alerts. documented: the documentation says so,
    the kernel does not alert. differs: they run by another algorithm than without deterministic mode."""

    raises: list[str]
    documented: list[str]
    differs: list[str]


@functools.cache
def lists() -> dict[str, t.Any]:
    """Operator → {documented: {version: word}, alerts: {version: bool}}."""
    return t.cast(dict[str, t.Any], yaml.safe_load(LISTS.read_text())["operators"])


def judge(operators: Iterable[str], version: str = NEWEST) -> Listed:
    """operators: names such as `aten::upsample_bilinear2d_backward`."""
    raises, documented, differs = [], [], []
    for name in sorted(set(operators)):
        entry = lists().get(name)
        if entry is None:
            continue
        word, alerts = entry["documented"][version], entry["alerts"][version]
        if word == "deterministic":
            differs.append(name)
        elif alerts:
            raises.append(name)
        elif word == "raises":
            documented.append(name)
    return Listed(raises, documented, differs)
