"""Everything → `report/`: one HTML page, `report.md`, CSV and LaTeX tables, `summary.json`.

The folder is built under another name and then renamed. A report that is killed before that leaves the old one
untouched, and a `report.tmp-…` beside it that a later report removes.
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
import stat
import time
import typing as t
import uuid
from collections.abc import Sequence
from pathlib import Path

import rich.console

from bushpc.errors import DataError
from bushpc.files import flush_folder, why_not_writable
from bushpc.report import figures, render, tables
from bushpc.report.conclusion import conclusion
from bushpc.report.methods import claim_table, methods
from bushpc.report.pictures import RANKS, Shards, case_pictures, heat_maps, open_shards, side_by_side
from bushpc.report.references import bibtex
from bushpc.report.scope import ReportScope, scope_of_run, scope_of_runs
from bushpc.report.standalone import environment
from bushpc.report.summary import Summary, summarise
from bushpc.report.table import Table
from bushpc.runs.layout import RunDir

ROWS_ON_PAGE = 200  # of one table: a grid of a thousand cells must stay a page that a phone can open
_ROWS_IN_SIGHT = 60  # a longer table scrolls in a box of its own
_MISSING_ON_PAGE = 20
_LEFTOVER_SECONDS = 3600  # no report takes an hour to write, so an older folder aside belongs to a killed one


class ReportResult(t.NamedTuple):
    """html: the page. fold_table: for the terminal; for several arms the overall result."""

    html: Path
    summary: Summary
    fold_table: rich.console.Group

    @property
    def content(self) -> dict[str, t.Any]:
        """The content of `summary.json`."""
        content: dict[str, t.Any] = json.loads(self.summary.to_json())
        return content


def build_report(run_dir: Path, out: Path | None = None) -> ReportResult:
    """Write `run_dir`/report, or `out`, whole or not at all, whether or not all folds are complete.

    Raises: DataError if the run directory contradicts itself (a damaged per-image CSV, an image in two folds), or the
    folder cannot be written.
    """
    folder = Path(out) if out else RunDir(run_dir).report
    _require_place(folder, given=out is not None)
    _restore_interrupted(folder)
    return _build(scope_of_run(Path(run_dir)), folder)


def build_comparison(run_dirs: Sequence[Path], out: Path | None = None) -> ReportResult:
    """The same for the arms of several runs, into `out`; by default `compare-<names>` beside the first run.

    Raises: DataError if they cannot be compared (other data, other folds), or as `build_report`.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    scope = scope_of_runs(folders)
    names = "-".join(run.record.name for run in scope.runs)
    folder = Path(out) if out else scope.runs[0].path.parent / f"compare-{names}"
    _require_place(folder, given=True)
    _restore_interrupted(folder)
    return _build(scope, folder)


def _require_place(folder: Path, *, given: bool) -> None:
    """Raises: DataError before any work is done, where the report could not be written or would replace other files."""
    if given and folder.exists() and not (folder / "summary.json").is_file():
        raise DataError(f"{folder} is there and is no report, so it is left alone. Choose another --out FOLDER.")
    # An old report is removed from within: in a shared folder its files may be another member's.
    reason = why_not_writable(folder.parent) or (why_not_writable(folder) if folder.exists() else "")
    if reason:
        raise DataError(f"The report cannot be written: {reason}. Choose a folder of yours: --out FOLDER")
    if given:
        folder.parent.mkdir(parents=True, exist_ok=True)


def _build(scope: ReportScope, folder: Path) -> ReportResult:
    summary = summarise(scope)
    shards = open_shards(scope.runs[0])
    claim = claim_table(scope, summary)
    shown = {**tables.all_tables(scope, summary, shards.manifest), claim.name: claim}
    files = {
        "references.bib": bibtex(scope, summary),
        "index.html": _render(scope, summary, shown, shards),
        "report.md": _markdown(scope, summary, shown),
        "summary.json": summary.to_json(),
    }
    for table in shown.values():
        files[f"{table.name}.csv"] = render.to_csv(table)
        files[f"{table.name}.tex"] = render.to_latex(table)
    _write_folder(folder, files)
    terminal = tables.overview_table(summary) or tables.folds_table(summary, with_paper=False)
    return ReportResult(folder / "index.html", summary, render.to_rich(terminal))


