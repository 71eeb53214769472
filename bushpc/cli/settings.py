"""The part of every command's help that names the groups and settings."""

from __future__ import annotations

from bushpc.config import GROUPS, config_names


def settings_help() -> str:
    """The groups with their valid names, and where all settings are listed."""
    import textwrap

    lines = [
        "settings (KEY=VALUE): choose a file of each group, then change single settings, for example train.lr=1e-4"
    ]
    for group in (*GROUPS, "grid"):
        names = ", ".join(config_names(group))
        lines += textwrap.wrap(names, 100, initial_indent=f"  {group + '=':<9} ", subsequent_indent=" " * 12)
    return "\n".join(lines)
