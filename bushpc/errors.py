"""Errors a user can act on. Every module may import this one; it imports nothing from bushpc.

Each message says three things: what was given, what is allowed, what to do next. The command line prints only the
message. Tracebacks are for our own bugs, which `assert` reports.
"""

from __future__ import annotations

import difflib
import typing as t
from collections.abc import Iterable, Sequence

# Valid names that a message lists; of more only the nearest.
MOST_NAMES = 100
NEAREST = 8


class BushpcError(Exception):
    """Base class of every error that the user can fix; the command line then exits with 2.

    code: its name in scripts, which stays the same. cure: what to do, where the message alone does not tell. Both are
    in the reference, and the class's docstring is the cause there.
    """

    code: t.ClassVar[str] = "error"
    cure: t.ClassVar[str] = "Do what the message says."


class BushpcWarning(UserWarning):
    """Something the user should know although work continues. In tests it is an error (pyproject.toml)."""


class ConfigError(BushpcError):
    """A name, type or combination in the configuration that cannot work."""

    code = "config"
    cure = "Change the word or line of yaml that the message names; `bushpc config` shows where a value is from."


class DataError(BushpcError):
    """Raw data, shards or folds that are missing, damaged or contradictory."""

    code = "data"
    cure = "Pack the dataset again with the command in the message, or mend the raw file that it names."


class WeightsError(BushpcError):
    """Pretrained weights that are not staged, or that differ from what was pulled."""

    code = "weights"
    cure = (
        "Run `bushpc weights pull` with the same settings on a machine with internet; `bushpc weights check` compares."
    )


class ResumeError(BushpcError):
    """A run folder or checkpoint that cannot be continued as requested."""

    code = "resume"
    cure = "Set back what the message names, or start under another name=; `bushpc status` shows what there is."


class DispatchError(BushpcError):
    """The cluster rejected a request, or its answer about a job cannot be parsed."""

    code = "dispatch"
    cure = "Read the site's words in the message; `bushpc doctor cluster=…` tries one job of each kind."


class TrainingError(BushpcError):
    """Training that must not continue: a non-finite loss, or ranks that differ from the configuration."""

    code = "training"
    cure = "Look at the log and the curves; try a lower train.lr, or engine.precision=fp32."


def first_of(names: Sequence[str], most: int) -> str:
    """The first of many names, and how many more there are.

    >>> first_of(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def unknown_name(kind: str, given: str, valid: Iterable[str], then: str = "") -> str:
    """The message for an unknown name: the closest match first, then every valid name.

    >>> print(unknown_name("model", "xbusnt", ["unet", "xbusnet"]))
    unknown model 'xbusnt'; did you mean 'xbusnet'? Valid: unet, xbusnet.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    tail = f" {then}" if then else ""
    if len(names) > MOST_NAMES:  # of hundreds only those that it may be
        others = difflib.get_close_matches(given, names, n=NEAREST, cutoff=0.0)
        return f"unknown {kind} '{given}'{hint} Nearest: {', '.join(others)}; and {len(names) - NEAREST} more.{tail}"
    return f"unknown {kind} '{given}'{hint} Valid: {', '.join(names) or 'none'}.{tail}"
