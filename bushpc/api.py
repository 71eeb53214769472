"""bushpc from Python. All of it is in `bushpc` itself, which imports torch only where it is needed.

    shards = bushpc.pack("phantom", "shards/phantom")                         # or open_shards("shards/phantom")
    cell = bushpc.train_cell("model=unet_small", "data=phantom", "cluster=local", "fold=0")
    rows = bushpc.read_results(cell.run)                                      # a DataFrame, a row per image
    predictor = bushpc.load(cell.run, fold=0)                                 # or what bushpc.export wrote

docs/tutorial/python.ipynb runs all of them.
"""

from __future__ import annotations

import os
import typing as t
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.errors import BushpcWarning, ConfigError, DataError, unknown_name
from bushpc.shards.manifest import Manifest, Record, read_image, read_mask, verify

if t.TYPE_CHECKING:
    import pandas as pd

    from bushpc.runs.layout import CellDir


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A packed dataset. Its records are in the manifest's order: lesions first, then normal scans.

    folder: where the tars and manifest.json are. manifest: their content without the pixels.
    """

    folder: Path
    manifest: Manifest

    def __len__(self) -> int:
        return len(self.manifest.records)

    def __iter__(self) -> t.Iterator[Record]:
        return iter(self.manifest.records)

    def image(self, record: Record) -> np.ndarray:
        """The image of a scan: uint8, height x width x channels. Raises: DataError for a damaged tar."""
        return read_image(self.folder, record)

    def mask(self, record: Record) -> np.ndarray:
        """The mask of a scan: uint8, height x width; bit k is class k. Raises: DataError for a damaged tar."""
        return read_mask(self.folder, record)

    def folds(self) -> dict[str, int]:
        """Key of a scan with a lesion → the fold that it validates in.

        Raises: DataError if no folds were drawn, or if they don't fit the scans.
        """
        from bushpc.shards.split import find_folds, load_folds

        path = find_folds(self.manifest, self.folder, "frozen")
        return dict(load_folds(path, self.manifest.records, self.manifest.excerpt).fold_by_key)


def pack(
    name: str, out: str | Path, *, src: str | Path | None = None, workers: int = 1, **parameters: int | float
) -> Shards:
    """Pack a dataset and draw its folds, as `bushpc pack` does.

    name: as in `data=`. out: folder for the shards. src: the publisher's folder; None for a synthetic dataset.
    workers: processes that decode and encode. parameters: of a synthetic dataset's card, such as count=20.
    If `out` already holds the same, nothing is written.
    Raises: ConfigError for an unknown name or parameter; DataError for a folder that does not match the dataset's card.
    """
    from bushpc.shards import write
    from bushpc.shards.split import ensure_folds

    manifest = write.pack(name, src, out, workers=workers, parameters=parameters)
    if not manifest.synthetic:
        ensure_folds(out, manifest)
    return Shards(folder=Path(out), manifest=manifest)


def open_shards(folder: str | Path) -> Shards:
    """Open a packed dataset, after a check that every tar is there and has its size.

    Raises: DataError for a folder that is not packed, or damaged.
    """
    manifest = Manifest.load(folder)
    verify(folder, manifest)
    return Shards(folder=Path(folder), manifest=manifest)


def train_cell(*settings: str) -> CellDir:
    """Train and evaluate one fold in this process, as `bushpc train` does; returns the cell's folder.

    settings: as on the command line, with a fold: "model=unet_small", "data=phantom", "cluster=local", "fold=0".
    A cell that is done is left as it is; a stopped one continues. Ctrl-C saves a checkpoint before it stops.
    This seeds the random numbers of Python, NumPy and torch, and torch stays deterministic if the settings ask for it.
    Raises: ConfigError for invalid settings or outside the main thread; TrainingError for a stopped or failed training.
    """
    from bushpc.dispatch.train_here import train_in_python

    return train_in_python(settings)


def read_results(run: str | os.PathLike[str], *, row: str | None = None) -> pd.DataFrame:
    """The metrics of every validation image of a run, a row per image and prompt source.

    row: of a grid; None takes all. The column `row` names it, and `run` the run. The other columns are those of
    `per_image.csv`, with NaN where a metric is undefined. Folds that are not done are missing, and a warning says why.
    Raises: DataError for a folder that is not a run, contradicts itself or has no fold that is done; ConfigError for
    an unknown row.
    """
    import pandas as pd

    from bushpc.report.read_run import read_run

    arms = read_run(Path(run)).arms
    names = [arm.name for arm in arms]
    if row not in (None, *names):
        raise ConfigError(unknown_name("row", str(row), names))
    wanted = [arm for arm in arms if row in (None, arm.name)]
    missing = [f"{cell.name}: {cell.reason}" for arm in wanted for cell in arm.missing_cells]
    frames = [arm.per_image.assign(run=Path(run).name, row=arm.name) for arm in wanted if arm.per_image is not None]
    if not frames:
        raise DataError(f"{run} has no results yet ({'; '.join(missing)}); see `bushpc status {run}`")
    if missing:
        warnings.warn(f"results of {run} are not complete: {'; '.join(missing)}", BushpcWarning, stacklevel=2)
    return pd.concat(frames, ignore_index=True)
