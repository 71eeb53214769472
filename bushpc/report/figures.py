"""Frames → charts as SVG. Drawn on white so that they print and paste; the page frames them in dark mode too.

`Figure` is used without pyplot: no backend is chosen and no state is left behind in the caller's process.
"""

from __future__ import annotations

import io
import math
import typing as t

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bushpc.goodput import CAUSES
from bushpc.report.results import Cell, source_label

# Okabe and Ito's palette, distinguishable with every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _PURPLE, _VERMILION, _SKY, _GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#5F6670",
)  # fmt: skip
_SOURCE_COLOURS = {"first_pass": _BLUE, "oracle": _ORANGE, "none": _GREY}
_FOLD_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _VERMILION, _SKY, _GREY)

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
_MOST_VALIDATIONS = 200  # each is a dot of its own


def box_plot(per_image: pd.DataFrame, sources: list[str], folds: list[int], missing: set[int]) -> str:
    """Per-image Dice by fold, one box per prompt source; a missing fold keeps its place, empty and named. SVG text."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        axes = figure.subplots()
        width = 0.75 / len(sources)
        rng = np.random.default_rng(0)  # sideways jitter only
        for s, source in enumerate(sources):
            offset = (s - (len(sources) - 1) / 2) * width
            for place, fold in enumerate(folds):
                chosen = (per_image["fold"] == fold) & (per_image["prompts"] == source)
                dice = per_image.loc[chosen, "dice"].to_numpy()
                if dice.size:
                    _box(axes, dice, place + offset, width * 0.8, _SOURCE_COLOURS[source], rng)
            axes.plot([], [], "s", color=_SOURCE_COLOURS[source], label=source_label(source, sources))
        for place, fold in enumerate(folds):
            if fold in missing:
                axes.text(place, 0.5, "missing", ha="center", va="center", color=_VERMILION, rotation=90)
        axes.set_xticks(range(len(folds)), [f"fold {fold}" for fold in folds])
        axes.set_xlim(-0.6, len(folds) - 0.4)
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel("Dice per image")
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper left", ncols=len(sources))
        return _svg(figure)


def _box(axes: Axes, dice: np.ndarray, at: float, width: float, colour: str, rng: np.random.Generator) -> None:
    sideways = at + rng.uniform(-0.3, 0.3, dice.size) * width
    # Dots as one embedded picture: thousands of images must not become thousands of SVG elements.
    axes.scatter(sideways, dice, s=7, color=colour, alpha=0.45, linewidths=0, rasterized=True)
    axes.boxplot(
        dice,
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


def training_curves(cells: list[Cell]) -> str | None:
    """Training loss of each fold, raw in light and smoothed, validation Dice beside it where logged. SVG text.

    None if no step was logged in any fold.
    """
    if all(cell.curve.loss.empty for cell in cells):
        return None
    has_dice = any(not cell.curve.dice.empty for cell in cells)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        plots = figure.subplots(1, 2 if has_dice else 1, squeeze=False)[0]
        for i, cell in enumerate(cells):
            colour = _FOLD_COLOURS[i % len(_FOLD_COLOURS)]
            line = "-" if i < len(_FOLD_COLOURS) else "--"
            label = f"fold {cell.fold}" + ("" if cell.complete else " (incomplete)")
            raw, smoothed = _thin(cell.curve.loss, _MOST_STEPS), _thin(smooth(cell.curve.loss), _MOST_STEPS)
            plots[0].plot(raw.index, raw, color=colour, alpha=0.18, linewidth=0.8)
            plots[0].plot(smoothed.index, smoothed, line, color=colour, linewidth=1.6, label=label)
            if has_dice:
                dice = _thin(cell.curve.dice, _MOST_VALIDATIONS)
                plots[1].plot(dice.index, dice, f"{line}o", color=colour, markersize=4)
        plots[0].set(title="Training loss", xlabel="step")
        if has_dice:
            plots[1].set(title="Validation Dice", xlabel="step", ylim=(-0.02, 1.02))
        figure.legend(loc="outside upper left", ncols=min(len(cells), 5))
        return _svg(figure)


def time_bars(cells: list[Cell]) -> str | None:
    """Where the time of each cell went: one bar a cell, its hours stacked by cause. SVG text.

    Causes that take no time in any cell are left out. None before a cell has started.
    """
    started = [(cell, cell.goodput) for cell in cells if cell.goodput]
    if not started:
        return None
    hours = pd.DataFrame(
        [account.seconds for _, account in started], index=[f"fold {cell.fold}" for cell, _ in started]
    )[list(CAUSES)] / 3600  # fmt: skip
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 1.7 + 0.34 * len(started)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(started))
        for cause, said in CAUSES.items():
            widths = hours[cause].to_numpy()
            if widths.any():
                axes.barh(range(len(started)), widths, 0.7, left, color=_CAUSE_COLOURS[cause], label=said)
            left += widths
        axes.set_yticks(range(len(started)), list(hours.index))
        axes.invert_yaxis()
        axes.set_xlabel("hours since the first submission")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=5)
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
