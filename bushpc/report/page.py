"""Everything → `report/`: one HTML page, CSV and LaTeX tables, `summary.json`. The report's front door.

The folder is built aside and renamed as a whole. A report that is killed half-way leaves the old one untouched and
a `report.tmp-…` beside it, which the next report removes.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import shlex
import shutil
import tempfile
import time
import typing as t
from pathlib import Path

import jinja2
import rich.console

from bushpc.errors import DataError
from bushpc.files import flush_folder
from bushpc.report import content, figures, tables
from bushpc.report.panel import RANKS, build_panel
from bushpc.report.results import RunResults, read_run
from bushpc.report.summary import summarise

_LEFTOVER_SECONDS = 3600  # no report takes an hour to write, so an older folder aside belongs to a killed one


class ReportResult(t.NamedTuple):
    """html: the page. summary: as in `summary.json`. fold_table: for the terminal."""

    html: Path
    summary: dict[str, t.Any]
    fold_table: rich.console.Group


def build_report(run_dir: Path) -> ReportResult:
    """Write `run_dir`/report, whole or not at all, whether or not all folds are complete.

    Raises: DataError if the run directory contradicts itself (a damaged per-image CSV, an image in two folds).
    """
    run_dir = Path(run_dir)
    _restore_interrupted(run_dir / "report")
    results = read_run(run_dir)
    summary = summarise(results)
    files = {
        "index.html": _render(results, summary),
        "summary.json": json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for table in content.all_tables(results, summary):
        files[f"{table.name}.csv"] = tables.to_csv(table)
        files[f"{table.name}.tex"] = tables.to_latex(table)
    _write_folder(run_dir / "report", files)
    return ReportResult(run_dir / "report" / "index.html", summary, _terminal_table(summary))


def _terminal_table(summary: dict[str, t.Any]) -> rich.console.Group:
    return tables.to_rich(content.folds_table(summary, with_paper=False))


def _render(results: RunResults, summary: dict[str, t.Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bushpc.report", "templates"),
        autoescape=True,  # names, keys and reasons come from users and file names
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["table_html"] = tables.to_html
    environment.filters["data_uri"] = _svg_data_uri
    panel = build_panel(results)
    return environment.get_template("report.html.j2").render(
        run=results.run,
        results=results,
        summary=summary,
        headline=content.headline_table(summary),
        folds=content.folds_table(summary),
        strata=content.strata_table(summary),
        difference=content.difference_table(summary),
        time=content.time_table(results),
        time_bars=figures.time_bars(results.cells),
        cells=content.cells_table(results),
        folds_phrase=content.folds_phrase(summary),
        box_plot=_box_plot(results),
        curves=figures.training_curves(results.cells),
        unreadable=sum(cell.curve.unreadable for cell in results.cells),
        panel=panel,
        ranks=RANKS,
        command=shlex.join(str(part) for part in results.run["command"]),
        config=next(((cell.name, cell.config) for cell in results.cells if cell.config), None),
    )


def _box_plot(results: RunResults) -> str | None:
    if results.per_image is None:
        return None
    folds = [cell.fold for cell in results.cells]
    return figures.box_plot(results.per_image, results.sources, folds, {cell.fold for cell in results.missing_cells})


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
