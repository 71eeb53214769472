"""Copies of a run's curves for the tools that people watch: TensorBoard, Weights & Biases, MLflow.

metrics.jsonl is the original; the tools, through Accelerate's trackers, are an extra. One that fails says so once and
is left out: none can end a run. Compute nodes have no internet, so everything stays in the cell's folder unless the
environment says otherwise (WANDB_MODE, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import os
import sys
import types
import typing as t
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bushpc.runs.layout import CellDir

# How the names of TensorBoard's files begin; the second of their start, host, process and a counter follow.
EVENT_FILES = "events.out.tfevents."

if t.TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


class Mirrors:
    """The tools of one cell, by their names in `train.track`. For the main rank.

    The tools open at the first value: by then there is the engine, and with it what Accelerate asks about ranks.
    """

    def __init__(self, names: Sequence[str], cell_dir: Path | CellDir, settings: Mapping[str, t.Any]) -> None:
        self._names, self._cell_dir, self._settings = names, CellDir(cell_dir), settings
        self._tools: dict[str, GeneralTracker] | None = None

    def log(self, step: int, values: Mapping[str, float], start: int, say: Callable[[str], None]) -> None:
        """Show values by name at a step. start: steps done when this attempt began."""
        if self._tools is None:
            self._tools = {}
            for name in self._names:
                with self._or_without(name, say):
                    self._tools[name] = _OPEN[name](self._cell_dir, self._settings, start)
        for name, tool in list(self._tools.items()):
            with self._or_without(name, say):
                tool.log(dict(values), step=step)

    def close(self, say: Callable[[str], None]) -> None:
        """Finish what is open; the next value would open it again."""
        tools, self._tools = self._tools or {}, None
        for name, tool in tools.items():
            with self._or_without(name, say):
                tool.finish()

    @contextmanager
    def _or_without(self, name: str, say: Callable[[str], None]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a server that is away, a version that fits no other
            (self._tools or {}).pop(name, None)
            say(f"{name} cannot be written: {type(error).__name__}: {error}; the run goes on without it")


def _tensorboard(cell_dir: CellDir, settings: Mapping[str, t.Any], start: int) -> GeneralTracker:
    """Event files in <cell>/tensorboard; steps that are done again take the place of those after the checkpoint."""
    from accelerate.tracking import TensorBoardTracker

    # What TensorBoard asks before it would load all of TensorFlow, where that is installed, to write a file.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    folder = cell_dir.path / "tensorboard"
    earlier = sorted(folder.glob(f"{EVENT_FILES}*"))
    tool = _started(TensorBoardTracker(folder.name, cell_dir.path, purge_step=start + 1))
    _put_before(earlier, set(folder.glob(f"{EVENT_FILES}*")).difference(earlier))
    return tool


def _put_before(earlier: Sequence[Path], new: Iterable[Path]) -> None:
    """Number the earlier event files if one of them would be read after a new one.

    TensorBoard reads the files of a folder in the order of their names, which begin with the second of their start. On
    a node whose clock is behind, and within the same second, an attempt's name can sort before its predecessor's:
    TensorBoard would then show the lost steps and drop those that replaced them.
    """
    if not earlier or all(path.name > earlier[-1].name for path in new):
        return
    for number, path in enumerate(earlier):
        origin = path.name.removeprefix(EVENT_FILES).partition(".")[2]
        path.rename(path.with_name(f"{EVENT_FILES}{number:010d}.{origin}"))


def _wandb(cell_dir: CellDir, settings: Mapping[str, t.Any], start: int) -> GeneralTracker:
    """Offline runs in <cell>/wandb, all attempts under one id: `wandb sync` makes one run of them."""
    from accelerate.tracking import WandBTracker

    run, cell = cell_dir.run.name, cell_dir.name
    return _started(
        WandBTracker(
            os.environ.get("WANDB_PROJECT", "bushpc"),
            name=cell,
            group=run,
            id=f"{run}-{cell}",
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            dir=str(cell_dir),
            config=dict(settings),
            settings={"console": "off", "silent": True},  # the log is ours, and is kept
        )
    )


def _mlflow(cell_dir: CellDir, settings: Mapping[str, t.Any], start: int) -> GeneralTracker:
    """A file store in <cell>/mlruns; all attempts are one run of the experiment that has the run's name."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    run, cell = cell_dir.run.name, cell_dir.name
    # MLflow would rather have SQLite, whose locks many a cluster's file system lacks.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or cell_dir.mlruns.as_uri())
    known: list[t.Any] = mlflow.search_runs(
        experiment_names=[run],
        filter_string=f"attributes.run_name = '{cell}'",
        output_format="list",
    )
    run_id = known[0].info.run_id if known else None
    tool = _started(MLflowTracker(experiment_name=run, run_id=run_id, run_name=cell))
    if not known:
        tool.store_init_configuration(dict(settings))
    return tool


def _started(tool: GeneralTracker) -> GeneralTracker:
    tool.start()
    return tool


_OPEN: dict[str, Callable[[CellDir, Mapping[str, t.Any], int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