def _render(scope: ReportScope, summary: Summary, shown: dict[str, Table], shards: Shards) -> str:
    templates = environment()
    templates.filters["data_uri"] = _svg_data_uri
    baseline = next((cell for cell in scope.baseline.cells if cell.config), None)
    return templates.get_template("report.html.j2").render(
        many=summary.several,
        scope=scope,
        summary=summary,
        status=_status(summary),
        conclusion=conclusion(summary),
        methods=methods(scope, summary),
        references=bibtex(scope, summary),
        tables=collections.defaultdict(lambda: None, shown),  # what there is nothing to say in is None
        most=ROWS_ON_PAGE,
        tall=_ROWS_IN_SIGHT,
        most_arms=figures.MOST_ARMS,
        folds_phrase=None if summary.several else tables.folds_phrase(summary.arms[0]),
        titled=tables.titled,
        box_plot=figures.box_plot(*figures.boxes_of(scope), scope.headline_metric)
        if scope.entries and scope.tested
        else None,
        label_charts=figures.label_charts(scope),
        curves=figures.training_curves(scope),
        reliability=figures.reliability_diagram(scope),
        time_bars=figures.time_bars(scope),
        unreadable=sum(cell.curve.unreadable for arm in scope.arms for cell in arm.cells),
        cases=case_pictures(scope.arms[0], shards) if scope.segments and not summary.several else None,
        side_by_side=side_by_side(scope, shards) if scope.segments and summary.several else None,
        maps=heat_maps(scope, shards),
        deviation_scale=figures.deviation_scale(),
        classes=tables.classes_of(summary),
        ranks=RANKS,
        commands=[shlex.join(str(part) for part in run.record.command) for run in scope.runs],
        config=(baseline.name, baseline.config) if baseline else None,
    )


def _status(summary: Summary) -> list[str]:
    """One sentence per missing cell; empty if the report is complete."""
    missing = [(arm, fold) for arm in summary.arms for fold in arm.folds.missing]
    sentences = [
        f"{arm.label}, fold {fold.fold}: {fold.reason}." if summary.several else f"Fold {fold.fold}: {fold.reason}."
        for arm, fold in missing[:_MISSING_ON_PAGE]
    ]
    more = len(missing) - _MISSING_ON_PAGE
    return [*sentences, f"And {more} more, see the cells."] if more > 0 else sentences


def _markdown(scope: ReportScope, summary: Summary, shown: dict[str, Table]) -> str:
    """The conclusion, the methods, the commands that were run, and all tables."""
    parts = [f"# {render.markdown(summary.title)}", "", render.markdown(conclusion(summary)), ""]
    if not summary.complete:
        parts += ["**INCOMPLETE**", "", *(f"- {render.markdown(line)}" for line in _status(summary)), ""]
    parts += [render.markdown(methods(scope, summary)), ""]
    for run in scope.runs:
        command = shlex.join(str(part) for part in run.record.command).replace("`", "'")
        parts += [f"- {render.markdown(run.record.name)}: `{command}`, commit {run.record.commit or 'unknown'}"]
    parts += ["", *(render.to_markdown(table, ROWS_ON_PAGE) for table in shown.values())]
    return "\n".join(parts)


def _svg_data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _write_folder(folder: Path, files: dict[str, str]) -> None:
    """Put `files` into `folder` in one step, replacing what was there."""
    aside = None
    try:
        aside = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        aside.mkdir()  # with the modes of umask and folder, as mkdtemp would not: co-authors read reports
        # Who may replace this report must be able to delete it as well.
        aside.chmod(stat.S_IMODE(aside.stat().st_mode | folder.parent.stat().st_mode & stat.S_IRWXG))
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
