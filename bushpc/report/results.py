"""RUN DIRECTORY → checked frames. The report's only reader of results; everything after it trusts them.

A cell counts as complete when it has both `DONE` and `per_image.csv`. Anything else is kept as an incomplete
cell with a reason in words, because a report that silently skips a fold is worse than no report.
"""

from __future__ import annotations

import json
import typing as t
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from bushpc.errors import DataError, unknown_name
from bushpc.goodput import Goodput, goodput, newest_saved, read_attempts

METRICS = ("dice", "iou", "fpr", "fnr")

# In the order in which they are shown. The oracle's label travels with it into every table, legend and file.
SOURCE_LABELS = {
    "first_pass": "first_pass",
    "oracle": "oracle (uses the ground-truth mask)",
    "none": "none (no spatial prompt)",
}

_TEXT_COLUMNS = ("key", "patient", "label", "prompts", "spatial_prompt", "attribute_prompt")
_COUNT_COLUMNS = ("fold", "tp", "fp", "fn", "tn", "length_px")
_COLUMNS = (*_TEXT_COLUMNS, *METRICS, *_COUNT_COLUMNS)
_RUN_KEYS = (
    "name", "created", "commit", "command", "model", "data", "prompts",
    "shards", "manifest_sha256", "folds", "versions", "cells",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What `metrics.jsonl` says: one value a step, the later line winning where a resume repeated steps.

    loss, dice: training loss and validation Dice, indexed by step.
    unreadable: lines that were not whole JSON, as a kill in the middle of a write leaves them.
    """

    loss: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    dice: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    unreadable: int = 0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fold of the run. `per_image` is None and `reason` says why, or the cell is complete.

    per_image: one row per key and prompt source, columns as in the file.
    step: from `DONE`; None while the cell is incomplete. goodput: where its time went; None before its first start.
    config: text of the cell's composed config, or None where it was never written.
    """

    name: str
    fold: int
    hash: str
    per_image: pd.DataFrame | None
    reason: str | None
    curve: Curve
    step: int | None
    goodput: Goodput | None
    config: str | None

    @property
    def complete(self) -> bool:
        return self.per_image is not None


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """A run directory, read and checked.

    run: `run.json` as it is.
    cells: in order of fold.
    sources: prompt sources that were evaluated, in the order of SOURCE_LABELS; empty if no cell is complete.
    headline: the prompt source that the run is judged by.
    threshold: on the probability map, above or at which a pixel counts as lesion; 0.5 in the paper (2.4).
    per_image: rows of all complete cells, None if there is none.
    """

    path: Path
    run: dict[str, t.Any]
    cells: list[Cell]
    sources: list[str]
    headline: str
    threshold: float
    per_image: pd.DataFrame | None

    @property
    def complete_cells(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.complete]

    @property
    def missing_cells(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.complete]

    @property
    def complete(self) -> bool:
        return not self.missing_cells


def read_run(run_dir: Path) -> RunResults:
    """Read a run directory. Raises: DataError, naming the file and row, if what is there contradicts itself."""
    run = _read_run_json(run_dir / "run.json")
    cells = sorted((_read_cell(run_dir, cell) for cell in run["cells"]), key=lambda cell: cell.fold)
    frames = [cell.per_image for cell in cells if cell.per_image is not None]
    sources = _common_sources(run_dir, cells)
    _refuse_keys_in_two_folds(run_dir, cells)
    return RunResults(
        path=run_dir,
        run=run,
        cells=cells,
        sources=sources,
        headline=_headline(run_dir, run["prompts"], sources),
        threshold=_threshold(cells),
        per_image=pd.concat(frames, ignore_index=True) if frames else None,
    )


def source_label(source: str, sources: list[str]) -> str:
    """The name a prompt source is shown by; a model that only knows `none` takes no prompts at all."""
    return "no prompts" if sources == ["none"] else SOURCE_LABELS[source]


def _read_run_json(path: Path) -> dict[str, t.Any]:
    if not path.is_file():
        raise DataError(
            f"{path.parent} is not a run directory: it has no run.json. Give the folder that `bushpc cv` made."
        )
    run = _read_json(path)
    missing = [key for key in _RUN_KEYS if key not in run]
    if missing:
        raise DataError(f"{path}: no {', '.join(missing)}. It was written by another version or by hand; run again.")
    if run["prompts"] not in SOURCE_LABELS:
        raise DataError(f"{path}: {unknown_name('prompt source', str(run['prompts']), SOURCE_LABELS)}")
    folds = [cell["fold"] for cell in run["cells"]]
    twice = sorted({fold for fold in folds if folds.count(fold) > 1})
    if not folds or twice:
        said = f"fold {twice[0]} belongs to more than one cell" if twice else "it lists no cells"
        raise DataError(f"{path}: {said}; a cross-validation run has one cell per fold. Run `bushpc cv` again.")
    return run


def _read_json(path: Path) -> dict[str, t.Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not JSON ({error}). It is damaged: delete it and run the same command again."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object. Delete it and run the command again.")
    return content


def _read_cell(run_dir: Path, cell: Mapping[str, t.Any]) -> Cell:
    folder = run_dir / "cells" / cell["name"]
    curve = _read_curve(folder / "metrics.jsonl")
    config_path = folder / "config.yaml"
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else None
    reason = _why_incomplete(folder, curve, config)
    done = {} if reason else _read_json(folder / "DONE")
    return Cell(
        name=cell["name"],
        fold=cell["fold"],
        hash=cell["hash"],
        per_image=None if reason else read_per_image(folder / "per_image.csv", cell["fold"]),
        reason=reason,
        curve=curve,
        step=done.get("step"),
        goodput=goodput(read_attempts(folder), newest_saved(folder) if reason else None),
        config=config,
    )


def _why_incomplete(folder: Path, curve: Curve, config: str | None) -> str | None:
    if (folder / "DONE").is_file():
        return None if (folder / "per_image.csv").is_file() else "marked DONE, but per_image.csv is not there"
    if (folder / "FAILED").is_file():
        first, *_traceback = (folder / "FAILED").read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        return first.strip() or "failed"
    if (folder / "per_image.csv").is_file():
        return "evaluated, but not marked DONE"
    if curve.loss.empty:
        return "no training step logged yet" if folder.is_dir() else "not started"
    total = _setting(config, "train", "iterations")
    return f"not finished: last logged step {curve.loss.index[-1]}" + (f" of {total}" if total else "")


def _setting(config: str | None, group: str, key: str) -> t.Any:
    """One value of a composed config, None where it cannot be read: only wording and pictures depend on it."""
    try:
        return yaml.safe_load(config or "")[group][key]
    except (yaml.YAMLError, KeyError, TypeError):
        return None


def _read_curve(path: Path) -> Curve:
    if not path.is_file():
        return Curve()
    loss: dict[int, float] = {}
    dice: dict[int, float] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["kind"] == "train":
                loss[int(entry["step"])] = float(entry["loss"])
            elif entry["kind"] == "validation":
                dice[int(entry["step"])] = float(entry["dice"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            unreadable += 1
    return Curve(loss=_by_step(loss), dice=_by_step(dice), unreadable=unreadable)


def _by_step(values: dict[int, float]) -> pd.Series:
    return pd.Series(values, dtype=float).sort_index()


def read_per_image(path: Path, fold: int) -> pd.DataFrame:
    """The per-image results of one cell. Raises: DataError with file, row and key on the first thing wrong."""
    # All as text first: pandas would turn key "001" into 1, and an empty prompt or a lesion called "NA" into NaN.
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable CSV file ({error}). {_EVALUATE_AGAIN}") from error
    missing = [column for column in _COLUMNS if column not in frame.columns]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}. {_EVALUATE_AGAIN}")
    if frame.empty:
        raise DataError(f"{path} has a header but no rows. {_EVALUATE_AGAIN}")
    for column in (*METRICS, *_COUNT_COLUMNS):
        numbers = pd.to_numeric(frame[column], errors="coerce")
        fits = numbers.between(0, 1) if column in METRICS else (numbers >= 0) & (numbers % 1 == 0)
        _refuse(path, frame, ~fits, f"{column} is not {'a number from 0 to 1' if column in METRICS else 'a count'}")
        frame[column] = numbers.astype(float if column in METRICS else int)
    _refuse(path, frame, frame["fold"] != fold, f"the row is not of fold {fold}, whose cell this is")
    _refuse(path, frame, ~frame["prompts"].isin(list(SOURCE_LABELS)), f"prompts is none of {', '.join(SOURCE_LABELS)}")
    _refuse(path, frame, frame.duplicated(["key", "prompts"]), "the same key and prompts stand in an earlier row")
    _refuse_uneven_sources(path, frame)
    return frame


_EVALUATE_AGAIN = "Delete the file and its cell's DONE, then run the same command again: only the evaluation is redone."


def _refuse(path: Path, frame: pd.DataFrame, wrong: pd.Series, what: str) -> None:
    """Raise with the line of the file (the header is line 1) if any row is wrong."""
    if wrong.any():
        at = int(wrong.to_numpy().argmax())
        row = ", ".join(f"{name}={frame[name].iloc[at]!r}" for name in ("key", "prompts", "fold", *METRICS))
        raise DataError(f"{path}, row {at + 2}: {what} ({row}). {_EVALUATE_AGAIN}")


def _refuse_uneven_sources(path: Path, frame: pd.DataFrame) -> None:
    """Sources are compared image by image, so each must hold the same images."""
    counts = frame.groupby("key")["prompts"].nunique()
    uneven = counts.index[counts < frame["prompts"].nunique()]
    if len(uneven):
        raise DataError(f"{path}: key {uneven[0]!r} lacks a row of some prompt source. {_EVALUATE_AGAIN}")


def _common_sources(run_dir: Path, cells: list[Cell]) -> list[str]:
    found = {cell.name: set(cell.per_image["prompts"]) for cell in cells if cell.per_image is not None}
    if not found:
        return []
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise DataError(
                f"{run_dir}: cell {first} was evaluated with prompts {', '.join(sorted(found[first]))}, cell {other} "
                f"with {', '.join(sorted(found[other]))}. Delete the per_image.csv and DONE of one of them, run again."
            )
    return [source for source in SOURCE_LABELS if source in found[first]]


def _threshold(cells: list[Cell]) -> float:
    found = (_setting(cell.config, "evaluate", "threshold") for cell in cells)
    return float(next((threshold for threshold in found if threshold is not None), 0.5))


def _headline(run_dir: Path, asked: str, sources: list[str]) -> str:
    if asked in sources or not sources:
        return asked
    if sources == ["none"]:  # a model without prompts is evaluated once, whatever source was asked for
        return "none"
    raise DataError(f"{run_dir}: the headline prompts are {asked!r}, but only {', '.join(sources)} were evaluated.")


def _refuse_keys_in_two_folds(run_dir: Path, cells: list[Cell]) -> None:
    owner: dict[str, str] = {}
    for cell in cells:
        if cell.per_image is None:
            continue
        for key in cell.per_image["key"].unique():
            if key in owner:
                path = run_dir / "cells" / cell.name / "per_image.csv"
                raise DataError(
                    f"{path}: key {key!r} was validated in cell {owner[key]} too; an image belongs to one fold. "
                    "The cells were made with different folds: run the whole cross-validation again under a new name."
                )
            owner[key] = cell.name
