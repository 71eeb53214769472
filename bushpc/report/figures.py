"""Charts as SVG. Drawn on white so that they print and paste; the page frames them in dark mode too.

`Figure` is used without pyplot: no backend is chosen and no state is left behind in the caller's process.
"""

from __future__ import annotations

import io
import math
import textwrap
import typing as t

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bushpc.metrics.registry import METRICS
from bushpc.report import label_stats, stats
from bushpc.report.costs import cost_of
from bushpc.report.scope import ReportScope
from bushpc.runs.goodput import CAUSES
from bushpc.sample import LABELS

# Okabe and Ito's palette, distinguishable with every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _PURPLE, _VERMILION, _SKY, _GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#5F6670",
)  # fmt: skip
_SOURCE_COLOURS = {
    "first_pass": _BLUE, "oracle": _ORANGE, "none": _GREY,
    "wrong_size": _PURPLE, "wrong_quadrant": _VERMILION, "shuffled_attributes": _GREEN,
}  # fmt: skip
_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _VERMILION, _SKY, _GREY)
_LINES = ("-", "--", ":")

_STYLE: dict[t.Any, t.Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A9099",
    "axes.labelcolor": "#30353B",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#30353B",
    "ytick.color": "#30353B",
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same letters everywhere, whatever fonts the reader has
    "svg.hashsalt": "bushpc",  # element ids that do not change from one report of a run to the next
}

_CAUSE_COLOURS = {
    "productive": _GREEN, "load": _SKY, "save": _BLUE, "evaluate": _PURPLE, "other": "#C9CED4", "replay": _VERMILION,
    "lost": "#5B2333", "start": _ORANGE, "queue": "#F0E442", "requeue": "#8C2D04", "idle": "#E6E8EB",
}  # fmt: skip

# Points of a curve: more cannot be seen at this width and only make the page heavy.
_MOST_STEPS = 1000
MOST_ARMS = 20  # in one chart: more cannot be told apart, and the tables have them all
_PLOTS_A_ROW = 3  # of labels: as many as there are
_MOST_VALIDATIONS = 200  # each is a dot of its own


# Maps of the standard deviation: no two of a probability's values are further from their mean.
MOST_DEVIATION = 0.5
DEVIATION_COLOURS = "magma"  # evenly lighter with the value, for every eye and in grey print


class Boxes(t.NamedTuple):
    """One colour of the box plot: its name in the legend, and the values at each place, which may be empty."""

    label: str
    colour: str
    values: list[np.ndarray]


def boxes_of(scope: ReportScope) -> tuple[list[str], list[Boxes]]:
    """The headline metric of every image that has it, by fold and prompt source, or a box per arm if there are several.

    (names of places, boxes).
    """
    metric = scope.headline_metric
    if len(scope.arms) > 1:
        entries = scope.entries[:MOST_ARMS]
        values = [entry.arm.rows(entry.source)[metric].dropna().to_numpy() for entry in entries]
        return [textwrap.fill(entry.label, 18) for entry in entries], [Boxes("", _BLUE, values)]
    (arm,) = scope.arms
    boxes = []
    for number, source in enumerate(arm.sources):
        colour = _SOURCE_COLOURS.get(source, _COLOURS[number % len(_COLOURS)])
        rows = arm.rows(source).dropna(subset=[metric])
        values = [rows.loc[rows["fold"] == cell.fold, metric].to_numpy() for cell in arm.cells]
        boxes.append(Boxes(arm.source_label(source), colour, values))
    return [f"fold {cell.fold}" for cell in arm.cells], boxes


def box_plot(places: list[str], boxes: list[Boxes], metric: str = "dice") -> str:
    """A metric per image, a box of each colour at each place; places without any box are labelled missing. SVG text."""
    found = METRICS[metric]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(9.0, 0.95 * len(places)), 4.2), layout="constrained")
        axes = figure.subplots()
        width = 0.75 / len(boxes)
        rng = np.random.default_rng(0)  # sideways jitter only
        for b, box in enumerate(boxes):
            offset = (b - (len(boxes) - 1) / 2) * width
            for place, values in enumerate(box.values):
                if values.size:
                    _box(axes, values, place + offset, min(0.4, width * 0.8), box.colour, rng)
            axes.plot([], [], "s", color=box.colour, label=box.label)
        for place in range(len(places)):
            if not any(box.values[place].size for box in boxes):
                axes.text(
                    place, 0.5, "missing", transform=axes.get_xaxis_transform(), ha="center", va="center",
                    color=_VERMILION, rotation=90,
                )  # fmt: skip
        axes.set_xticks(range(len(places)), places)
        axes.set_xlim(-0.6, len(places) - 0.4)
        if math.isfinite(found.high):
            axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel(f"{found.title} per image" + (f", {found.unit}" if found.unit else ""))
        axes.grid(visible=False, axis="x")
        if len(boxes) > 1 or boxes[0].label:
            figure.legend(loc="outside upper left", ncols=min(3, len(boxes)))
        return _svg(figure)


