"""The part of help texts that names groups and settings; it comes from the config classes."""

from __future__ import annotations

import textwrap

WIDTH = 100
# What most runs set.
MATTER = (
    *("name", "train.iterations", "train.lr", "train.batch_size", "fold", "seed"),
    *("cluster.gpus", "cluster.time_min"),
)


def groups_help(grid: bool) -> list[str]:
    """Every group with its valid names. grid: grids as well."""
    from bushpc.config import config_names, group_names

    lines = []
    for group, names in {**group_names(), **({"grid": config_names("grid")} if grid else {})}.items():
        indent = f"  {group + '=':<9} "
        lines += textwrap.wrap(", ".join(names), WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))
    return lines


def settings_help(grid: bool = False) -> str:
    """The groups, and the sections of settings; all settings with their sentences would take several screens."""
    from bushpc.config import described

    lines = ["groups (KEY=VALUE), each choosing a yaml file in configs/:", *groups_help(grid), ""]
    lines.append("settings that most runs set (KEY=VALUE, for example train.lr=1e-4):")
    by_key = {setting.key: setting for setting in described()}
    for key in MATTER:
        each = by_key[key]
        unit = f" {each.about.unit}" if each.about.unit else ""
        text = each.about.sentence + (f" (default {each.default}{unit})" if each.default else "")
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {key + '=':<19}  ", subsequent_indent=" " * 23)
    lines += ["", "all settings:"]
    sections: dict[str, list[str]] = {}
    for setting in described():
        section, _, name = setting.key.partition(".")
        sections.setdefault(f"{section}." if name else "", []).append(name or section)
    for section, names in sections.items():
        indent = f"  {section or '(top level)':<12} "
        lines += textwrap.wrap(", ".join(names), WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))
    lines.append("  model.       the settings of the chosen model: `bushpc config model=unet --all --only model`")
    lines.append("Defaults and sentences: `bushpc config --all`. Composed values and their source: `bushpc config`.")
    return "\n".join(lines)
