"""Everything → `report/`: one HTML page, `report.md`, CSV and LaTeX tables, `summary.json`. The report's front door.

The folder is built aside and renamed as a whole. A report that is killed half-way leaves the old one untouched and
a `report.tmp-…` beside it, which the next report removes.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import errno
import json
import os
import shlex
import shutil
import tempfile
import time
import typing as t
from collections.abc import Sequence
from pathlib import Path

import rich.console

from bushpc.errors import DataError
from bushpc.files import flush_folder
from bushpc.report import content, figures, tables
from bushpc.report.panel import RANKS, Shards, build_gallery, build_maps, build_panel, open_shards
from bushpc.report.standalone import environment
from bushpc.report.study import Study, study_across, study_of
from bushpc.report.summary import summarise
from bushpc.report.tables import Table
from bushpc.runs.layout import RunDir

ROWS_ON_PAGE = 200  # of one table: a grid of a thousand cells must stay a page that a phone can open
_ROWS_IN_SIGHT = 60  # a longer table scrolls in a box of its own
_MISSING_ON_PAGE = 20
_LEFTOVER_SECONDS = 3600  # no report takes an hour to write, so an older folder aside belongs to a killed one


class ReportResult(t.NamedTuple):
    """html: the page. summary: as in `summary.json`. fold_table: for the terminal; of several arms the overall one."""

    html: Path
    summary: dict[str, t.Any]
    fold_table: rich.console.Group


def build_report(run_dir: Path) -> ReportResult:
    """Write `run_dir`/report, whole or not at all, whether or not all folds are complete.

    Raises: DataError if the run directory contradicts itself (a damaged per-image CSV, an image in two folds).
    """
    folder = RunDir(run_dir).report
    _restore_interrupted(folder)
    return _build(study_of(Path(run_dir)), folder)


def build_comparison(run_dirs: Sequence[Path], out: Path | None = None) -> ReportResult:
    """The same for the arms of several runs, into `out`; by default `compare-<names>` beside the first run.

    Raises: DataError if they cannot be compared (other data, other folds), or as `build_report`.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    study = study_across(folders)
    names = "-".join(run.run.name for run in study.runs)
    folder = Path(out) if out else study.runs[0].path.parent / f"compare-{names}"
    if folder.exists() and not (folder / "summary.json").is_file():
        raise DataError(f"{folder} is there and is no comparison, so it is left alone. Choose another --out FOLDER.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _restore_interrupted(folder)
    return _build(study, folder)


def _build(study: Study, folder: Path) -> ReportResult:
    summary = summarise(study)
    shards = open_shards(study.runs[0])
    shown = content.all_tables(study, summary, shards.manifest)
    files = {
        "index.html": _render(study, summary, shown, shards),
        "report.md": _markdown(study, summary, shown),
        "summary.json": json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for table in shown.values():
        files[f"{table.name}.csv"] = tables.to_csv(table)
        files[f"{table.name}.tex"] = tables.to_latex(table)
    _write_folder(folder, files)
    terminal = content.overview_table(summary) or content.folds_table(summary, with_paper=False)
    return ReportResult(folder / "index.html", summary, tables.to_rich(terminal))


def _render(study: Study, summary: dict[str, t.Any], shown: dict[str, Table], shards: Shards) -> str:
    templates = environment()
    templates.filters["data_uri"] = _svg_data_uri
    many = content.several(summary)
    baseline = next((cell for cell in study.baseline.cells if cell.config), None)
    return templates.get_template("report.html.j2").render(
        many=many,
        study=study,
        summary=summary,
        status=_status(summary),
        tables=collections.defaultdict(lambda: None, shown),  # what there is nothing to say in is None
        most=ROWS_ON_PAGE,
        tall=_ROWS_IN_SIGHT,
        most_arms=figures.MOST_ARMS,
        folds_phrase=None if many else content.folds_phrase(summary),
        titled=content.titled,
        box_plot=figures.box_plot(*figures.boxes_of(study), study.headline_metric)
        if study.entries and study.tested
        else None,
        label_charts=figures.label_charts(study),
        curves=figures.training_curves(study),
        reliability=figures.reliability_diagram(study),
        time_bars=figures.time_bars(study),
        unreadable=sum(cell.curve.unreadable for arm in study.arms for cell in arm.cells),
        panel=build_panel(study.arms[0], shards) if study.segments and not many else None,
        gallery=build_gallery(study, shards) if study.segments and many else None,
        maps=build_maps(study, shards),
        deviation_scale=figures.deviation_scale(),
        classes=content.classes_of(summary),
        ranks=RANKS,
        commands=[shlex.join(str(part) for part in run.run.command) for run in study.runs],
        config=(baseline.name, baseline.config) if baseline else None,
    )


def _status(summary: dict[str, t.Any]) -> list[str]:
    """Why it is incomplete, a sentence a cell; empty if it is complete."""
    missing = [(arm, entry) for arm in summary["arms"] for entry in arm["folds"]["missing"]]
    where = "{label}, fold {fold}" if content.several(summary) else "Fold {fold}"
    said = [
        f"{where.format(label=arm['label'], fold=entry['fold'])}: {entry['reason']}."
        for arm, entry in missing[:_MISSING_ON_PAGE]
    ]
    more = len(missing) - _MISSING_ON_PAGE
    return [*said, f"And {more} more, see the cells."] if more > 0 else said


def _markdown(study: Study, summary: dict[str, t.Any], shown: dict[str, Table]) -> str:
    """What was run, and all tables."""
    parts = [f"# {tables.markdown(summary['title'])}", ""]
    if not summary["complete"]:
        parts += ["**INCOMPLETE**", "", *(f"- {tables.markdown(line)}" for line in _status(summary)), ""]
    for run in study.runs:
        command = shlex.join(str(part) for part in run.run.command).replace("`", "'")
        parts += [f"- {tables.markdown(run.run.name)}: `{command}`, commit {run.run.commit or 'unknown'}"]
    parts += ["", *(tables.to_markdown(table, ROWS_ON_PAGE) for table in shown.values())]
    return "\n".join(parts)


def _svg_data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _write_folder(folder: Path, files: dict[str, str]) -> None:
    """Put `files` into `folder` in one step, replacing what was there."""
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        aside.chmod(0o755)  # mkdtemp keeps others out, but co-authors on the cluster read reports
        for name, text in files.items():
            with (aside / name).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        _swap(aside, folder)
        flush_folder(folder.parent)
    except OSError as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise DataError(
            f"The report cannot be written into {folder.parent} ({error}). Mend that and repeat."
        ) from error
    _remove_leftovers(folder)


def _swap(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`; a folder cannot replace a full one, so the old one steps away first.

    Two reports of one run may be written at once: whoever finds the place taken again, tries again.
    """
    while True:
        try:
            aside.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = aside.with_name(aside.name.replace(".tmp-", ".old-"))
        with contextlib.suppress(FileNotFoundError):  # the other report took it away first
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _restore_interrupted(folder: Path) -> None:
    """Bring back the report that a kill between the two renames of `_swap` left without its name."""
    stepped_away = sorted(folder.parent.glob(f"{folder.name}.old-*"), key=lambda old: old.stat().st_mtime)
    if stepped_away and not folder.exists():
        stepped_away[-1].rename(folder)


def _remove_leftovers(folder: Path) -> None:
    for leftover in (*folder.parent.glob(f"{folder.name}.tmp-*"), *folder.parent.glob(f"{folder.name}.old-*")):
        with contextlib.suppress(FileNotFoundError):  # another report's, gone by itself
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