def _box(axes: Axes, values: np.ndarray, at: float, width: float, colour: str, rng: np.random.Generator) -> None:
    sideways = at + rng.uniform(-0.3, 0.3, values.size) * width
    # Dots as one embedded picture: thousands of images must not become thousands of SVG elements.
    axes.scatter(sideways, values, s=7, color=colour, alpha=0.45, linewidths=0, rasterized=True)
    axes.boxplot(
        values,
        positions=[at],
        widths=width,
        showfliers=False,  # every image is drawn as a dot already
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": f"{colour}33", "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 2},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )


def training_curves(scope: ReportScope) -> str | None:
    """Training loss by step, and validation Dice if it was logged. SVG text; None if no step was logged.

    One arm: a colour per fold, logged values light and smoothed values strong. Several: a colour per arm, smoothed.
    """
    cells = [(a, arm, cell) for a, arm in enumerate(scope.arms[:MOST_ARMS]) for cell in arm.cells]
    if all(cell.curve.loss.empty for _, _, cell in cells):
        return None
    many = len(scope.arms) > 1
    has_dice = any(not cell.curve.dice.empty for _, _, cell in cells)
    most = max(100, _MOST_STEPS * 10 // max(10, len(cells)))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        plots = figure.subplots(1, 2 if has_dice else 1, squeeze=False)[0]
        named: set[str] = set()
        for i, (a, arm, cell) in enumerate(cells):
            hue = a if many else i
            colour, line = _COLOURS[hue % len(_COLOURS)], _LINES[hue // len(_COLOURS) % len(_LINES)]
            label = arm.label if many else f"fold {cell.fold}" + ("" if cell.complete else " (incomplete)")
            if not many:
                logged = _thin(cell.curve.loss, most)
                plots[0].plot(logged.index, logged, color=colour, alpha=0.18, linewidth=0.8)
            smoothed = _thin(smooth(cell.curve.loss), most)
            legend = "_nolegend_" if label in named else label
            plots[0].plot(smoothed.index, smoothed, line, color=colour, linewidth=1.0 if many else 1.6, label=legend)
            named.add(label)
            if has_dice:
                dice = _thin(cell.curve.dice, _MOST_VALIDATIONS)
                marker = "" if many else "o"
                plots[1].plot(dice.index, dice, f"{line}{marker}", color=colour, markersize=4, linewidth=1.2)
        plots[0].set(title="Training loss", xlabel="step")
        if has_dice:
            plots[1].set(title="Validation Dice", xlabel="step", ylim=(-0.02, 1.02))
        figure.legend(loc="outside upper left", ncols=_legend_columns(named))
        return _svg(figure)


def _legend_columns(labels: t.Iterable[str]) -> int:
    """As many as fit side by side."""
    return max(1, min(5, 110 // (8 + max(len(label) for label in labels))))


def time_bars(scope: ReportScope) -> str | None:
    """How the time was spent, hours stacked by cause: a bar per fold, or per arm if there are several. SVG text.

    Causes without any time are left out. None before a cell has started.
    """
    if len(scope.arms) > 1:
        costs = [(arm.label, cost_of(arm.cells)) for arm in scope.arms[:MOST_ARMS]]
    else:
        costs = [(f"fold {cell.fold}", cost_of([cell])) for cell in scope.arms[0].cells]
    started = {label: cost.seconds for label, cost in costs if cost}
    if not started:
        return None
    hours = pd.DataFrame(list(started.values()))[list(CAUSES)] / 3600
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 1.7 + 0.34 * len(started)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(started))
        for cause, title in CAUSES.items():
            widths = hours[cause].to_numpy()
            if widths.any():
                axes.barh(range(len(started)), widths, 0.7, left, color=_CAUSE_COLOURS[cause], label=title)
            left += widths
        axes.set_yticks(range(len(started)), [textwrap.fill(label, 32) for label in started])
        axes.invert_yaxis()
        axes.set_xlabel("hours since the first submission" if len(scope.arms) == 1 else "hours, all cells of an arm")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=5)
        return _svg(figure)


def reliability_diagram(scope: ReportScope) -> str | None:
    """Observed share of lesion pixels by mean predicted probability, a line per entry. SVG text.

    None if no evaluation wrote bins.
    """
    curves = []
    for entry in scope.entries[:MOST_ARMS]:
        bins = entry.arm.calibration
        if bins is not None:
            curves.append((entry.label, stats.reliability(bins[bins["prompts"] == entry.source])))
    if not curves:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], ":", color=_GREY, linewidth=1, label="perfect")
        for i, (label, curve) in enumerate(curves):
            colour, line = _COLOURS[i % len(_COLOURS)], _LINES[i // len(_COLOURS) % len(_LINES)]
            axes.plot(
                curve["prob"], curve["lesion"], f"{line}o", color=colour, markersize=4, linewidth=1.6, label=label
            )
        axes.set(
            xlabel="mean predicted probability", ylabel="share of lesion pixels", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
        )
        figure.legend(loc="outside upper left", ncols=_legend_columns(label for label, _ in curves))
        return _svg(figure)


def label_charts(scope: ReportScope) -> str | None:
    """ROC curves of each label against all others, and confusion matrices, all folds together. SVG text.

    One entry: a line per label, the matrix beside it. Several: a plot per label with a line per entry, and a matrix per
    entry below. None if no model gives labels.
    """
    labelled = _labelled(scope)
    if not labelled:
        return None
    labels = [label for label in LABELS if any(_has_curve(rows, label) for _, rows in labelled)]
    alone = len(labelled) == 1
    lines = 1 if alone else 1 + math.ceil(len(labelled) / _PLOTS_A_ROW)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 4.6 if alone else 0.4 + 3.1 * lines), layout="constrained")
        grid = figure.subplots(lines, 2 if alone else _PLOTS_A_ROW, squeeze=False)
        curves, matrices = (grid[0, :1], grid[0, 1:]) if alone else (grid[0], grid[1:].ravel())
        for i, (name, rows) in enumerate(labelled):
            for j, label in enumerate(labels):
                hue, legend = (j, label) if alone else (i, name if j == 0 else "_nolegend_")
                colour, line = _COLOURS[hue % len(_COLOURS)], _LINES[hue // len(_COLOURS) % len(_LINES)]
                if _has_curve(rows, label):
                    axes = curves[0 if alone else j]
                    axes.plot(*label_stats.roc(rows, label), line, color=colour, linewidth=1.6, label=legend)
            _matrix(matrices[i], label_stats.confusion_matrix(rows), "" if alone else name)
        for axes, label in zip(curves, [""] if alone else labels, strict=False):
            axes.plot([0, 1], [0, 1], ":", color=_GREY, linewidth=1, label="chance" if axes is curves[0] else None)
            axes.set(title=label, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        for axes in (*curves[1 if alone else len(labels) :], *matrices[len(labelled) :]):
            axes.set_axis_off()
        names = labels if alone else [name for name, _ in labelled]
        figure.legend(loc="outside upper left", ncols=_legend_columns(["chance", *names]))
        return _svg(figure)


def _matrix(axes: Axes, counts_LL: np.ndarray, title: str) -> None:
    """Counts by label (rows) and most probable label, shaded by the share of the row."""
    share_LL = counts_LL / np.maximum(1, counts_LL.sum(axis=1, keepdims=True))
    axes.imshow(share_LL, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    for i, j in np.ndindex(*counts_LL.shape):
        colour = "white" if share_LL[i, j] > 0.6 else "#30353B"
        axes.text(j, i, str(counts_LL[i, j]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_yticks(range(len(LABELS)), LABELS, rotation=90, va="center")
    axes.set(xlabel="predicted", ylabel="label", title=textwrap.fill(title, 30))


def _has_curve(rows: pd.DataFrame, label: str) -> bool:
    """Whether there are images with the label and without."""
    return bool(0 < (rows["label"] == label).sum() < len(rows))


def _labelled(scope: ReportScope) -> list[tuple[str, pd.DataFrame]]:
    """Name and rows of every entry whose model gives labels."""
    entries = scope.entries[:MOST_ARMS]
    found = [(entry.label, label_stats.labelled(entry.arm.rows(entry.source))) for entry in entries]
    return [(label, rows) for label, rows in found if len(rows)]


def deviation_scale() -> str:
    """The colour scale of maps of the standard deviation. SVG text."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.0, 0.75), layout="constrained")
        colours = ScalarMappable(Normalize(0, MOST_DEVIATION), DEVIATION_COLOURS)
        figure.colorbar(colours, cax=figure.subplots(), orientation="horizontal", label="standard deviation")
        return _svg(figure)


def smooth(loss: pd.Series) -> pd.Series:
    """Exponential moving average whose span is a twentieth of the curve; early values weigh only what has been seen."""
    return loss.ewm(span=max(1.0, len(loss) / 20)).mean()


def _thin(curve: pd.Series, most: int) -> pd.Series:
    return curve.iloc[:: max(1, math.ceil(len(curve) / most))]


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    return out.getvalue()
