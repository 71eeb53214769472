"""All metrics, one entry each. Config, evaluator, per-image CSV and report read this list.

config `evaluate.metrics` → evaluate: one column of per_image.csv per metric → report: one column of the tables

To add a metric, add a `Metric` to the list below. Nothing else needs to know its name.
"""

from __future__ import annotations

import typing as t
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bushpc.metrics import label, mask, two_class

INFINITE = float("inf")
# Grids of pixels that metrics are taken on, in words.
Grid = t.Literal["network", "original"]
GRIDS: dict[str, str] = {
    "network": "the square images that the network reads",
    "original": "the original scans, to whose size the probabilities were brought",
}
TWO_CLASS = "_2class"  # ends the name of a mean over lesion and background
ON_ORIGINAL = "_original"  # ends the name of what is taken on the original grid: `dice` there is `dice_original`


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: how it is computed, how it is shown, and what a reader has to know about it.

    name: in `evaluate.metrics`, in CSV headers and in summary.json.
    title: in table headers.
    of: what it is computed from.
        "masks": a predicted and a reference mask of one image; `function(MaskPair)` is a number.
        "pixels": an image that the model generates. The model computes it itself (`Prediction.scores`), so there is no
        `function`.
        "labels": the labels of a set of images; `function(LabelSet, weight_RN)` is a number for each weighting of the
        images, (R,). See metrics/label.py.
    grid: one of GRIDS, on which its pixels are counted; None for metrics of labels. The report states it, because a
        paper's figure is comparable only on the same grid.
    spacing: unit of the distances that it measures, if it measures any; the grid's pixels are converted to it.
    unit: of the metric itself.
    low, high: smallest and largest possible value; anything else in a CSV is an error.
    always: every per_image.csv has it, even if `evaluate.metrics` doesn't list it.
    of_probability: it judges probabilities, so a mask after post-processing has none.
    from_counts: it follows from the counts of pixels (tp, fp, fn, tn), so it is known of CSV files without its column.
    tested: whether arms are compared by it. Rates of pixels are not: a threshold trades one for another, so a better
        one alone means nothing.
    note: sentence below the tables. Metrics with the same note share it; `{tolerance}` is replaced by their tolerances.
    undefined: the reason that the report gives if no image has it.
    """

    name: str
    title: str
    of: t.Literal["masks", "pixels", "labels"] = "masks"
    function: Callable[..., t.Any] | None = None
    more_is_better: bool
    grid: Grid | None = "network"
    spacing: mask.Spacing | None = None
    unit: str = ""
    low: float = 0.0
    high: float = 1.0
    always: bool = False
    of_probability: bool = False
    from_counts: bool = False
    tested: bool = True
    note: str = ""
    undefined: str = "the evaluation measured it for no image"

    def __post_init__(self) -> None:
        assert (self.function is None) == (self.of == "pixels"), f"{self.name}: only the model computes its own scores"
        assert (self.grid is None) == (self.of == "labels"), f"{self.name}: masks and pixels need a grid, labels none"

    @property
    def heading(self) -> str:
        """Title and unit, as tables and the log show it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


METRICS: dict[str, Metric] = {}  # all, by name
IMAGE_METRICS: dict[str, Metric] = {}  # of one image: masks and pixels
LABEL_METRICS: dict[str, Metric] = {}  # of a set of images


def register(metric: Metric) -> None:
    """Add a metric; of masks also its twin on the original grid. A program that uses bushpc can add its own."""
    assert metric.name not in METRICS, f"there are two metrics called {metric.name}"
    METRICS[metric.name] = metric
    (LABEL_METRICS if metric.of == "labels" else IMAGE_METRICS)[metric.name] = metric
    if metric.of == "masks" and metric.grid == "network" and metric.spacing != "network px":
        register(_on_original(metric))


def _on_original(metric: Metric) -> Metric:
    title = f"{metric.title} (original)"
    return replace(
        metric, name=f"{metric.name}{ON_ORIGINAL}", title=title, grid="original", always=False, from_counts=False
    )


