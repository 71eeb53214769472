"""Pages of the reference that come from the program itself: settings, commands, errors."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence

from bushpc.cli.app import groups
from bushpc.cli.command import Command, Option
from bushpc.cli.words import Word
from bushpc.config import Described, config_names, described
from bushpc.errors import BushpcError
from bushpc.models.base import Model


def pages() -> dict[str, str]:
    """Path on the site → text."""
    return {**_settings(), **_models(), **_commands(), "reference/errors.md": _errors()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _setting_rows(settings: Iterable[Described]) -> str:
    """Two columns, so that a telephone shows them whole."""

    def note(each: Described) -> str:
        default = f"default `{each.default}` {each.about.unit}".rstrip() if each.default else "chosen by a group"
        return f"{default}; {_plain(each.allowed)}; affects {each.about.affects}"

    rows = [(f"`{each.key}`", f"{_plain(each.about.sentence)}<br>{note(each)}") for each in settings]
    return table(("setting", "meaning"), rows)


def _plain(text: str) -> str:
    """A sentence of the program as Markdown: brackets and stars stand for themselves. Code stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts)


def _settings() -> dict[str, str]:
    sections: dict[str, list[Described]] = {}
    for each in described():
        section, _, name = each.key.partition(".")
        sections.setdefault(section if name else "", []).append(each)
    found = {}
    for section, settings in sections.items():
        title = f"`{section}.*`" if section else "Settings without a section"
        intro = "How they are set, and what *affects* means: [settings](../settings.md)."
        found[f"reference/settings/{section or 'run'}.md"] = f"# {title}\n\n{intro}\n\n{_setting_rows(settings)}\n"
    links = "\n".join(
        f"- [{place.rpartition('/')[2].removesuffix('.md')}]({place.rpartition('/')[2]})" for place in found
    )
    models = "- [models](../models/index.md): `model.*` of every model"
    return {**found, "reference/settings/index.md": f"# Every setting\n\n{links}\n{models}\n"}


def _models() -> dict[str, str]:
    """A page per class of models; yaml files of one class share it."""
    yamls: dict[type[Model], list[str]] = {}
    for name in config_names("model"):
        yamls.setdefault(_class_of(name), []).append(name)
    found = {}
    for cls, names in yamls.items():
        chosen = ", ".join(f"`model={name}`" for name in names)
        says = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
        text = f"# {cls.__name__}\n\n{_plain(says)}\n\nChosen by {chosen}.\n\n{_setting_rows(described(cls.Config))}\n"
        found[f"reference/models/{cls.__name__.lower()}.md"] = text
    links = "\n".join(
        f"- [{cls.__name__}]({cls.__name__.lower()}.md): {', '.join(names)}" for cls, names in yamls.items()
    )
    return {**found, "reference/models/index.md": f"# Settings of models\n\n{links}\n"}


def _class_of(name: str) -> type[Model]:
    from bushpc.config.source import hydra_compose

    module, _, cls = str(hydra_compose("config", [f"model={name}"])["model"]["_target_"]).rpartition(".")
    return getattr(importlib.import_module(module), cls)


def _commands() -> dict[str, str]:
    by_title: dict[str, list[Command]] = {}
    for group in groups():  # several files may add to one group
        by_title.setdefault(group.title, []).extend(group.commands)
    found, lines = {}, []
    for title, commands in by_title.items():
        name = re.sub(r"\W+", "-", title.lower()).strip("-")
        found[f"reference/commands/{name}.md"] = f"# {title}\n\n" + "\n".join(map(_command, commands))
        lines.append(f"- [{title}]({name}.md): " + ", ".join(f"`{command.name}`" for command in commands))
    return {**found, "reference/commands/index.md": "# Every command\n\n" + "\n".join(lines) + "\n"}


def _command(command: Command) -> str:
    parts = [
        f"## bushpc {command.name}",
        _plain(command.summary),
        f"```\n{command.example}\n```",
        *map(_plain, command.notes),
    ]
    if command.options:
        options = [(_option(each), _plain(str(each.how.get("help", "")))) for each in command.options]
        parts.append(table(("argument", "meaning"), options))
    if command.words:
        words = (*command.words.table, *(command.words.more({}) if command.words.more else ()))
        parts.append(table(("word", "meaning"), [(f"`{word.name}=`", _word(word)) for word in words]))
        parts += [_plain(command.words.rest)] * bool(command.words.rest)
    if command.settings:
        parts.append("Takes [settings](../settings/index.md), too.")
    return "\n\n".join(parts) + "\n"


def _word(word: Word) -> str:
    return _plain(word.help) + (f"<br>{_plain(word.default_text)}" if word.default_text else "")


def _option(option: Option) -> str:
    choices = ",".join(map(str, option.how.get("choices", ())))
    value = str(option.how.get("metavar") or (f"{{{choices}}}" if choices else ""))
    if not option.names[0].startswith("-"):
        return f"`{value or option.names[0].upper()}`"
    return f"`{', '.join(option.names)}{f' {value}' if value and 'action' not in option.how else ''}`"


def _errors() -> str:
    """Every typed error of the modules that the commands load."""
    for module in ("bushpc.runs.lease", "bushpc.cluster.base", "bushpc.shards.split", "bushpc.shards.readers"):
        importlib.import_module(module)
    causes = {cls: _plain(" ".join((cls.__doc__ or "").split())) for cls in _kinds(BushpcError)}
    rows = [(f"`{cls.code}`", f"{cause}<br>*What to do:* {_plain(cls.cure)}") for cls, cause in causes.items()]
    return f"""# Errors

Every error that you can mend is one message that says what was given, what is allowed and what to do next. The command
then exits with status 2. With `--json` it also prints `{{"error": {{"code": …, "message": …}}}}`. Codes stay the same
between versions.

{table(("code", "cause and cure"), rows)}

A Python traceback is a fault of bushpc: please report it with the command and `bushpc --version`.

Exit statuses: [commands](commands.md#exit-status).
"""


def _kinds(base: type[BushpcError]) -> list[type[BushpcError]]:
    found = []
    for cls in base.__subclasses__():
        if cls.__module__ in sys.modules:
            found += [cls, *_kinds(cls)]
    return found
