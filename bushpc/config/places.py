"""Where configs, cards, shards, runs and weights lie, in a clone and in an installed package.

A file is looked for in the user's folders first: `$BUSHPC_CONFIGS` (one or several, joined by ':'), `./configs`, the
clone's configs/, and what the package brings. Shards, runs and weights lie in the clone, or where bushpc is installed
as a package, in the current folder.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# What a wheel brings: configs/, and of shards/ the cards and folds. setup.py copies them here; a clone has none.
PACKAGED = PACKAGE / "packaged"
CLONE = PACKAGE.parent
IS_CLONE = (CLONE / "configs" / "config.yaml").is_file()
VARIABLE = "BUSHPC_CONFIGS"
# What runs and datasets may be called, as a regular expression.
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def home() -> Path:
    """The folder that shards/, runs/ and weights/ lie in unless a setting says otherwise."""
    return CLONE if IS_CLONE else Path.cwd()


def shipped_configs() -> Path:
    """The folder of the configs that the project ships."""
    return CLONE / "configs" if IS_CLONE else PACKAGED / "configs"


def config_folders() -> list[Path]:
    """The folders that hold configs, the first one wins."""
    given = [Path(folder).expanduser() for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    folders = [*given, Path.cwd() / "configs", shipped_configs()]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def config_file(name: str) -> Path | None:
    """`model/unet` → the yaml of that name that counts; None if there is none."""
    found = (folder / f"{name}.yaml" for folder in config_folders())
    return next((path for path in found if path.is_file()), None)


def new_config_folder() -> Path:
    """Where a command writes a new config: the first folder that the user may write to."""
    writable = (folder for folder in config_folders() if os.access(folder, os.W_OK) and PACKAGED not in folder.parents)
    return next(writable, Path.cwd() / "configs")


def shipped_shards() -> Path:
    """The folder with a card and folds per dataset that the project ships."""
    return CLONE / "shards" if IS_CLONE else PACKAGED / "shards"