def on_grids(names: t.Iterable[str], resolution: str) -> tuple[str, ...]:
    """The metrics that `evaluate.metrics` names under an `evaluate.resolution`: those of the original grid first."""
    names = tuple(names)
    if resolution == "network":
        return names
    return (*on_original(names), *names)


def on_original(names: t.Iterable[str]) -> tuple[str, ...]:
    """The twins of metrics on the original grid. What has no twin is left out."""
    return tuple(twin for name in names if (twin := f"{name}{ON_ORIGINAL}") in METRICS)


_HD95 = "HD95: 95th percentile of the Hausdorff distance; the image's diagonal if a lesion was missed completely."
_NSD = "NSD (surface Dice): share of both contours that is within {tolerance} of the other."
_TWO_CLASSES = (
    "2-class: mean over lesion and background, as XBusNet's released evaluation takes them; its FPR counts "
    "2 (FP + FN) as true negatives, so it is from 1/6 to 1/5 for every imperfect mask. Far above the lesion's own "
    "figures, and comparable with nothing else."
)
_NO_PIXEL_SIZE = "the size of a pixel is known for no image with a lesion"
_LABELS = (
    "Classification: over all images of a fold that have a label. F1 and AUC are means over the labels, AUC of "
    "each against all others; of two labels it is the AUC of P(second | first or second). CE is the mean cross-entropy."
)
_NO_LABEL = "no model here gives a probability of each label, or no image has a label"
_ONE_LABEL = "no model here gives a probability of each label, or all images have one label"

for _metric in (
    Metric(name="dice", title="Dice", function=mask.dice, more_is_better=True, always=True),
    Metric(name="iou", title="IoU", function=mask.iou, more_is_better=True, always=True),
    Metric(name="fpr", title="FPR", function=mask.fpr, more_is_better=False, always=True, tested=False),
    Metric(name="fnr", title="FNR", function=mask.fnr, more_is_better=False, always=True, tested=False),
    Metric(name="sensitivity", title="Sensitivity", function=mask.sensitivity, more_is_better=True, tested=False),
    Metric(name="specificity", title="Specificity", function=mask.specificity, more_is_better=True, tested=False),
    Metric(name="precision", title="Precision", function=mask.precision, more_is_better=True, tested=False),
    Metric(name="accuracy", title="Pixel accuracy", function=mask.accuracy, more_is_better=True, tested=False),
    Metric(name="bce", title="BCE", function=mask.bce, more_is_better=False, high=INFINITE, of_probability=True),
    Metric(
        name="hd95_mm",
        title="HD95",
        function=mask.hd95_mm,
        more_is_better=False,
        spacing="mm",
        unit="mm",
        high=INFINITE,
        note=_HD95,
        undefined=_NO_PIXEL_SIZE,
    ),
    Metric(
        name="hd95_px",
        title="HD95",
        function=mask.hd95_px,
        more_is_better=False,
        spacing="px",
        unit="px",
        high=INFINITE,
        note=_HD95,
    ),
    Metric(
        name="hd95_network_px",
        title="HD95",
        function=mask.hd95_network_px,
        more_is_better=False,
        spacing="network px",
        unit="network px",
        high=INFINITE,
        note=_HD95,
    ),
    Metric(
        name="nsd_mm",
        title="NSD, tolerance in mm",
        function=mask.nsd_mm,
        more_is_better=True,
        spacing="mm",
        note=_NSD,
        undefined=_NO_PIXEL_SIZE,
    ),
    Metric(
        name="nsd_px",
        title="NSD, tolerance in px",
        function=mask.nsd_px,
        more_is_better=True,
        spacing="px",
        note=_NSD,
    ),
    Metric(
        name="betti_error",
        title="Betti error",
        function=mask.betti_error,
        more_is_better=False,
        high=INFINITE,
        note="Betti error: surplus or missing pieces and holes of the predicted mask, wherever they are.",
    ),
    *(
        Metric(
            name=function.__name__,
            title=f"2-class {title}",
            function=function,
            more_is_better=more,
            from_counts=True,
            tested=False,
            note=_TWO_CLASSES,
        )
        for title, function, more in (
            ("Dice", two_class.dice_2class, True),
            ("IoU", two_class.iou_2class, True),
            ("FPR", two_class.fpr_2class, False),
            ("FNR", two_class.fnr_2class, False),
        )
    ),
    Metric(name="denoising_mse", title="Denoising MSE", of="pixels", more_is_better=False, high=INFINITE),
    Metric(name="reconstruction_mse", title="Reconstruction MSE", of="pixels", more_is_better=False, high=INFINITE),
    Metric(
        name="discriminator_prob",
        title="Discriminator: real",
        of="pixels",
        more_is_better=False,
        note="Discriminator: how probable a GAN's discriminator finds it that a held-out scan is real.",
    ),
    Metric(
        name="label_accuracy",
        title="Accuracy",
        of="labels",
        function=label.accuracy,
        more_is_better=True,
        grid=None,
        note=_LABELS,
        undefined=_NO_LABEL,
    ),
    Metric(
        name="label_f1",
        title="F1",
        of="labels",
        function=label.f1,
        more_is_better=True,
        grid=None,
        note=_LABELS,
        undefined=_NO_LABEL,
    ),
    Metric(
        name="label_auc",
        title="AUC",
        of="labels",
        function=label.auc,
        more_is_better=True,
        grid=None,
        note=_LABELS,
        undefined=_ONE_LABEL,
    ),
    Metric(
        name="label_ce",
        title="CE",
        of="labels",
        function=label.cross_entropy,
        more_is_better=False,
        grid=None,
        high=INFINITE,
        note=_LABELS,
        undefined=_NO_LABEL,
    ),
):
    register(_metric)

