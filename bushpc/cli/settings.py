"""`bushpc config`: the settings of a run and where each value comes from."""

from __future__ import annotations

import textwrap
import typing as t
from collections.abc import Iterable, Sequence

from bushpc.cli.command import JSON, Arguments, Command, Group, option
from bushpc.cli.settings_help import WIDTH
from bushpc.errors import ConfigError, unknown_name

if t.TYPE_CHECKING:
    from bushpc.config import Described, Origin


def config(given: Arguments) -> None:
    if given.all:
        _print_all(given)
        return
    import json

    from bushpc.config import as_word, explain

    origins = _only(given.only, explain(given.typed), given.typed)
    if given.json:
        print(json.dumps({each.key: {"value": each.value, "source": each.source} for each in origins}, indent=1))
        return
    _print_table([("setting", "value", "from"), *((each.key, as_word(each.value), each.source) for each in origins)])


def _print_all(given: Arguments) -> None:
    from bushpc.config import compose, described

    model = described(type(compose(given.typed).model))
    print_described(_only(given.only, [*described(), *model], given.typed), as_json=given.json)


def print_described(settings: Iterable[Described], *, as_json: bool) -> None:
    """Settings with what is allowed, default and meaning."""
    import json

    if as_json:
        rows = {
            each.key: {
                "allowed": each.allowed,
                "default": each.default or None,
                "unit": each.about.unit or None,
                "affects": each.about.affects,
                "help": each.about.sentence,
            }
            for each in settings
        }
        print(json.dumps(rows, indent=1))
        return
    for each in settings:
        unit = f" {each.about.unit}" if each.about.unit else ""
        default = f"default {each.default}{unit}" if each.default else "chosen by a group"
        print(f"{each.key}: {each.allowed}; {default}; affects {each.about.affects}")
        print(textwrap.fill(each.about.sentence, WIDTH, initial_indent="    ", subsequent_indent="    "))


S = t.TypeVar("S", "Origin", "Described")


def _only(section: str | None, settings: Sequence[S], typed: Iterable[str]) -> Sequence[S]:
    """The settings of one section: `train`, or `train.lr` alone."""
    if section is None:
        return settings
    section = section.rstrip(".")
    found = [each for each in settings if each.key == section or each.key.startswith(f"{section}.")]
    if not found:
        sections = {each.key.partition(".")[0] for each in settings}
        valid = sections if "." not in section else {each.key for each in settings}
        raise ConfigError(unknown_name("--only", section, valid, "Example: bushpc config --only train"))
    return found


def _print_table(rows: Sequence[tuple[str, str, str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{min(widths[1], 40)}}  {row[2]}")


GROUP = Group(
    "Settings",
    15,
    (
        Command(
            name="config",
            summary="Print the settings of a run and where each value comes from.",
            run=config,
            example="bushpc config model=unet cluster=local train.lr=3e-4",
            options=(
                JSON,
                option("--all", action="store_true", help="print every setting with type, default and meaning"),
                option("--only", metavar="SECTION", help="one section or setting, for example train or train.lr"),
            ),
            settings=True,
            notes=("Nothing is submitted or written.",),
        ),
    ),
)
