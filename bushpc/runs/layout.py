"""Every path and file name in a run folder. Nobody else joins these names.

runs/<name>/                      RunDir
  run.json        what this run is: cells and their hashes, rows of its grid, data, folds, versions, commands
  folds.csv       the folds it uses, also after the dataset's own folds change
  cells/<cell>/   CellDir; in a grid it may be a link to a cell of another run, or of another row
  linked/         settings of the cells that are links
  stale/          cells whose settings were edited since; a grid that has such settings again reuses them
  replaced/       cells as they were before `bushpc retry --fresh`
  frozen/         parameters that no cell trains, stored once for all cells
  code/<hash>/    package and configs at submission; jobs import them from there
  jobs/           submitit's scripts, pickles and logs; notes of submissions, starts and the report job
  report/         see bushpc.report
  postprocess/    what `bushpc postprocess` chose: <row>.json, and by image <row>.csv; `all` for a run without rows
  .submit.lock    held while a command writes the run folder

runs/<name>/cells/<cell>/         CellDir
  config.yaml      frozen, composed settings
  job.json         the job that works on it
  state.json       phase, step, rate, host, process (heartbeat for `bushpc status`)
  metrics.jsonl    curves
  tensorboard/     the curves again; likewise wandb/ and mlruns/ if train.track names them
  attempts.jsonl   where the time of each start went
  lease.<n>.json   which process works here
  hang/            every thread's stack, for a rank that made no progress
  ledger/          which samples each step consumed, per rank
  checkpoints/     sealed checkpoints
  taken_over.json  whose weights, ledger and curves these are, with train.weights_from
  calibration.csv  how well the predicted probabilities match, over all validation pixels
  evaluated/       which images an evaluation has finished, until all are
  per_image.csv    metrics of every validation image, written when complete
  external/        the same for every image of other datasets
  predictions/     probability maps
  explain/         Grad-CAM maps of a few images
  nnunet/          what nnU-Net writes itself, see bushpc.train.nnunet
  DONE | FAILED    how it ended; neither while it is running, queued or stopped
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

RUN_FILE = "run.json"
CELLS = "cells"
DONE_FILE, FAILED_FILE = "DONE", "FAILED"
TAKEN_OVER_FILE = "taken_over.json"
STEP = "step_"
# In a checkpoint: hashes of its files; and what is known of it besides tensors.
SEAL_FILE, META_FILE = "seal.json", "meta.json"
# All that a submission writes into a cell's folder.
BEFORE_ITS_START = frozenset({"config.yaml", "job.json"})


class _Folder:
    """A folder by its path. Two of them are equal if their paths are."""

    __slots__ = ("path",)

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Parsing a path anew for each of a thousand cells is a third of what `bushpc status` takes.
        known = path.path if isinstance(path, _Folder) else path
        self.path = known if isinstance(known, Path) else Path(known)

    @property
    def name(self) -> str:
        return self.path.name

    def exists(self) -> bool:
        return self.path.exists()

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, _Folder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)


class RunDir(_Folder):
    """A run folder. Making one reads and writes nothing."""

    __slots__ = ()

    @property
    def file(self) -> Path:
        """run.json, see `records.RunRecord`."""
        return self.path / RUN_FILE

    @property
    def folds(self) -> Path:
        return self.path / "folds.csv"

    @property
    def cells(self) -> Path:
        return self.path / CELLS

    def cell(self, name: str) -> CellDir:
        """A cell by its name. It may be a link; `CellDir.resolve` follows it."""
        return CellDir(self.path / f"{CELLS}/{name}")  # one join instead of two

    def cell_dirs(self) -> list[CellDir]:
        """All cells that are there, by name."""
        return [CellDir(path) for path in sorted(self.cells.glob("*"))]

    def linked(self, cell: str) -> Path:
        """What this run asks of a cell that is a link: its settings."""
        return self.path / "linked" / f"{cell}.yaml"

    def asked(self, cell: str) -> Path:
        """The file with this run's settings of a cell, whether or not the cell is a link."""
        linked = self.linked(cell)
        return linked if linked.exists() else self.cell(cell).config

    @property
    def stale(self) -> Path:
        return self.path / "stale"

    def stale_cells(self) -> list[CellDir]:
        return [CellDir(path) for path in sorted(self.stale.glob("*"))]

    @property
    def replaced(self) -> Path:
        return self.path / "replaced"

    @staticmethod
    def free_place(folder: Path, cell: str, config_hash: str) -> Path:
        """A path in `folder`, which is `stale` or `replaced`, that no other version of the cell has."""
        places = (folder / f"{cell}-{config_hash}{f'.{number}' if number else ''}" for number in itertools.count())
        return next(place for place in places if not place.exists())

    @property
    def frozen(self) -> Path:
        return self.path / "frozen"

    @property
    def code(self) -> Path:
        return self.path / "code"

    def snapshot(self, code_hash: str) -> Path:
        """Package and configs of one submission."""
        return self.code / code_hash

    def newest_snapshot(self) -> Path | None:
        return max(self.code.glob("*"), key=lambda path: path.stat().st_mtime, default=None)

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    def job_folder(self, job_id: str) -> Path:
        """submitit's folder of a job. `%j` in place of the id makes the pattern that submitit takes."""
        return self.jobs / job_id

    @staticmethod
    def log_in(job_folder: Path, job_id: str, task: int) -> Path:
        """The log of a task, in the folder of its job."""
        return job_folder / f"{job_id}_{task}_log.out"

    @property
    def report_job(self) -> Path:
        """Which job writes the report, see `records.JobNote`."""
        return self.jobs / "report.json"

    def submitting(self, submission: str) -> Path:
        """See `records.SubmittingNote`."""
        return self.jobs / f"submitting-{submission}.json"

    def all_submitting(self) -> list[Path]:
        return sorted(self.jobs.glob("submitting-*.json"))

    def lane(self, name: str) -> Path:
        """See `records.LaneNote`. name: of the submission, and the job's number in it."""
        return self.jobs / f"lane-{name}.json"

    def attempt_note(self, job_id: str) -> Path:
        """See `records.AttemptNote`."""
        return self.jobs / f"attempt-{job_id}.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def postprocess(self, row: str | None) -> Path:
        """See `chosen.Chosen`. row: of a grid. Its CSV lies beside it."""
        return self.path / "postprocess" / f"{row or 'all'}.json"

    @property
    def report_page(self) -> Path:
        return self.report / "index.html"

    @property
    def report_outdated(self) -> Path:
        """Lies in the folder of a report that was made for other cells or rows than the run has now."""
        return self.report / ".outdated"

    @property
    def lock(self) -> Path:
        return self.path / ".submit.lock"

    def resolve(self) -> RunDir:
        return RunDir(self.path.resolve())

    def neighbours(self) -> Iterator[RunDir]:
        """The runs in the same folder, this one included, by name."""
        for path in sorted(self.path.parent.glob(f"*/{RUN_FILE}")):
            yield RunDir(path.parent)