ALWAYS = tuple(name for name, metric in METRICS.items() if metric.always)


def mask_metrics(pair: mask.MaskPair, names: t.Iterable[str]) -> dict[str, float]:
    """These of the metrics that are computed from masks, for one mask class of one image; NaN where one is undefined.

    `names` may hold other metrics. They are left out.
    """
    wanted = (metric for name in dict.fromkeys(names) if (metric := METRICS[name]).of == "masks")
    return {metric.name: float(metric.function(pair)) for metric in wanted if metric.function is not None}


class _Columns(t.NamedTuple):
    counts: mask.Confusion


def metric_of_counts(name: str, tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    """A metric that follows from counts of pixels, of N images with one mask class."""
    metric = METRICS[name]
    assert metric.from_counts, name
    assert metric.function is not None
    return np.asarray(metric.function(_Columns(mask.Confusion(tp, fp, fn, tn))))


def label_metrics(prob_NL: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """Every label metric of N images; NaN where one is undefined.

    prob_NL: floats, rows sum to 1. label_N: index of the true class, or -1 where an image has none. Those are left out.
    """
    prob_NL, label_N = np.asarray(prob_NL, float), np.asarray(label_N)
    prob_NL, label_N = prob_NL[label_N >= 0], label_N[label_N >= 0]
    if not len(label_N):
        return dict.fromkeys(LABEL_METRICS, float("nan"))
    labels = label.LabelSet(prob_NL=prob_NL, label_N=label_N)
    value_M = weighted_label_metrics(labels, labels.once_1N)[0]
    return dict(zip(LABEL_METRICS, value_M.tolist(), strict=True))


def weighted_label_metrics(labels: label.LabelSet, weight_RN: np.ndarray) -> np.ndarray:
    """(R, metrics): every label metric for each weighting, in the order of LABEL_METRICS.

    weight_RN: how often each image counts.
    """
    functions = [metric.function for metric in LABEL_METRICS.values() if metric.function is not None]
    return np.stack([function(labels, weight_RN) for function in functions], axis=1)
