"""The state of a run as one HTML page that reloads itself: counts, curves, time left, goodput, reasons.

The page needs no other file and no network. It is as new as its last writing: `bushpc status RUN --watch --html FILE`
writes it again until the run has ended.
"""

from __future__ import annotations

import time
import typing as t
from pathlib import Path

from bushpc.dispatch.status import CellStatus, RunStatus
from bushpc.dispatch.status_table import MOST_ROWS, duration, needs_eyes, row_of, totals_line
from bushpc.errors import ConfigError
from bushpc.files import why_not_writable, write_atomically
from bushpc.runs.layout import CellDir

if t.TYPE_CHECKING:
    import pandas as pd

RELOAD_S = 20
# Of a curve, in the units of its own drawing.
WIDE, HIGH = 160, 36
MOST_POINTS = 200


class Drawn(t.NamedTuple):
    """A curve. points: of a polyline of WIDE x HIGH. words: first, last and best value, for those who can't see it."""

    title: str
    points: str
    words: str


class ShownCell(t.NamedTuple):
    """A row of the page. row: as in the terminal's table. where_time_went: the longest causes, with their share."""

    cell: CellStatus
    row: dict[str, str]
    percent: float
    curves: list[Drawn]
    where_time_went: str


def refuse_page(path: Path) -> None:
    """Raises: ConfigError where no page can be written."""
    if path.is_dir():
        raise ConfigError(f"--html {path}: it is a folder; name a file, such as {path / 'status.html'}")
    if reason := why_not_writable(path.parent):
        raise ConfigError(f"--html {path}: {reason}. The page may lie anywhere: --html ~/status.html")


def write_status_page(status: RunStatus, path: Path, command: t.Sequence[str], *, watched: bool) -> Path:
    """Write the page whole; returns its path. watched: whether it will be written again while the run goes on.

    Raises: ConfigError where it cannot be written.
    """
    from bushpc.report import standalone

    shown = [cell for cell in status.cells if needs_eyes(cell)] if len(status.cells) > MOST_ROWS else status.cells
    shown = shown[:MOST_ROWS]
    rest = [cell for cell in status.cells if cell not in shown]
    live = status.report_live or any(cell.live for cell in status.cells)
    text = standalone.environment().get_template("status.html.j2").render(
        status=status,
        totals=status.totals,
        line=totals_line(status),
        left="" if status.totals["left_s"] is None else duration(status.totals["left_s"]),
        ends="" if status.totals["left_s"] is None else _clock(time.time() + status.totals["left_s"]),
        shown=[_shown(cell, status.run_dir) for cell in shown],
        rest=rest,
        written=_clock(time.time()),
        live=live,
        watched=watched and live,
        reload_s=RELOAD_S,
        wide=WIDE,
        high=HIGH,
        command=" ".join(command),
    )  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError(
            f"--html {path}: {error.strerror}. The page may lie anywhere: --html ~/status.html"
        ) from error
    return path


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _shown(cell: CellStatus, run_dir: Path) -> ShownCell:
    from bushpc.report.read_run import read_curve

    curve = read_curve(CellDir(cell.folder).metrics)
    drawn = [_draw("training loss", curve.loss, min), _draw("validation Dice", curve.dice, max)]
    return ShownCell(
        cell=cell,
        row=row_of(cell, run_dir),
        percent=100 * cell.step / cell.total if cell.total else 0.0,
        curves=[each for each in drawn if each],
        where_time_went=_causes(cell),
    )


def _draw(title: str, values: pd.Series, best: t.Callable[[t.Iterable[float]], float]) -> Drawn | None:
    """From the first to the last step, and from the lowest value to the highest one."""
    values = values[values.abs() < float("inf")]
    if len(values) < 2:
        return None
    thin = values.iloc[:: max(1, len(values) // MOST_POINTS)]
    low, high = float(thin.min()), float(thin.max())
    first, span = float(thin.index[0]), float(thin.index[-1] - thin.index[0]) or 1.0
    points = " ".join(
        f"{(step - first) / span * WIDE:.1f},{HIGH - (value - low) / ((high - low) or 1.0) * HIGH:.1f}"
        for step, value in thin.items()
    )
    words = f"{title}: {values.iloc[0]:.3f} → {values.iloc[-1]:.3f}, best {best(values):.3f}"
    return Drawn(title, points, words)


def _causes(cell: CellStatus, most: int = 3) -> str:
    from bushpc.runs.goodput import CAUSES

    if not cell.goodput or not cell.goodput.wall_s:
        return ""
    spent = sorted(cell.goodput.seconds.items(), key=lambda item: -item[1])[:most]
    shares = [(CAUSES[name], 100 * seconds / cell.goodput.wall_s) for name, seconds in spent]
    return ", ".join(f"{cause} {share:.0f}\N{NO-BREAK SPACE}%" for cause, share in shares if share >= 1)
