"""RUN FOLDER → checked frames. Only this file and `per_image` read results; later code trusts the frames.

A run has arms: one for a cross-validation, one per row for a grid. An arm has a cell per fold. A cell counts as
complete if it has both `DONE` and `per_image.csv`. Other cells are kept as incomplete, with the reason as text, because
a report that silently skips a fold is worse than no report.
"""

from __future__ import annotations

import json
import typing as t
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bushpc.conditions import VARIANTS, Variant
from bushpc.config.frozen import flat_settings
from bushpc.errors import ConfigError, DataError, unknown_name
from bushpc.metrics.registry import ALWAYS, METRICS, on_grids
from bushpc.report.per_image import of_class, read_calibration, read_per_image
from bushpc.report.results import Arm, Cell, Curve, Run
from bushpc.runs.chosen import Chosen
from bushpc.runs.goodput import goodput, read_attempts, trained_in
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import DoneRecord
from bushpc.runs.run_record import CellRecord, FoldsRecord, RowRecord, RunRecord, no_run

KINDS = ("cv", "grid", "train")


_RUN_KEYS = (
    "name", "created", "command", "model", "data", "prompts", "shards", "manifest_sha256", "folds", "versions",
)  # fmt: skip


def read_run(run_dir: Path, only: str | None = None) -> Run:
    """Read a run folder. only: the row of a grid to read, None for all.

    Raises: DataError, naming the file and row, if what is there contradicts itself.
    """
    folder = RunDir(run_dir)
    run = _read_run(folder)
    rows = [(row, entries) for row, entries in _rows(folder.file, run) if only in (None, row.name)]
    arms = [_read_arm(folder, run, row, entries) for row, entries in rows]
    wanted = run.grid.baseline if run.grid else None
    baseline = next((arm for arm in arms if arm.name == wanted), arms[0])
    return Run(path=run_dir, record=run, arms=arms, baseline=baseline)


def _rows(path: Path, run: RunRecord) -> list[tuple[RowRecord, list[CellRecord]]]:
    """Every row of the run with its cells; a run that is no grid is one row."""
    if run.kind != "grid":
        return [(RowRecord(name=run.model, label=run.model, model=run.model, settings={}), run.trainings)]
    rows = run.grid.rows if run.grid else []
    if not rows or not all(row.label and row.model for row in rows) or not all(cell.row for cell in run.cells):
        raise DataError(f"{path}: a grid's rows and its cells' row are needed. {_OTHER_VERSION}")
    assert run.grid is not None, "it has rows"
    names = [row.name for row in rows]
    unknown = [cell.row for cell in run.cells if cell.row not in run.grid.names]
    empty = [name for name in names if not run.cells_of(name)]
    baseline = run.grid.baseline
    if unknown or empty or (baseline is not None and baseline not in names):
        contradiction = (
            f"a cell belongs to row {unknown[0]!r}" if unknown else
            f"row {empty[0]!r} has no cell" if empty else f"its baseline is {baseline!r}"
        )  # fmt: skip
        raise DataError(f"{path}: {contradiction}; rows are {', '.join(names)}. {_OTHER_VERSION}")
    return [(row, run.cells_of(row.name)) for row in rows]


def _read_arm(run_dir: RunDir, run: RunRecord, row: RowRecord, entries: list[CellRecord]) -> Arm:
    folds = [entry.fold for entry in entries]
    twice = sorted({fold for fold in folds if folds.count(fold) > 1})
    if twice:
        raise DataError(
            f"{run_dir.file}: fold {twice[0]} belongs to more than one cell; a cross-validation has one cell "
            "per fold. Run the same command again."
        )
    cells = sorted((_read_cell(run_dir, run, entry) for entry in entries), key=lambda cell: cell.fold)
    frames = [cell.per_image for cell in cells if cell.per_image is not None]
    variants = _variants(run)
    chosen = Chosen.read(run_dir.postprocess(row.name if run.kind == "grid" else None))
    is_current = chosen is not None and chosen.is_of([(cell.name, cell.folder) for cell in cells])
    sources = _common_sources(run_dir, cells, variants)
    _refuse_keys_in_two_folds(cells)
    return Arm(
        run=run,
        name=row.name,
        label=row.label,
        model=row.model,
        given=row.settings,
        cells=cells,
        variants=variants,
        sources=sources,
        headline=_headline(run_dir, _first_setting(cells, "prompts", run.prompts), sources),
        threshold=float(_first_setting(cells, "evaluate.threshold", 0.5)),
        metrics=_chosen_metrics(cells),
        chosen=chosen if is_current else None,
        choice_is_old=chosen is not None and not is_current,
        tta=str(_first_setting(cells, "evaluate.tta", "none")),
        classes=_common_classes(run_dir, cells),
        tolerance={
            name: float(given)
            for name in ("nsd_mm", "nsd_px")
            if (given := _first_setting(cells, f"evaluate.{name}", None)) is not None
        },
        generator_saw=frozenset(name for entry in entries for name in entry.generator_saw),
        per_image=pd.concat(frames, ignore_index=True) if frames else None,
    )


