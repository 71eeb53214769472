"""The environment of every process that bushpc starts, and of its own commands. No other module edits one.

    os.environ ─RULES, and those of the cluster backends→ for_process(kind) → sbatch, squeue …, jobs, helper processes

What a user, a site or a notebook has set may be meant for something else: a filter of squeue would hide a job from
`bushpc status`, and a notebook's drawing backend does not exist in a job.
docs/reference/environment.md lists the rules.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import io
import os
import resource
import sys
import typing as t
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

COMMAND: t.Final = "cluster command"
JOB: t.Final = "job"
WORKER: t.Final = "worker"
# cluster command: sbatch, squeue and the like. job: what is submitted, also while it is being submitted.
# worker: a helper process of this one, such as git, a compiler or a rank's watchdog.
Kind = t.Literal["cluster command", "job", "worker"]
EVERY: tuple[Kind, ...] = ("cluster command", "job", "worker")
ENCODING = "utf-8:backslashreplace"
# Of a rank's address space: importing bushpc.cell fails at 2.5 GB and works at 3.5 GB, where a rank has been
# reported to spin at its start for ever.
LEAST_ADDRESSES = 6 * 2**30


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to some environment variables.

    names: `*` stands for any characters. kinds: in which processes. sets: the new value; None removes the variable.
    but: names that the rule leaves alone. said: the user is told, in one line, that they were removed.
    """

    names: tuple[str, ...]
    why: str
    kinds: tuple[Kind, ...] = EVERY
    sets: str | None = None
    but: tuple[str, ...] = ()
    said: bool = False

    def covers(self, name: str) -> bool:
        return _matches(name, self.names) and not _matches(name, self.but)


RULES = (
    Rule(names=("PYTHONUTF8",), sets="1", why="Files are UTF-8, also under LC_ALL=C, POSIX or a latin-1 locale."),
    Rule(names=("PYTHONIOENCODING",), sets=ENCODING, why="A log takes every character; no job ends in an encoding."),
    Rule(names=("MPLBACKEND",), why="A notebook's drawing backend does not exist outside it; figures go to files."),
    Rule(
        names=(
            *("PMI*", "SUBMITIT_*", "MASTER_*", "ACCELERATE_*", "TORCHELASTIC_*"),
            *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
        ),
        kinds=(COMMAND, JOB),
        why="They describe the launcher that this process came from; a new job would take them for its own.",
    ),
    Rule(
        names=("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"),
        kinds=(WORKER,),
        why="Inside a git hook they name another repository than the one that bushpc asks git about.",
    ),
)

_backends: list[Rule] = []


def add_rules(rules: Iterable[Rule]) -> None:
    """The rules of a cluster backend for its own variables; `Cluster` calls it for every subclass."""
    _backends.extend(rule for rule in rules if rule not in _backends)


def rules() -> tuple[Rule, ...]:
    """All rules: the general ones, then those of the backends that have been imported."""
    return (*RULES, *_backends)


def for_process(kind: Kind) -> dict[str, str]:
    """The environment for a process of this kind, made from this process's own."""
    environment = dict(os.environ)
    for rule in rules():
        if kind not in rule.kinds:
            continue
        for name in [name for name in environment if rule.covers(name)]:
            del environment[name]
        if rule.sets is not None:
            environment |= dict.fromkeys(rule.names, rule.sets)
    return environment


@contextlib.contextmanager
def applied(kind: Kind) -> Iterator[None]:
    """Give this process that environment for a while, for a library that starts the process itself."""
    kept = dict(os.environ)
    new = for_process(kind)
    os.environ.clear()
    os.environ.update(new)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def shell_lines() -> list[str]:
    """The same for a job's batch script: the site's login scripts and `cluster.setup` may have set variables again."""
    rules = [rule for rule in RULES if JOB in rule.kinds and not any("*" in name for name in rule.names)]
    unset = [name for rule in rules for name in rule.names if rule.sets is None]
    return [
        f"unset {' '.join(unset)}",
        "export " + " ".join(f"{name}={rule.sets}" for rule in rules if rule.sets for name in rule.names),
    ]


def removed(kind: Kind) -> list[str]:
    """`NAME=value` of the variables that the user set and that a process of this kind does not get."""
    told = [rule for rule in rules() if rule.said and kind in rule.kinds]
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if any(rule.covers(name) for rule in told)]


def address_space_note() -> str:
    """A sentence where `ulimit -v` holds in this process and in those that it starts; "" where it does not."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return (
        f"`ulimit -v` allows a process {limit / 2**30:.1f} GB of addresses, and a rank needs more than its memory: "
        "where they are too few it hangs, or ends without a word, while it starts"
    )


def few_addresses() -> bool:
    """Whether `ulimit -v` leaves fewer addresses than a rank on the CPU has been seen to need."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESSES


@functools.cache
def say_once(line: str) -> None:
    """A line on standard error, once in the life of this process."""
    print(f"bushpc: {line}", file=sys.stderr, flush=True)


def prepare_command() -> None:
    """Make this process, one of bushpc's commands, independent of locale and notebook; it may start itself again.

    Python chooses how it reads files when it starts. So in a locale that is not UTF-8 the command starts again in
    Python's UTF-8 mode, as the same process. The terminal keeps its encoding; what that lacks is written as \\u2026.
    """
    os.environ.pop("MPLBACKEND", None)
    if not sys.flags.utf8_mode and _encoding_of_files() != "utf-8":
        terminal = getattr(sys.stdout, "encoding", None) or "ascii"
        told = os.environ.get("PYTHONIOENCODING", "").partition(":")[0] or terminal
        env = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": f"{told}:backslashreplace"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _encoding_of_files() -> str:
    import codecs
    import locale

    return codecs.lookup(locale.getencoding()).name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
