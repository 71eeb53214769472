"""Errors a user can act on. First room of the house: everything may import it, it imports nothing.

Each message says three things: what was given, what is allowed, what to do next. The command line prints
the message alone; a traceback is for our own defects, which `assert` reports.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BushpcError(Exception):
    """Base of every error that is the user's to solve; the command line exits with 2 on it."""


class ConfigError(BushpcError):
    """A name, type or combination in the configuration that cannot work."""


class DataError(BushpcError):
    """Raw data, shards or folds that are missing, damaged or contradict each other."""


class WeightsError(BushpcError):
    """Pretrained weights that are not staged, or are not what their name says."""


class ResumeError(BushpcError):
    """A run directory or checkpoint that cannot be continued as asked."""


class DispatchError(BushpcError):
    """The cluster refused, or what it said about a job cannot be understood."""


class TrainingError(BushpcError):
    """Training that must not go on: a non-finite loss, a world that is not the one asked for."""


def unknown_name(kind: str, given: str, valid: Iterable[str], then: str = "") -> str:
    """The one wording for a name that does not exist: the nearest match first, then every valid name.

    >>> print(unknown_name("model", "xbusnt", ["unet", "xbusnet"]))
    unknown model 'xbusnt'; did you mean 'xbusnet'? Valid: unet, xbusnet.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    tail = f" {then}" if then else ""
    return f"unknown {kind} '{given}'{hint} Valid: {', '.join(names) or 'none'}.{tail}"