def _chosen_metrics(cells: list[Cell]) -> tuple[str, ...]:
    """From the config; XBusNet's four if it is older than this setting, none if there is no config yet."""
    if not any(cell.settings for cell in cells):
        return ()
    known = [name for name in _first_setting(cells, "evaluate.metrics", ALWAYS) if name in METRICS]
    return on_grids(known, _first_setting(cells, "evaluate.resolution", "network"))


def _variants(run: RunRecord) -> dict[str, Variant]:
    """Evaluation variants by name: those of sentences, which older runs don't list, and those that the run declares."""
    declared = [
        Variant(name=each.name, label=each.label, uses_ground_truth=each.uses_ground_truth) for each in run.variants
    ]
    return {**VARIANTS, **{variant.name: variant for variant in declared}}


def _read_run(folder: RunDir) -> RunRecord:
    run = RunRecord.read(folder.file)
    if run is None:
        raise DataError(no_run(folder))
    missing = [key for key in _RUN_KEYS if getattr(run, key) in ("", [], {}, FoldsRecord())]
    if missing:
        raise DataError(f"{folder.file}: no {', '.join(missing)}. {_OTHER_VERSION}")
    if run.kind not in KINDS:
        raise DataError(f"{folder.file}: {unknown_name('kind of run', run.kind, KINDS)} {_OTHER_VERSION}")
    if run.prompts not in _variants(run):
        raise DataError(f"{folder.file}: {unknown_name('prompt source', run.prompts, _variants(run))}")
    return run


_OTHER_VERSION = "It was written by another version or by hand; run again, or use the version it was made with."


def _read_cell(run_dir: RunDir, run: RunRecord, cell: CellRecord) -> Cell:
    folder = run_dir.cell(cell.name)
    curve = read_curve(folder.metrics)
    config = _config(folder.config)
    settings = _settings(config, run)
    _require_kinds(folder.config, settings)
    external = [Path(given).name for given in settings.get("evaluate.external") or ()]
    reason = _why_incomplete(folder, curve, settings.get("train.iterations"), external)
    done = DoneRecord() if reason else DoneRecord.read(folder.done) or DoneRecord()
    if cell.hash and done.config not in (None, cell.hash):  # of a run that shared the cell, and was edited
        reason = "done with other settings than the run has now"
    attempts = read_attempts(folder)
    return Cell(
        name=cell.name,
        fold=cell.fold,
        hash=cell.hash or "",
        folder=folder,
        per_image=None if reason else read_per_image(folder.per_image, cell.fold, _variants(run)),
        calibration=None if reason else read_calibration(folder.calibration),
        external={}
        if reason
        else {name: read_per_image(folder.external_csv(name), cell.fold, _variants(run)) for name in external},
        reason=reason,
        curve=curve,
        step=done.step,
        parameters=done.parameters,
        attempts=attempts,
        goodput=goodput(attempts, folder.newest_step() if reason else None),
        trained_in=trained_in(folder),
        config=config,
        settings=settings,
    )


