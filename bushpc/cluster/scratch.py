"""A node's own disk, as `cluster.staging` names it. No torch: the doctor's probe looks as well."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class Unusable(Exception):
    """Why nothing can be staged here. Training goes on from the shared folders."""


def place(wanted: str, scratch: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that `cluster.staging` names on this node. Raises: Unusable where it does not exist.

    scratch: the variables that `auto` looks at. All are those of this process: the login node does not know them.
    """
    if wanted == "auto":
        found = [Path(environment[name]) for name in scratch if environment.get(name)]
        folder = next((folder for folder in found if folder.is_dir()), None)
        if folder is None:
            raise Unusable(f"no folder on this node is named by {' or '.join(f'${name}' for name in scratch)}")
        return folder.resolve()
    missing = [name for pair in VARIABLE.findall(wanted) for name in pair if name and name not in environment]
    if missing:
        raise Unusable(f"${missing[0]} is not set on this node")
    folder = Path(VARIABLE.sub(lambda match: environment[match[1] or match[2]], wanted))
    if not folder.is_dir():
        raise Unusable(f"there is no folder {folder} on this node")
    return folder.resolve()
