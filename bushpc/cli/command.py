"""What a command is: its name, options, words and examples in one place, from which parser and help text are made."""

from __future__ import annotations

import argparse
import typing as t
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bushpc.cli.words import Words, setting_hint
from bushpc.errors import ConfigError, unknown_name

Arguments = argparse.Namespace


@dataclass(frozen=True)
class Option:
    """One option or positional argument, as argparse takes it."""

    names: tuple[str, ...]
    how: Mapping[str, t.Any] = field(compare=False)


def option(*names: str, **how: t.Any) -> Option:
    """The arguments of `ArgumentParser.add_argument`."""
    return Option(names, how)


def run_folder(name: str = "run_dir", **how: t.Any) -> Option:
    """The positional argument of almost every command."""
    return option(name, **{"type": Path, "metavar": "RUN", "help": "run folder, for example runs/table4", **how})


JSON = option("--json", action="store_true", help="print JSON for scripts")
FOLD = option("--fold", type=int, metavar="K", help="use the model of one fold (default: all folds as an ensemble)")
ROW = option("--row", metavar="NAME", help="use this row of a grid")


JOBS_CONTINUE = "submitted jobs continue (`bushpc status RUN`)"
CONTINUE = "run the same command again to continue"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    name: what the user types, one or two words.
    summary: one sentence for `bushpc --help`.
    run: does it. Returns the exit status; None is 0.
    example: a line that works, given a dataset or run of that name. examples: further ones.
    notes: further help, one paragraph each.
    words: the `key=value` words; `run` finds each as an attribute of its arguments, and all as typed in `typed`.
        With `settings`, the other words are settings, and `run` finds them in `settings`.
    after_interrupt: what to know or to do after Ctrl-C.
    settings: the command takes settings (`model=…`, `train.lr=…`); `run` finds them in `typed`.
    """

    name: str
    summary: str
    run: Callable[[Arguments], int | None]
    example: str
    notes: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    words: Words | None = None
    after_interrupt: str = ""
    settings: bool = False
    examples: tuple[str, ...] = ()

    def parse(self, argv: Sequence[str]) -> Arguments:
        """Typed arguments. Raises: ConfigError; SystemExit after the help text or argparse's own error."""
        parser = _Parser(self)
        arguments, rest = parser.parse_known_args(argv)
        # argparse ends a list at the first option: `resume RUN --only failed cluster.mem_gb=128`.
        if rest and hasattr(arguments, "typed") and not any(word.startswith("-") for word in rest):
            arguments.typed += rest
        elif rest:
            raise ConfigError(self._unexpected(rest))
        if self.words:
            own = [word for word in arguments.typed if not self.settings or self.words.knows(word)]
            arguments.settings = [word for word in arguments.typed if word not in own]
            for name, value in self.words.read(own).items():
                setattr(arguments, name, value)
        return arguments

    def help(self) -> str:
        """The full help text."""
        return _Parser(self).format_help()

    def _unexpected(self, rest: Sequence[str]) -> str:
        options = [name for option in self.options for name in option.names if name.startswith("-")]
        wrong = next((word for word in rest if word.startswith("-")), None)
        then = f"Help: bushpc {self.name} --help"
        if wrong is None:
            why = setting_hint(rest[0].partition("=")[0]) if "=" in rest[0] else ""
            return f"bushpc {self.name} takes no '{rest[0]}'{why or '.'} Example: {self.example}. {then}"
        return unknown_name(f"option of bushpc {self.name}", wrong.partition("=")[0], options, then)


@dataclass(frozen=True)
class Group:
    """Commands of one file. place: where the group stands in `bushpc --help`."""

    title: str
    place: int
    commands: tuple[Command, ...]


class _Parser(argparse.ArgumentParser):
    """argparse with the tables of words and settings below its own help. They are only made when help is asked for."""

    def __init__(self, command: Command) -> None:
        lines = (command.example, *command.examples)
        super().__init__(
            prog=f"bushpc {command.name}",
            description="\n".join([command.summary, "", "examples:", *(f"  {line}" for line in lines)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.command = command
        for each in command.options:
            self.add_argument(*each.names, **each.how)
        if command.words or command.settings:
            self.add_argument("typed", nargs="*", metavar="KEY=VALUE", help="see below")

    def format_help(self) -> str:
        import textwrap

        parts = ["\n".join(textwrap.wrap(note, 100)) for note in self.command.notes]
        if self.command.words:
            parts.append("\n".join(self.command.words.lines()))
        if self.command.settings:
            from bushpc.cli.settings_help import settings_help

            parts.append(settings_help(grid=self.command.name == "grid"))
        return super().format_help() + "\n" + "\n\n".join(parts) + "\n"