def _config(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Restore it, or run again.") from error


def _require_kinds(path: Path, settings: dict[str, t.Any]) -> None:
    """Of the settings that the report reads; a cell's own code checks all. Raises: DataError."""
    for key in ("evaluate.threshold", "evaluate.nsd_mm", "evaluate.nsd_px"):
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise DataError(f"{path}: {key} is a {type(value).__name__}, not a number. {_OTHER_VERSION}")
    for key in ("evaluate.metrics", "evaluate.external"):
        value = settings.get(key)
        if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)):
            raise DataError(f"{path}: {key} is no list of names. {_OTHER_VERSION}")
    for key in ("prompts", "evaluate.resolution", "evaluate.tta"):
        if isinstance(settings.get(key), (list, tuple, dict)):
            raise DataError(f"{path}: {key} is a {type(settings[key]).__name__}, not a word. {_OTHER_VERSION}")


def _settings(config: str | None, run: RunRecord) -> dict[str, t.Any]:
    if config is None:
        return {}
    try:
        return flat_settings(config, instead={"prompts": run.prompts})
    except ConfigError:
        return {}


def _why_incomplete(folder: CellDir, curve: Curve, iterations: t.Any, external: list[str]) -> str | None:
    if folder.done.is_file():
        files = [folder.per_image, *(folder.external_csv(name) for name in external)]
        missing = next((file for file in files if not file.is_file()), None)
        return f"marked DONE, but {missing.relative_to(folder.path)} is not there" if missing else None
    if folder.failed.is_file():
        first, *_traceback = folder.failed.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        return first.strip() or "failed"
    if folder.per_image.is_file():
        return "evaluated, but not marked DONE"
    if curve.loss.empty:
        return "no training step logged yet" if folder.path.is_dir() else "not started"
    return f"not finished: last logged step {curve.loss.index[-1]}" + (f" of {iterations}" if iterations else "")


def _first_setting(cells: list[Cell], key: str, otherwise: t.Any) -> t.Any:
    return next((cell.settings[key] for cell in cells if cell.settings.get(key) is not None), otherwise)


def read_curve(path: Path) -> Curve:
    """The curves of a cell's metrics.jsonl; empty without that file."""
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
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError):
            unreadable += 1
    return Curve(loss=_by_step(loss), dice=_by_step(dice), unreadable=unreadable)


def _by_step(values: dict[int, float]) -> pd.Series:
    return pd.Series(values, dtype=float).sort_index()


def _common_sources(run_dir: RunDir, cells: list[Cell], variants: Iterable[str]) -> list[str]:
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
    return [source for source in variants if source in found[first]]


def _common_classes(run_dir: RunDir, cells: list[Cell]) -> tuple[str, ...]:
    """Mask classes in the order of the columns."""
    dice = of_class("dice", "")
    found = {
        cell.name: tuple(column.removeprefix(dice) for column in cell.per_image.columns if column.startswith(dice))
        for cell in cells
        if cell.per_image is not None
    }
    for name, classes in found.items():
        first, expected = next(iter(found.items()))
        if classes != expected:
            raise DataError(
                f"{run_dir}: cell {first} has figures of the mask classes {', '.join(expected) or '(none)'}, cell "
                f"{name} of {', '.join(classes) or '(none)'}. They were evaluated by different versions: delete the "
                "per_image.csv and DONE of one of them, run again."
            )
    return next(iter(found.values()), ())


def _headline(run_dir: RunDir, asked: str, sources: list[str]) -> str:
    if asked in sources or not sources:
        return asked
    # A source that changes nothing that the model reads was evaluated as the plain source.
    if asked == "shuffled_attributes" and "first_pass" in sources:
        return "first_pass"
    if "none" in sources and set(sources) <= {"none", "shuffled_attributes"}:
        return "none"
    raise DataError(f"{run_dir}: the headline prompts are {asked!r}, but only {', '.join(sources)} were evaluated.")


def _refuse_keys_in_two_folds(cells: list[Cell]) -> None:
    owner: dict[str, str] = {}
    for cell in cells:
        if cell.per_image is None:
            continue
        for key in cell.per_image["key"].unique():
            if key in owner:
                raise DataError(
                    f"{cell.folder.per_image}: key {key!r} was validated in cell {owner[key]} too; an image "
                    "belongs to one fold. The cells were made with different folds: run the whole cross-validation "
                    "again under a new name."
                )
            owner[key] = cell.name
