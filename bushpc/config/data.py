"""Settings of the data: which dataset trains and validates, and which synthetic scans."""

from __future__ import annotations

import math
import typing as t
from pathlib import Path

from bushpc.config import places
from bushpc.config.fields import Settings, config_class, setting
from bushpc.errors import ConfigError


@config_class
class DataConfig(Settings):
    """Which dataset trains and validates."""

    prefix: t.ClassVar[str] = "data."

    name: str = setting("breast", "Name of the dataset, which is its folder below shards/.")
    root: str | None = setting(None, "Folder of its packed shards; null uses shards/<name>.", affects="nothing")
    stream: str | None = setting(
        None,
        "Read the tars as a stream instead of from data.root, which then only needs manifest and folds: a URL or a "
        "command to which the tar's name is appended, such as https://host/breast/, /mnt/breast/ or `pipe:ssh storage "
        "cat /data/breast/`. null reads data.root through the node's cache.",
        affects="nothing",
    )
    normals: bool = setting(False, "Whether normal scans, which have nothing to segment, also train and validate.")
    synthetic: str | None = setting(
        None,
        "Folder of synthetic scans (`bushpc generate`) that train in addition to the real ones and are never "
        "validated; or a folder with fold0, fold1, …, where each fold uses the scans of a generator trained on that "
        "fold's training part. null uses none.",
        affects="nothing",
    )
    synthetic_sha256: str | None = setting(
        None,
        "SHA-256 of that folder's manifest, for a run that requires exactly these scans; null accepts what is there, "
        "and each cell records it.",
        order=True,
    )
    synthetic_cell: str | None = setting(
        None,
        "Hash of the cell of the same run that generates these scans. Set when a grid is planned whose rows train on "
        "scans that it has yet to generate.",
        order=True,
        since=4,
    )
    synthetic_ratio: float | None = setting(
        None,
        "Synthetic scans per real scan of the training part, taken from the start of the folder; 0 for none. null is 1 "
        "where data.synthetic is set.",
        order=True,
        ge=0,
        lt=math.inf,
    )
    real: bool = setting(
        True,
        "Whether real scans train; false trains on synthetic scans only, as many as there would be with real ones.",
        order=True,
    )

    def __post_init__(self) -> None:
        if self.stream == "":
            raise ConfigError("data.stream='': must be a URL, a folder that ends in '/', a pipe: command, or null")
        if self.synthetic == "":
            raise ConfigError("data.synthetic='': must be a folder that `bushpc generate` wrote, or null")
        ratio = self.synthetic_ratio
        if ratio and self.synthetic is None:
            raise ConfigError(
                f"data.synthetic_ratio={ratio:g} without data.synthetic: set that to a folder that `bushpc generate` "
                "wrote"
            )
        if not self.real and not self.mixed:
            raise ConfigError(
                f"data.real=false with data.synthetic={self.synthetic or 'null'} and data.synthetic_ratio={ratio}: "
                "nothing is left to train on; set data.synthetic to a folder that `bushpc generate` wrote and the "
                "ratio above 0, or data.real=true"
            )
        if self.mixed and self.stream:
            raise ConfigError(
                "data.synthetic with data.stream: a stream delivers one dataset; read the shards from data.root "
                "instead, or set data.synthetic=null"
            )

    @property
    def folder(self) -> Path:
        """The folder with card, folds, tars and manifest."""
        return Path(self.root).expanduser().resolve() if self.root else places.home() / "shards" / self.name

    @property
    def mixed(self) -> bool:
        """Whether synthetic scans train."""
        return self.synthetic is not None and self.synthetic_ratio != 0