class CellDir(_Folder):
    """A cell's folder. Making one reads and writes nothing."""

    __slots__ = ()

    @property
    def run(self) -> RunDir:
        """The run folder that this path is in; `resolve` first to get the one that owns the cell."""
        return RunDir(self.path.parent.parent)

    def resolve(self) -> CellDir:
        """The real folder: a cell that two runs share lies in one of them."""
        return CellDir(self.path.resolve())

    def is_link(self) -> bool:
        return self.path.is_symlink()

    def names(self) -> frozenset[str]:
        """What lies in it: one look instead of one per file. Empty if it is not there."""
        try:
            return frozenset(os.listdir(self.path))
        except OSError:
            return frozenset()

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def job_note(self) -> Path:
        """See `records.JobNote`."""
        return self.path / "job.json"

    @property
    def heartbeat(self) -> Path:
        """See `records.Heartbeat`."""
        return self.path / "state.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def attempts(self) -> Path:
        """A line per start, see `goodput.Attempt`."""
        return self.path / "attempts.jsonl"

    @property
    def taken_over(self) -> Path:
        """See `records.TakenOver`."""
        return self.path / TAKEN_OVER_FILE

    def lease(self, number: int) -> Path:
        return self.path / f"lease.{number}.json"

    @property
    def hang(self) -> Path:
        return self.path / "hang"

    def stacks(self, rank: int) -> Path:
        """Where a rank that hangs writes the stacks of its threads."""
        return self.hang / f"rank{rank}.txt"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    def ledger_of(self, rank: int) -> Path:
        return self.ledger / f"rank{rank}.csv"

    def ledgers(self) -> list[Path]:
        return sorted(self.ledger.glob("rank*.csv"))

    @property
    def no_ledger(self) -> Path:
        """Instead of ledgers: why nothing is noted."""
        return self.ledger / "none.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return checkpoint_in(self.checkpoints, step)

    def newest_step(self) -> int:
        """Step of the newest sealed checkpoint, by its name; 0 without one."""
        try:
            names = os.listdir(self.checkpoints)
        except OSError:
            return 0
        steps = (name.removeprefix(STEP) for name in names if name.startswith(STEP))
        return max((int(step) for step in steps if step.isdecimal()), default=0)

    @property
    def per_image(self) -> Path:
        return self.path / "per_image.csv"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration.csv"

    @property
    def evaluated(self) -> Path:
        return self.path / "evaluated"

    @property
    def external(self) -> Path:
        return self.path / "external"

    def external_csv(self, dataset: str) -> Path:
        return self.external / f"{dataset}.csv"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    @property
    def explain(self) -> Path:
        return self.path / "explain"

    @property
    def scans(self) -> Path:
        """Shards that a cell of work `generate` makes."""
        return self.path / "scans"

    @property
    def quality(self) -> Path:
        """Figures of generated scans, with a page in the same folder, of a cell of work `quality`."""
        return self.path / "quality" / "quality.json"

    @property
    def nnunet(self) -> Path:
        return self.path / "nnunet"

    @property
    def mlruns(self) -> Path:
        return self.path / "mlruns"

    @property
    def done(self) -> Path:
        """See `records.DoneRecord`."""
        return self.path / DONE_FILE

    def is_done(self) -> bool:
        """Whether `done` exists. Of ten thousand cells `bushpc status` asks this: making a Path would take longer."""
        return os.path.exists(f"{self.path}/{DONE_FILE}")

    @property
    def failed(self) -> Path:
        """Why it failed: one line, and the traceback below it."""
        return self.path / FAILED_FILE

    def has_ended(self) -> bool:
        """Whether it is done or failed for good."""
        return self.done.exists() or self.failed.exists()


def checkpoint_in(checkpoints: Path, step: int) -> Path:
    """The folder of a sealed checkpoint."""
    return checkpoints / f"{STEP}{step:08d}"
