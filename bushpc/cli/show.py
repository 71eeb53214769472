"""What several commands print: tables on a terminal, plain lines in a log, JSON for scripts."""

from __future__ import annotations

import os
import sys
import time
import typing as t
from collections.abc import Sequence

if t.TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from bushpc.shards.manifest import Manifest

MOST_NAMES = 40
FILE_WIDTH = 160


def wide_console() -> Console:
    """A terminal keeps its width; a file gets enough width for every column."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=FILE_WIDTH)


def print_json(content: t.Any) -> None:
    """What `--json` prints: one object on stdout, whose keys stay; everything else that is said goes to stderr."""
    import json

    print(json.dumps(content, indent=1, default=str, ensure_ascii=False))


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def log(line: str) -> None:
    """A line with the time, for commands that take minutes."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def print_packed(out: Path, manifest: Manifest) -> None:
    labels = [record.label for record in manifest.records]
    counts = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))
    shards = f"{len(manifest.shards)} shards, manifest {manifest.hash[:12]}"
    print(f"{out}: {len(manifest.records)} scans ({counts}) in {shards}")


def some(names: Sequence[str]) -> str:
    """Names for one line of the terminal: all of them, unless they are hundreds."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: MOST_NAMES // 2])} … and {len(names) - MOST_NAMES // 2} more"
