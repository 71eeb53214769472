"""Finds the command, runs it, and turns errors into one line and an exit status."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bushpc import environment
from bushpc.cli.command import Command, Group
from bushpc.errors import BushpcError, unknown_name
from bushpc.files import why_not_writable

# Of the system, where a folder is not this user's to write.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)
USAGE = "usage: bushpc COMMAND [KEY=VALUE …] [--OPTION …]"
DESCRIPTION = "Train, cross-validate, ablate and report breast-ultrasound models on a Slurm cluster or on this machine."
ENDS = """`bushpc COMMAND --help` explains a command. `bushpc --version` names version and commit.
Exit status: 0 done, 1 incomplete or problems found, 2 the command cannot work as given, 3 images were rejected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 incomplete or problems found, 2 an error, 3 bad images."""
    if argv is None:
        environment.prepare_command()
    words = _without_local_rank(list(sys.argv[1:] if argv is None else argv))
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except BushpcError as error:
        print(f"bushpc: {error}", file=sys.stderr)
        if "--json" in words:
            print(_as_json(error))
        return 2
    except BrokenPipeError:  # `bushpc … | head` has read enough; Python would complain once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        path = Path(os.fsdecode(error.filename))
        reason = why_not_writable(path.parent) or f"{path}: {error.strerror}"
        print(f"bushpc: {reason}. Choose another folder (runs_dir=FOLDER, out=FOLDER)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        command, _ = _named(words)
        then = command.after_interrupt if command else ""
        print(f"interrupted; {then}" if then else "interrupted", file=sys.stderr)
        return 130


@functools.cache
def groups() -> tuple[Group, ...]:
    """The command groups: every module of this package that has a GROUP."""
    package = importlib.import_module("bushpc.cli")
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "__main__"]
    modules = [importlib.import_module(f"bushpc.cli.{name}") for name in names]
    found = sorted(
        (module.GROUP for module in modules if hasattr(module, "GROUP")), key=lambda group: (group.place, group.title)
    )
    together: dict[str, Group] = {}  # several files may have commands of one group
    for group in found:
        before = together.get(group.title)
        commands = (*before.commands, *group.commands) if before else group.commands
        together[group.title] = Group(group.title, before.place if before else group.place, commands)
    return tuple(together.values())


def commands() -> dict[str, Command]:
    """Every command by its name."""
    return {command.name: command for group in groups() for command in group.commands}


def _run(words: list[str]) -> int:
    valid = commands()
    if not words or words[0] in ("-h", "--help"):
        print(_overview(groups()))
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(_version())
        return 0
    command, rest = _named(words)
    if command:
        return int(command.run(command.parse(rest)) or 0)
    family = {name: command for name, command in valid.items() if name.startswith(f"{words[0]} ")}
    if family and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(_overview([Group(f"bushpc {words[0]}", 0, tuple(family.values()))]))
        return 0 if len(words) > 1 else 2
    then = "Help: bushpc --help"
    given = " ".join(words[:2]) if family else words[0]
    print(f"bushpc: {unknown_name('command', given, family or valid, then)}", file=sys.stderr)
    return 2


def _as_json(error: BushpcError) -> str:
    """For scripts, which asked for JSON: a code that stays the same, and the message."""
    import json

    return json.dumps({"error": {"code": error.code, "message": str(error)}}, ensure_ascii=False)


def _version() -> str:
    """Of the package and the commit that it is, as a report of a fault needs them."""
    from bushpc.config.freeze import version
    from bushpc.dispatch.snapshot import commit

    return f"bushpc {version()}, commit {commit() or 'unknown'}, Python {sys.version.split()[0]}"


def _named(words: list[str]) -> tuple[Command | None, list[str]]:
    """The command that the words begin with, and the other words."""
    valid = commands()
    for name in (" ".join(words[:2]), *words[:1]):
        if name in valid:
            return valid[name], words[len(name.split()) :]
    return None, words


def _without_local_rank(words: list[str]) -> list[str]:
    """deepspeed's launcher puts --local_rank=N first. The environment variable LOCAL_RANK says the same."""
    if words and words[0].replace("_", "-").startswith("--local-rank"):
        return words[1:] if "=" in words[0] else words[2:]
    return words


def _overview(shown: Sequence[Group]) -> str:
    width = max(len(command.name) for group in shown for command in group.commands)
    lines = [USAGE, "", DESCRIPTION]
    for group in shown:
        lines += ["", f"{group.title}:"]
        lines += [f"  {command.name:<{width}}  {command.summary}" for command in group.commands]
    return "\n".join([*lines, "", ENDS])
